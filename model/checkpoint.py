"""Checkpoints that describe themselves, and how they are found again.

    {format, stage, config, tokenizer: {fingerprint, files}, model: {name: tensor}, lineage: [one entry per stage]}

Plain types and tensors only, so they load with `weights_only=True`; the tokenizer's files travel inside, so one .pth is
enough to talk to a model. Written to a temporary name and renamed: a file that exists is whole.
Read next: ../trainer/loop.py (when they are written), config.py.
"""

import contextlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from corpus.errors import UserError
from model.chat import ChatTokenizer
from model.config import ModelConfig
from model.transformer import Transformer

FORMAT = 1
PARTS = {"format", "stage", "config", "tokenizer", "model"}
WRAPPERS = ("_orig_mod.", "module.")  # what torch.compile and DDP put in front of every name

# The chain is data: stage -> the stages that it may start from, nearest first.
PARENTS: dict[str, tuple[str, ...]] = {"pretrain": (), "full_sft": ("pretrain",)}
SCRIPTS = {"pretrain": "1-pretrain.py", "full_sft": "3-full_sft.py"}

Checkpoint = dict[str, Any]


def atomic_save(content: Any, path: str | os.PathLike[str]) -> None:
    """torch.save that never leaves half a file under the final name. Raises UserError when the disk is full."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error}: free some space or choose another --out_dir") from error


def plain_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The raw model's tensors on the CPU, without the prefixes of wrappers and the second name of tied weights."""
    state = {}
    for name, tensor in model.state_dict().items():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        state[name] = tensor.detach().cpu()
    raw = unwrap(model)
    if raw.config.tie_embeddings:
        state.pop("lm_head.weight")
    return state


def unwrap(model: torch.nn.Module) -> Transformer:
    """The Transformer inside torch.compile and DDP."""
    inner: Any = model
    while not isinstance(inner, Transformer):
        inner = getattr(inner, "_orig_mod", None) or inner.module
    return inner


def save_model(
    path: str | os.PathLike[str],
    model: torch.nn.Module,
    stage: str,
    tokenizer: ChatTokenizer,
    lineage: list[dict[str, Any]],
) -> None:
    """Write a model with everything that is needed to use it. `lineage` tells one dict per stage, this one last."""
    checkpoint = {
        "format": FORMAT,
        "stage": stage,
        "config": unwrap(model).config.to_dict(),
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "files": tokenizer.files},
        "model": plain_state(model),
        "lineage": lineage,
    }
    atomic_save(checkpoint, path)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The content of a .pth, tensors on the CPU. Raises UserError when it is missing, damaged, or not ours."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}: train one with `python 1-pretrain.py`") from None
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot read {path} as a checkpoint ({reason[:120]}): the file is damaged or foreign"
        ) from None
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= PARTS:
        raise UserError(f"{path} is not a model of this project: it lacks one of {', '.join(sorted(PARTS))}")
    if checkpoint["format"] != FORMAT:
        raise UserError(f"{path} has format {checkpoint['format']}, this version reads {FORMAT}: train it again")
    return checkpoint


def load_state(model: Transformer, state: dict[str, torch.Tensor], where: str | os.PathLike[str]) -> None:
    """Fill the model; every name and shape must fit. Raises UserError listing what differs."""
    state = dict(state)
    if model.config.tie_embeddings:
        state.setdefault("lm_head.weight", state.get("model.embed_tokens.weight", torch.empty(0)))
    own = model.state_dict()
    differences = [f"missing {name}" for name in own.keys() - state.keys()]
    differences += [f"unknown {name}" for name in state.keys() - own.keys()]
    differences += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if differences:
        shown = "; ".join(sorted(differences)[:5])
        raise UserError(f"{where} does not fit its config: {len(differences)} differences: {shown}")
    model.load_state_dict(state, strict=True)


def load_model(
    path: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> tuple[Transformer, ChatTokenizer, Checkpoint]:
    """Open a .pth or a transformers folder: the model (fp32, in eval mode), its tokenizer, the rest of the checkpoint.

    The folder: see stock.py.
    """
    if Path(path).is_dir():
        from model.stock import open_folder

        return open_folder(path, device)
    checkpoint = read_checkpoint(path)
    try:
        config = ModelConfig(**checkpoint["config"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} was written by another version of this project: {error}") from None
    model = Transformer(config)
    load_state(model, checkpoint.pop("model"), path)
    return model.to(device).eval(), ChatTokenizer(checkpoint["tokenizer"]["files"]), checkpoint


def find_checkpoint(out_dir: str | os.PathLike[str], stage: str) -> Path:
    """The one checkpoint of a stage in `out_dir`. None or several is a UserError that says what to do."""
    suffixes = (f"{stage}_[0-9]*.pth",)
    matches = sorted(path for suffix in suffixes for path in Path(out_dir).glob(suffix) if ".resume" not in path.name)
    if not matches:
        raise UserError(f"no {stage}_*.pth in {out_dir}: run `python {SCRIPTS[stage]}` first, or name the file")
    if len(matches) > 1:
        names = ", ".join(str(path) for path in matches)
        raise UserError(f"several {stage} models in {out_dir} ({names}): choose one by its file name")
    return matches[0]


def find_parent(out_dir: str | os.PathLike[str], stage: str) -> Path:
    """The checkpoint that `stage` starts from when --init_from is not given."""
    parent = PARENTS[stage][0]
    for parent in PARENTS[stage]:
        if list(Path(out_dir).glob(f"{parent}_[0-9]*.pth")):
            break
    return find_checkpoint(out_dir, parent)
