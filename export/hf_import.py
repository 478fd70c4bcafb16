"""Opens a model for further use: a .pth of this project, or a transformers folder.

    model, tokenizer, checkpoint = open_model("out/full_sft_512.pth")
    model, tokenizer, checkpoint = open_model("../Qwen3-0.6B")          Llama, Mistral, Qwen2, Qwen3, MoE: hf_folder.py

Read next: hf_folder.py (folders), ../model/checkpoint.py (.pth files).
"""

import os

import torch

from model.checkpoint import LoadedModel, load_model


def open_model(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", parent: str | os.PathLike[str] | None = None
) -> LoadedModel:
    """Open a .pth or a transformers folder; see `model.checkpoint.load_model`."""
    return load_model(path, device, parent, open_folder)


def open_folder(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> LoadedModel:
    """Open a transformers folder; see `export.hf_folder.read_folder`."""
    from export.hf_folder import read_folder  # not needed for a .pth

    return read_folder(path, device)
