"""Writes a model as one GGUF file for llama.cpp and the programs built on it, and a Modelfile for Ollama.

    model                                 GGUF
    dense                                 architecture llama      q and k rows of each head interleaved, see below
    dense with qkv_bias                   architecture qwen2      q and k unchanged; llama where qwen2 does not fit
    dense with QK-norm                    architecture qwen3      q and k unchanged
    experts with QK-norm                  architecture qwen3moe   q and k unchanged, experts stacked
    experts without QK-norm               architecture granitemoe q and k interleaved, experts stacked

RoPE rotates dimensions i and i + head_dim / 2 together here and in qwen2, qwen3 and qwen3moe; llama and granitemoe
rotate 2i and 2i + 1. For these two the rows (and biases) of q_proj and k_proj are permuted inside each head. Attention
scores do not change, because q and k are permuted alike. llama.cpp's qwen2 supports neither a separate head_dim nor
llama3's RoPE scaling; its llama supports both, and biases.

    RoPE scaling   GGUF
    linear         rope.scaling.type linear, factor
    yarn           rope.scaling.type yarn, factor, original_context_length, attn_factor
    llama3         the tensor rope_freqs.weight: a divisor for each frequency; architectures llama and granitemoe only
    dynamic        rejected: llama.cpp has one RoPE table for all sequence lengths

llama.cpp multiplies YaRN's default factor on cos and sin, 0.1 ln(factor) + 1, by attn_factor. In these architectures it
always rounds the ends of the ramp and does not read beta_fast and beta_slow, so other values are rejected.
Source: llama.cpp's src/llama-vocab.cpp, src/llama-context.cpp and src/models/, ggml's rope_yarn, the gguf package.
Read next: gguf_tokenizer.py, verify_gguf.py (verification), hf_export.py.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.packages import require_packages
from export.gguf_tokenizer import pre_tokenizer_name, write_tokenizer
from export.granite_moe import expert_matrices
from export.hf_export import hf_architecture
from export.model_facts import Facts
from model.chat_template import ChatTemplate
from model.checkpoint import model_state_dict
from model.config import ModelConfig
from model.rope import attention_factor, rope_frequencies
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer

QUANTIZATIONS = ("f32", "f16", "bf16", "q8_0")
GGUF_ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "granitemoeshared": "granitemoe",
}
INTERLEAVED_ARCHITECTURES = ("llama", "granitemoe")


def import_gguf() -> Any:
    require_packages("--gguf", "gguf")
    import gguf

    return gguf


def check_supported(config: ModelConfig, tokenizer: ChatTokenizer) -> str:
    """Return llama.cpp's name of the pre-tokenizer. Raises UserError if it does not support the model or tokenizer."""
    import_gguf()
    pre = pre_tokenizer_name(tokenizer)
    check_rope_supported(config, gguf_architecture(config))
    return pre


def gguf_architecture(config: ModelConfig) -> str:
    """llama.cpp's name of the architecture. Raises UserError if no stock architecture computes the model."""
    name = GGUF_ARCHITECTURES[hf_architecture(config)[1]]
    is_wide = config.n_heads * config.head_dim != config.dim
    return "llama" if name == "qwen2" and (is_wide or config.rope_scaling.get("rope_type") == "llama3") else name


def check_rope_supported(config: ModelConfig, architecture: str) -> None:
    """Raises UserError if llama.cpp does not compute the RoPE scaling of `config` in this architecture."""
    kind, scaling, problem = config.rope_scaling.get("rope_type"), config.rope_scaling, ""
    if kind == "dynamic":
        problem = "dynamic RoPE scaling"
    elif (scaling.get("beta_fast", 32), scaling.get("beta_slow", 1), scaling.get("truncate", True)) != (32, 1, True):
        problem = "YaRN with beta_fast, beta_slow and truncate other than 32, 1 and true"
    elif kind == "llama3" and architecture not in INTERLEAVED_ARCHITECTURES:
        problem = f"llama3 RoPE scaling in the architecture {architecture}"
    if problem:
        raise UserError(f"--gguf: llama.cpp does not compute {problem}: leave out --gguf")


def write_rope_scaling(gguf: Any, writer: Any, config: ModelConfig) -> None:
    """Write the metadata keys of linear and yarn scaling."""
    scaling = config.rope_scaling
    kind = scaling.get("rope_type")
    if kind not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(float(scaling["factor"]))
    if config.trained_len:
        writer.add_rope_scaling_orig_ctx_len(config.trained_len)
    if kind == "yarn":
        default_factor = 0.1 * math.log(scaling["factor"]) + 1.0
        writer.add_rope_scaling_attn_factors(attention_factor(scaling) / default_factor)


def llama3_rope_factors(config: ModelConfig) -> Tensor:
    """The divisors (head_dim / 2,) that llama3's scaling applies to the RoPE frequencies."""
    unscaled, _ = rope_frequencies(dataclasses.replace(config, rope_scaling={}))
    return unscaled / rope_frequencies(config)[0]


def interleave(matrix: Tensor, heads: int) -> Tensor:
    """Permute rows of (heads * head_dim[, dim]): i and i + head_dim / 2 of each head become 2i and 2i + 1."""
    rows = len(matrix) // heads // 2
    return matrix.view(heads, 2, rows, *matrix.shape[1:]).transpose(1, 2).reshape(matrix.shape)


def stack_experts(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Stack the routed experts of each layer into one tensor (experts, out, in) per projection.

    Shared experts become one feed-forward, as wide as all of them together (granite_moe.py).
    """
    stacked = {name: tensor for name, tensor in state.items() if "experts." not in name}
    for layer in range(config.n_layers):
        prefix = f"model.layers.{layer}.mlp"
        if not config.qk_norm:  # granitemoe: the router stands behind all other tensors
            stacked[f"{prefix}.gate.weight"] = stacked.pop(f"{prefix}.gate.weight")
        matrices = {"experts": expert_matrices(state, f"{prefix}.experts", config.n_routed_experts)}
        if config.n_shared_experts:
            gate, up, down = expert_matrices(state, f"{prefix}.shared_experts", config.n_shared_experts)
            matrices["shared_expert"] = [gate.flatten(0, 1), up.flatten(0, 1), torch.cat([*down], dim=1)]
        for kind, projections in matrices.items():
            for part, matrix in zip(("gate", "up", "down"), projections, strict=True):
                stacked[f"{prefix}.{kind}.{part}_proj.weight"] = matrix
    return stacked


def gguf_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Yield (GGUF name, fp32 tensor) for every tensor of the model."""
    gguf, config, state = import_gguf(), model.config, model_state_dict(model)
    architecture = gguf_architecture(config)
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], config.n_layers)
    if config.rope_scaling.get("rope_type") == "llama3":
        yield "rope_freqs.weight", llama3_rope_factors(config)
    for name, tensor in (stack_experts(state, config) if config.use_moe else state).items():
        if architecture in INTERLEAVED_ARCHITECTURES and "q_proj" in name:
            tensor = interleave(tensor, config.n_heads)
        elif architecture in INTERLEAVED_ARCHITECTURES and "k_proj" in name:
            tensor = interleave(tensor, config.n_kv_heads)
        yield names.get_name(name, (".weight", ".bias")), tensor.float().contiguous()


def write_gguf(path: Path, model: Transformer, tokenizer: ChatTokenizer, quantization: str, facts: Facts) -> None:
    """Write the GGUF file. Raises UserError if llama.cpp cannot represent the model or the tokenizer."""
    gguf = import_gguf()
    config, pre = model.config, check_supported(model.config, tokenizer)
    writer = gguf.GGUFWriter(path, gguf_architecture(config))
    try:
        writer.add_name(f"{facts['stage']}_{facts['size']}")
        file_type = "ALL_F32" if quantization == "f32" else f"MOSTLY_{quantization.upper()}"
        writer.add_file_type(gguf.LlamaFileType[file_type])
        write_hyperparameters(writer, config)
        write_rope_scaling(gguf, writer, config)
        write_tokenizer(gguf, writer, tokenizer, config, pre)
        for name, tensor in gguf_tensors(model):
            kind = storage_type(gguf, name, tensor, quantization)
            is_raw = kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
            data = gguf.quants.quantize(tensor.numpy(), kind)
            writer.add_tensor(name, data, raw_dtype=None if is_raw else kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def storage_type(gguf: Any, name: str, tensor: Tensor, quantization: str) -> Any:
    """The ggml type of a tensor: fp32 for norms and routers, f16 for rows that q8_0's blocks of 32 do not divide."""
    if tensor.dim() < 2 or name.endswith(("ffn_gate_inp.weight", "mlp.gate.weight")):
        return gguf.GGMLQuantizationType.F32
    if quantization == "q8_0" and tensor.shape[-1] % 32:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[quantization.upper()]


def write_hyperparameters(writer: Any, config: ModelConfig) -> None:
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
    if config.use_moe and config.qk_norm:
        writer.add_expert_feed_forward_length(config.hidden_dim)
    elif config.use_moe:
        writer.add_expert_shared_feed_forward_length(config.n_shared_experts * config.hidden_dim)
        writer.add_attention_scale(config.head_dim**-0.5)
        writer.add_embedding_scale(1.0)
        writer.add_residual_scale(1.0)
        writer.add_logit_scale(1.0)


def modelfile(file: str, tokenizer: ChatTokenizer, config: ModelConfig) -> str:
    """The text of Ollama's Modelfile.

    TEMPLATE is written in Go's template language. It is left out for a foreign chat template: Ollama then uses the
    template in the GGUF file.
    """
    lines = ["# ollama create NAME -f Modelfile; ollama run NAME", f"FROM ./{file}"]
    if isinstance(tokenizer.format, ChatTemplate):
        lines.append(f'TEMPLATE """{go_template(tokenizer.format)}"""')
    stops = [*(tokenizer.backend.id_to_token(i) for i in tokenizer.stop_ids), *tokenizer.stop_strings]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines += [f"PARAMETER num_ctx {config.max_seq_len}", "PARAMETER temperature 0.7", "PARAMETER top_p 0.9"]
    return "\n".join(lines) + "\n"


def go_template(chat: ChatTemplate) -> str:
    """The chat format as a Go template over Ollama's .Messages, with the generation prompt at its end."""
    turns = []
    for role, (before, behind) in chat.roles.items():
        behind = chat.inner_suffix if role == "assistant" and chat.inner_suffix is not None else behind
        turn = f"{before.replace('{role}', '{{ .Role }}')}{{{{ .Content }}}}{behind}"
        turns.append(turn if role == "*" else f'{{{{ if eq .Role "{role}" }}}}{turn}{{{{ end }}}}')
    before, _ = chat._affixes("assistant")
    return f"{chat.start}{{{{ range .Messages }}}}{''.join(turns)}{{{{ end }}}}{before}"
