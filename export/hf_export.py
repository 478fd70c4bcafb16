"""Writes a model as a transformers folder, which stock transformers opens without code of this project.

    config.json  generation_config.json  model*.safetensors  tokenizer.json  tokenizer_config.json  ...  lineage.json

    dense                                LlamaForCausalLM              tensors unchanged
    dense with qkv_bias                  Qwen2ForCausalLM              tensors unchanged
    dense with QK-norm                   Qwen3ForCausalLM              tensors unchanged
    experts with QK-norm, none shared    Qwen3MoeForCausalLM           tensors unchanged
    experts without QK-norm              GraniteMoeSharedForCausalLM   experts stacked (granite_moe.py)

The same model gives the same bytes on every machine and with every version of transformers, because config.json is
written here and not by that library. hf_folder.py reads such a folder.
RoPE scaling is written for transformers 4 (`rope_scaling`) and 5 (`rope_parameters`). YaRN's original length is written
only as max_position_embeddings: 4.50 reads it there, 4.53 divides by original_max_position_embeddings if that is
given, 4.57 and 5 read either.
Read next: granite_moe.py, verify_hf.py (compares the folder with the model), ../export_model.py.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from common.errors import UserError
from common.files import remove, replace_folder, temporary_path
from common.locks import lock_output
from export.granite_moe import granite_settings, to_granite
from export.hf_config import GRANITE, QWEN3_MOE
from export.model_facts import LINEAGE_FILE
from model.checkpoint import model_state_dict
from model.config import ModelConfig
from model.rope import attention_factor
from model.tokenizer import ChatTokenizer
from model.tokenizer_files import read_settings
from model.transformer import Transformer


def hf_architecture(config: ModelConfig) -> tuple[str, str]:
    """(class, model_type) of the stock architecture that computes the same. Raises UserError if there is none."""
    problem = ""
    if config.qkv_bias and config.qk_norm:
        problem = "qkv_bias together with qk_norm"
    elif config.use_moe and config.qkv_bias:
        problem = "a mixture of experts with qkv_bias"
    elif config.use_moe and config.qk_norm and config.n_shared_experts:
        problem = "a mixture of experts with qk_norm and shared experts"
    elif config.use_moe and not config.qk_norm and config.n_heads * config.head_dim != config.dim:
        problem = "a mixture of experts without qk_norm, with a head_dim that is not dim / n_heads"
    if problem:
        raise UserError(f"no stock architecture supports {problem}: train the model without one of the two")
    if config.use_moe:
        return ("Qwen3MoeForCausalLM", QWEN3_MOE) if config.qk_norm else ("GraniteMoeSharedForCausalLM", GRANITE)
    if config.qkv_bias:
        return "Qwen2ForCausalLM", "qwen2"
    return ("Qwen3ForCausalLM", "qwen3") if config.qk_norm else ("LlamaForCausalLM", "llama")


def make_hf_config(config: ModelConfig, tokenizer: ChatTokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json, for transformers 4 and 5."""
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
        "rope_theta": config.rope_theta,  # read by transformers 4; 5 reads rope_parameters
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
        "torch_dtype": dtype_name,  # read by transformers 4; 5 reads dtype
        "dtype": dtype_name,
        **extra_settings[model_type],
    }
    if model_type == "qwen2":  # its config has no key for biases
        del settings["attention_bias"]
    return settings


def rope_config_keys(config: ModelConfig) -> dict[str, Any]:
    """max_position_embeddings, rope_parameters (transformers 5) and, if RoPE is scaled, rope_scaling (4)."""
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
    """The keys of config.json that describe the experts of a Qwen3-MoE."""
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
    """The id of the tokenizer's bos token, None if it has none."""
    token = tokenizer.config.get("bos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return tokenizer.backend.token_to_id(token) if isinstance(token, str) else None


def make_generation_config(config: ModelConfig, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """generation_config.json: stop tokens and sampling settings. A foreign model keeps its sampling settings."""
    length = min(256, config.max_seq_len // 2)
    defaults = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": length}
    settings = read_settings(tokenizer.files, "generation_config.json") or defaults
    return {
        **settings,
        "bos_token_id": bos_id(tokenizer),
        "eos_token_id": tokenizer.stop_ids,
        "pad_token_id": tokenizer.pad_id,
    }


def hf_state_dict(model: Transformer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors under stock names, in `dtype`. Tied output weights are not repeated."""
    state = model_state_dict(model)
    if hf_architecture(model.config)[1] == GRANITE:
        state = to_granite(state, model.config)
    return {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}


def write_hf_folder(
    folder: Path, model: Transformer, tokenizer: ChatTokenizer, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Write all files for stock transformers into an existing folder; a shard holds at most `max_shard_bytes`."""
    from huggingface_hub import split_torch_state_dict_into_shards

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
        shutil.copymode(folder / "config.json", folder / name)  # safetensors writes files that only their owner reads
    write_sorted_json(folder / "generation_config.json", make_generation_config(model.config, tokenizer))


def write_sorted_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


# ---- an export is complete or absent ---------------------------------------------------------------------------------
def check_target(target: Path, overwrite: bool) -> None:
    """Raises UserError if `target` exists, unless it is empty, or an earlier export and `overwrite` is set."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: name a folder")
    is_occupied = target.is_dir() and any(target.iterdir())
    if is_occupied and not (target / LINEAGE_FILE).is_file():
        raise UserError(f"{target} is not empty and not an exported model: choose another folder")
    if is_occupied and not overwrite:
        raise UserError(f"{target} already contains an exported model: choose another folder, or add --overwrite")


@contextlib.contextmanager
def staging_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside `target`, renamed to `target` at the end and removed after an error.

    `target` is locked meanwhile, and files left by a killed export are removed. Raises UserError as `check_target`
    does, if another process holds the lock, or if writing fails.
    """
    check_target(target, overwrite)
    target = target.resolve()
    folder = temporary_path(target, "tmp")
    with lock_output(target):
        check_target(target, overwrite)  # another export may have finished before the lock was taken
        try:
            folder.mkdir(parents=True)
            yield folder
            replace_folder(folder, target)
        except (OSError, SafetensorError) as error:
            reason = str(error)[:200]
            raise UserError(f"cannot write {target} ({reason}): free some space or choose another folder") from error
        finally:
            remove(folder)
