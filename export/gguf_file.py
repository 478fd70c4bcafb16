"""A model of this house as one GGUF file, for llama.cpp and what is built on it, and a Modelfile for Ollama.

    ours                                  GGUF
    dense                                 architecture llama      q and k rows of each head interleaved, see below
    dense with QK-norm                    architecture qwen3      q and k as they are
    mixture of experts                    architecture granitemoe q and k interleaved, experts stacked

RoPE turns dimension i together with i + head_dim / 2 here and in qwen3, but 2i together with 2i + 1 in the other two:
there the rows of q_proj and k_proj change places inside each head, which changes no score (q and k move alike).

Source: llama.cpp's src/llama-vocab.cpp and src/models/, the gguf package.
Read next: gguf_tokenizer.py, gguf_check.py (is it really the same model?), stock_folder.py.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from corpus.errors import UserError
from export.gguf_tokenizer import pre_tokenizer, write_tokenizer
from export.stock_folder import architecture
from model.chat import ChatTokenizer
from model.chat_formats import NamedFormat
from model.checkpoint import plain_state
from model.config import ModelConfig
from model.granite import to_granite
from model.lineage import Facts
from model.transformer import Transformer

NUMBER_FORMATS = ("f32", "f16", "bf16", "q8_0")
ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "granitemoeshared": "granitemoe"}
NAMES = {  # of the tensors
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_package() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError('--gguf needs the gguf package: pip install "gguf>=0.17,<0.20"') from None
    return gguf


def refuse_early(tokenizer: ChatTokenizer) -> None:
    """Raises UserError, before any work, for what `write_gguf` would refuse."""
    gguf_package()
    pre_tokenizer(tokenizer)


def interleave(matrix: Tensor, heads: int) -> Tensor:
    """Rows (heads * head_dim, dim): i and i + head_dim / 2 of each head become neighbours 2i and 2i + 1."""
    rows, columns = matrix.shape
    return matrix.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def gguf_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its GGUF name, fp32."""
    config = model.config
    state = plain_state(model)
    state = to_granite(state, config) if config.use_moe else state
    for name, tensor in state.items():
        name, tensor = name.removesuffix(".weight"), tensor.float()
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if not found:
            yield f"{NAMES[name]}.weight", tensor
            continue
        layer, part = found.groups()
        if part in ("self_attn.q_proj", "self_attn.k_proj") and not config.qk_norm:
            tensor = interleave(tensor, config.n_heads if part == "self_attn.q_proj" else config.n_kv_heads)
        for target, matrix in [(NAMES[part], tensor)] if part in NAMES else moe_parts(part, tensor):
            yield f"blk.{layer}.{target}.weight", matrix.contiguous()


def moe_parts(part: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Granite's stacks as llama.cpp keeps them: gate and up apart."""
    if part == "block_sparse_moe.router.layer":
        return [("ffn_gate_inp", tensor)]
    if part == "block_sparse_moe.output_linear":
        return [("ffn_down_exps", tensor)]
    if part == "shared_mlp.output_linear":
        return [("ffn_down_shexp", tensor)]
    kind = "exps" if part == "block_sparse_moe.input_linear" else "shexp"
    gate, up = tensor.chunk(2, dim=-2)
    return [(f"ffn_gate_{kind}", gate), (f"ffn_up_{kind}", up)]


def write_gguf(path: Path, model: Transformer, tokenizer: ChatTokenizer, number_format: str, known: Facts) -> None:
    """Write the file. Raises UserError for a model or a tokenizer that llama.cpp cannot hold."""
    gguf = gguf_package()
    config, pre = model.config, pre_tokenizer(tokenizer)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[architecture(config)[1]])
    try:
        writer.add_name(f"{known['stage']}_{known['size']}")
        writer.add_file_type(
            gguf.LlamaFileType[f"MOSTLY_{number_format.upper()}" if number_format != "f32" else "ALL_F32"]
        )
        write_sizes(writer, config)
        write_tokenizer(gguf, writer, tokenizer, config, pre)
        for name, tensor in gguf_tensors(model):
            kind = storage(gguf, name, tensor, number_format)
            plain = kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
            data = gguf.quants.quantize(tensor.numpy(), kind)
            writer.add_tensor(name, data, raw_dtype=None if plain else kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def storage(gguf: Any, name: str, tensor: Tensor, number_format: str) -> Any:
    """How a tensor is kept: norms and routers in fp32, rows that are no multiple of q8_0's 32 numbers in f16."""
    if tensor.dim() < 2 or name.endswith(("ffn_gate_inp.weight", "mlp.gate.weight")):
        return gguf.GGMLQuantizationType.F32
    if number_format == "q8_0" and tensor.shape[-1] % 32:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[number_format.upper()]


def write_sizes(writer: Any, config: ModelConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.use_moe:
        writer.add_expert_count(config.n_routed_experts)
        writer.add_expert_used_count(config.n_active_experts)
        writer.add_expert_shared_feed_forward_length(config.n_shared_experts * config.hidden_dim)
        writer.add_attention_scale(config.head_dim**-0.5)
        writer.add_embedding_scale(1.0)
        writer.add_residual_scale(1.0)
        writer.add_logit_scale(1.0)


def modelfile(file: str, tokenizer: ChatTokenizer, config: ModelConfig) -> str:
    """Ollama's Modelfile. Its TEMPLATE is in Go's template language; for a foreign chat template Ollama is left to read
    the one in the file."""
    lines = ["# ollama create NAME -f Modelfile; ollama run NAME", f"FROM ./{file}"]
    if isinstance(tokenizer.format, NamedFormat):
        lines.append(f'TEMPLATE """{go_template(tokenizer.format)}"""')
    stops = [*(tokenizer.backend.id_to_token(i) for i in tokenizer.stop_ids), *tokenizer.stop_strings]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines += [f"PARAMETER num_ctx {config.max_seq_len}", "PARAMETER temperature 0.7", "PARAMETER top_p 0.9"]
    return "\n".join(lines) + "\n"


def go_template(chat: NamedFormat) -> str:
    """The chat format over Ollama's .Messages; what stands before an answer comes last, so each answer is followed."""
    turns = []
    for role, (before, behind) in chat.turns.items():
        behind = chat.between if role == "assistant" and chat.between is not None else behind
        turn = f"{before.replace('{role}', '{{ .Role }}')}{{{{ .Content }}}}{behind}"
        turns.append(turn if role == "*" else f'{{{{ if eq .Role "{role}" }}}}{turn}{{{{ end }}}}')
    before, _ = chat._turn("assistant")
    return f"{chat.start}{{{{ range .Messages }}}}{''.join(turns)}{{{{ end }}}}{before}"
