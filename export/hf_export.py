"""One of our models as a transformers folder that stock transformers opens, without any code of ours.

    config.json  generation_config.json  model*.safetensors  tokenizer.json  tokenizer_config.json  ...  lineage.json

    dense                                LlamaForCausalLM              tensors as they are
    dense with qkv_bias                  Qwen2ForCausalLM              tensors as they are
    dense with QK-norm                   Qwen3ForCausalLM              tensors as they are
    experts with QK-norm, none shared    Qwen3MoeForCausalLM           tensors as they are
    experts without QK-norm              GraniteMoeSharedForCausalLM   experts stacked (granite_moe.py)

The same model gives the same bytes, wherever it is written and whichever transformers is installed: config.json is
written here, not by that library. hf_import.py reads such a folder back.
RoPE scaling is written for transformers 4 (`rope_scaling`) and 5 (`rope_parameters`). YaRN's original length is written
as max_position_embeddings alone: 4.50 reads it there, 4.53 divides by original_max_position_embeddings where that is
given, 4.57 and 5 read either.
Read next: granite_moe.py, verify_hf.py (is it really the same model?), ../export_model.py.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from export.granite_moe import granite_settings, to_granite
from export.hf_config import GRANITE, QWEN3_MOE
from model.checkpoint import model_state_dict
from model.config import ModelConfig
from model.rope import attention_factor
from model.tokenizer import ChatTokenizer
from model.tokenizer_files import read_settings
from model.transformer import Transformer

DEFAULT_MAX_NEW_TOKENS = 256  # how long a stock program lets an answer get, when the model reads more than that


def hf_architecture(config: ModelConfig) -> tuple[str, str]:
    """(class, model_type) of the stock architecture that computes the same. Raises UserError where none does."""
    has_default_head_dim = config.n_heads * config.head_dim == config.dim
    for problem, wrong in {
        "qkv_bias together with qk_norm": config.qkv_bias and config.qk_norm,
        "a mixture of experts with qkv_bias": config.qkv_bias and config.use_moe,
        "a mixture of experts with qk_norm and shared experts": config.use_moe
        and config.qk_norm
        and config.n_shared_experts > 0,
        "a mixture of experts without qk_norm, with a head_dim that is not dim / n_heads": config.use_moe
        and not config.qk_norm
        and not has_default_head_dim,
    }.items():
        if wrong:
            raise UserError(f"{problem} fits no stock architecture: train it without one of the two")
    if config.use_moe:
        return ("Qwen3MoeForCausalLM", QWEN3_MOE) if config.qk_norm else ("GraniteMoeSharedForCausalLM", GRANITE)
    if config.qkv_bias:
        return "Qwen2ForCausalLM", "qwen2"
    return ("Qwen3ForCausalLM", "qwen3") if config.qk_norm else ("LlamaForCausalLM", "llama")


def make_hf_config(config: ModelConfig, tokenizer: ChatTokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json, for transformers 4 and 5 alike."""
    name, model_type = hf_architecture(config)
    dtype_name = str(dtype).removeprefix("torch.")
    extra_settings: dict[str, dict[str, Any]] = {
        "llama": {"mlp_bias": False},
        "qwen2": {"use_sliding_window": False},
        "qwen3": {"use_sliding_window": False},
        QWEN3_MOE: {"use_sliding_window": False, **qwen3_moe_config_keys(config)},
        GRANITE: granite_settings(config),
    }
    settings = {
        "architectures": [name],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # transformers 4 reads this one, 5 rope_parameters
        **rope_config_keys(config),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos_id(tokenizer),
        "eos_token_id": tokenizer.end_of_turn_id,
        "pad_token_id": tokenizer.pad_id,
        "torch_dtype": dtype_name,  # transformers 4 reads this one, 5 the next
        "dtype": dtype_name,
        **extra_settings[model_type],
    }
    if model_type == "qwen2":  # its config has no key for biases
        del settings["attention_bias"]
    return settings


def rope_config_keys(config: ModelConfig) -> dict[str, Any]:
    """max_position_embeddings, and RoPE in the spelling of transformers 5, with scaling also in that of 4."""
    scaling, length = dict(config.rope_scaling), config.max_seq_len
    kind, original = scaling.get("rope_type"), scaling.get("original_max_position_embeddings", 0)
    if kind == "dynamic" or (kind == "yarn" and length == int(scaling["factor"] * original)):
        length = original
    if kind in ("linear", "dynamic") or (kind == "yarn" and length == original):
        scaling.pop("original_max_position_embeddings", None)
    if kind == "yarn" and "mscale" in scaling:  # transformers 4.50 does not know it
        scaling = {name: value for name, value in scaling.items() if not name.startswith("mscale")}
        scaling["attention_factor"] = attention_factor(config.rope_scaling)
    return {
        "max_position_embeddings": length,
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": config.rope_theta},
        **({"rope_scaling": scaling} if scaling else {}),
    }


def qwen3_moe_config_keys(config: ModelConfig) -> dict[str, Any]:
    """The keys of a Qwen3-MoE's config.json for its experts."""
    return {
        "moe_intermediate_size": config.hidden_dim,
        "num_experts": config.n_routed_experts,
        "num_experts_per_tok": config.n_active_experts,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": config.balance_loss_coef,
    }


def bos_id(tokenizer: ChatTokenizer) -> int | None:
    """The token that a text begins with, in those tokenizers that have one."""
    token = tokenizer.config.get("bos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return tokenizer.backend.token_to_id(token) if isinstance(token, str) else None


def make_generation_config(config: ModelConfig, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """How stock programs draw an answer, and which tokens end it. What a foreign parent said of drawing stays."""
    defaults = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    defaults["max_new_tokens"] = min(DEFAULT_MAX_NEW_TOKENS, config.max_seq_len // 2)
    settings = read_settings(tokenizer.files, "generation_config.json") or defaults
    return {
        **settings,
        "bos_token_id": bos_id(tokenizer),
        "eos_token_id": tokenizer.stop_ids,
        "pad_token_id": tokenizer.pad_id,
    }


def hf_state_dict(model: Transformer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a folder under stock names, in `dtype`; tied output weights once."""
    state = model_state_dict(model)
    if hf_architecture(model.config)[1] == GRANITE:
        state = to_granite(state, model.config)
    return {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}


def write_hf_folder(
    folder: Path, model: Transformer, tokenizer: ChatTokenizer, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Write all that stock transformers needs into an existing folder; model.safetensors is split above a size."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    settings = make_hf_config(model.config, tokenizer, dtype)
    state = hf_state_dict(model, dtype)
    split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_bytes)
    for name, tensors in split.filename_to_tensors.items():
        save_file({tensor: state[tensor] for tensor in tensors}, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_sorted_json(folder / "model.safetensors.index.json", index)
    tokenizer.save(folder)
    write_sorted_json(folder / "config.json", settings)
    for name in split.filename_to_tensors:
        shutil.copymode(folder / "config.json", folder / name)  # safetensors lets nobody else read its files
    write_sorted_json(folder / "generation_config.json", make_generation_config(model.config, tokenizer))


def write_sorted_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")
