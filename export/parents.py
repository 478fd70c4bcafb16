"""Opens the model that a training stage starts from: a .pth, or a transformers folder.

The importer of transformers folders is imported only if a folder is given.
Read next: hf_import.py (folders), ../model/checkpoint.py (.pth files).
"""

import os

import torch

from model.checkpoint import LoadedModel, load_model


def open_parent(path: str | os.PathLike[str]) -> LoadedModel:
    """Return (model in fp32 on the CPU, tokenizer, checkpoint without weights). Raises UserError."""
    return load_model(path, open_folder=open_parent_folder)


def open_parent_folder(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> LoadedModel:
    """Open a transformers folder; see `open_folder` in hf_import.py."""
    from export.hf_import import open_folder

    return open_folder(path, device)
