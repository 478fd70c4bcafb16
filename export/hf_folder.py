"""Reads a transformers folder of a Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE or GraniteMoeShared model.

    config.json, model*.safetensors, tokenizer.json, tokenizer_config.json, chat_template.jinja  ->  model, tokenizer

Architecture and parameter names equal transformers' (../model/transformer.py), so the tensors are read unchanged, in
fp32, and logits equal transformers'. Settings that this model does not support (sliding windows, a bias on o_proj,
longrope, quantised weights) are errors that name the setting (hf_config.py). A folder written by hf_export.py keeps
its stage and its lineage.

Commands that take a checkpoint also take a folder: `3-full_sft.py --init_from DIR`, `2-eval.py --checkpoint DIR`.
Read next: hf_config.py, hf_import.py (opens a folder or a .pth), ../model/jinja_template.py (chat templates).
"""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.errors import UserError, escape_controls
from export.granite_moe import from_granite
from export.hf_config import GRANITE, QWEN3_MOE, convert_hf_config, read_hf_json
from export.model_facts import checkpoint_entries
from model.checkpoint import LoadedModel, load_state
from model.checkpoint_schema import check_shapes, is_file_name, tensor_problem
from model.config import ModelConfig
from model.tokenizer import load_tokenizer
from model.transformer import Transformer


def read_folder(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> LoadedModel:
    """The model (fp32, in eval mode), its tokenizer, and the other entries of a checkpoint.

    Raises UserError that names the missing or damaged file or the unsupported setting.
    """
    folder = Path(path)
    settings = read_hf_json(folder, "config.json")
    state = read_tensors(folder)
    tied = "lm_head.weight" not in state or bool(settings.get("tie_word_embeddings"))
    config = convert_hf_config(folder, settings, tied)
    if tied:
        state.pop("lm_head.weight", None)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} has no tokenizer.json: write it with transformers, "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model only {config.vocab_size} ids"
        )
    if translate := {GRANITE: from_granite, QWEN3_MOE: unstack_experts}.get(settings["model_type"]):
        state = translate(state, config)
    check_shapes(config, state, folder)
    model = Transformer(config)
    load_state(model, state, folder)
    return model.to(device).eval(), tokenizer, checkpoint_entries(folder, settings, config, tokenizer)


def unstack_experts(state: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Split stacked Qwen3-MoE experts, gate_up_proj (experts, 2 ff, dim) and down_proj (experts, dim, ff), into one
    matrix per expert, with the names of the files on the hub."""
    unstacked: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        prefix, _, stack = name.rpartition(".experts.")
        if stack not in ("gate_up_proj", "down_proj") or tensor.dim() != 3:
            unstacked[name] = tensor
            continue
        parts = ("gate_proj", "up_proj") if stack == "gate_up_proj" else ("down_proj",)
        for i, expert in enumerate(tensor):
            for part, matrix in zip(parts, expert.chunk(len(parts)), strict=True):
                unstacked[f"{prefix}.experts.{i}.{part}.weight"] = matrix.contiguous()
    return unstacked


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder's safetensors files, in fp32. Raises UserError if a file is missing or damaged."""
    if (folder / "model.safetensors.index.json").is_file():
        index = read_hf_json(folder, "model.safetensors.index.json").get("weight_map")
        if not isinstance(index, dict):
            raise UserError(f"{folder}/model.safetensors.index.json has no weight_map: download it again")
        names = sorted({str(name) for name in index.values()})
    else:
        names = ["model.safetensors"]
    state: dict[str, torch.Tensor] = {}
    for name in names:
        if not is_file_name(name) or Path(name).name != name or not (folder / name).is_file():
            hint = "only safetensors are read; write them with save_pretrained(DIR)"
            hint = hint if len(names) == 1 else "download it again"
            raise UserError(f"{folder} has no {escape_controls(name)[:80]}: {hint}")
        try:
            state |= load_file(folder / name)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"cannot read {folder / name} ({str(error)[:120]}): download it again") from None
    for name, tensor in state.items():
        if problem := tensor_problem(tensor):
            raise UserError(f"{folder}: {escape_controls(name)} is {problem}: not supported")
    # Old checkpoints contain the RoPE frequencies, which this model computes.
    return {name: tensor.float() for name, tensor in state.items() if not name.endswith("rotary_emb.inv_freq")}
