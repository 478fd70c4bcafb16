"""Save, load and find checkpoints: one .pth with weights, config, tokenizer and lineage.

    {format, stage, config, tokenizer: {fingerprint, files}, model: {name: tensor}, lineage: [one entry per stage]}
    adapters also have  adapter: {rank, alpha, dropout, targets, parent: file name, parent_fingerprint}

A checkpoint contains plain types and tensors only and loads with `weights_only=True`. Writes are atomic. The `model` of
an adapter holds only the adapter's tensors: `load_model` finds the parent, verifies its fingerprint and merges.
Read next: ../trainer/loop.py (when checkpoints are written), config.py, lora.py.
"""

import functools
import hashlib
import json
import math
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.checksums import find_damaged_record
from common.errors import UserError
from common.files import atomic_write
from model.checkpoint_schema import (
    CHECKPOINT_FORMAT,
    Checkpoint,
    check_checkpoint,
    check_encodable_path,
    check_ranks,
    check_shapes,
    check_state_names,
)
from model.config import ModelConfig
from model.lora import LoRAConfig, adapter_state, attach, merge
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer

UnpicklingError: type[Exception] = vars(torch.serialization)["pickle"].UnpicklingError
LOAD_ERRORS = (  # raised by torch.load for damaged or foreign files
    RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
    AssertionError, ImportError, struct.error, zipfile.BadZipFile, UnpicklingError,
)  # fmt: skip
LoadedModel = tuple[Transformer, ChatTokenizer, Checkpoint]  # the checkpoint without its weights
FolderLoader = Callable[[str | os.PathLike[str], str | torch.device], LoadedModel]

# Stage -> the stages that it may start from, preferred first.
PARENT_STAGES: dict[str, tuple[str, ...]] = {
    "pretrain": (),
    "full_sft": ("pretrain",),
    "lora_sft": ("full_sft",),
    "dpo": ("lora_sft", "full_sft"),
    "grpo": ("dpo", "lora_sft", "full_sft"),
}
STAGE_SCRIPTS = {
    "pretrain": "1-pretrain.py",
    "full_sft": "3-full_sft.py",
    "lora_sft": "4-lora_sft.py",
    "dpo": "5-dpo_train.py",
    "grpo": "6-grpo_train.py",
}


def atomic_save(content: Any, path: str | os.PathLike[str]) -> None:
    """torch.save with an atomic rename. Raises UserError if the file cannot be written."""
    advice = "free some space or choose another --out_dir"
    try:
        with atomic_write(path, advice) as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's zip writer raises it for a full disk
        raise UserError(f"cannot write {path}: {error}: {advice}") from error


def unwrap_model(model: torch.nn.Module) -> Transformer:
    """The Transformer inside torch.compile and DDP."""
    wrapped: Any = model
    while not isinstance(wrapped, Transformer):
        wrapped = getattr(wrapped, "_orig_mod", None) or wrapped.module
    return wrapped


def model_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors to save, on the CPU: those of the unwrapped model, or only the adapter's if it has one.

    Tied weights appear once.
    """
    raw = unwrap_model(model)
    state = adapter_state(raw) if raw.adapter else raw.state_dict()
    if raw.config.tie_embeddings:
        state.pop("lm_head.weight", None)
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def build_checkpoint(
    model: torch.nn.Module, stage: str, tokenizer: ChatTokenizer, lineage: list[dict[str, Any]]
) -> Checkpoint:
    """The content of a .pth, as described above. `lineage`: one dict per stage, the current stage last.

    For a model with an adapter only the adapter is included; call `record_parent` first.
    """
    raw = unwrap_model(model)
    checkpoint = {
        "format": CHECKPOINT_FORMAT,
        "stage": stage,
        "config": raw.config.to_dict(),
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "files": tokenizer.files},
        "model": model_state_dict(model),
        "lineage": lineage,
    }
    if raw.adapter:
        assert "parent" in raw.adapter, "the adapter has no parent: call record_parent first"
        checkpoint["adapter"] = raw.adapter
    return checkpoint


def save_model(
    path: str | os.PathLike[str],
    model: torch.nn.Module,
    stage: str,
    tokenizer: ChatTokenizer,
    lineage: list[dict[str, Any]],
) -> None:
    """Write the checkpoint of a model atomically; arguments as in `build_checkpoint`."""
    atomic_save(build_checkpoint(model, stage, tokenizer, lineage), path)


def read_checkpoint(path: str | os.PathLike[str], weights: bool = True) -> Checkpoint:
    """The content of a .pth, tensors on the CPU. Raises UserError if it is missing, damaged or not a checkpoint.

    Verifies the checksums in the file. Without `weights` those of the tensors are skipped; do not use the tensors then.
    """
    check_encodable_path(path)
    try:
        stat = Path(path).stat()
        if Path(path).suffix != ".pth" and not zipfile.is_zipfile(path):
            raise UserError(f"{path} is not a checkpoint: name a .pth of a training script, or a transformers folder")
        if record := _damaged_record(Path(path).resolve(), weights, stat.st_size, stat.st_mtime_ns):
            raise ValueError(f"the checksum of {record} differs")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}: train one with `python 1-pretrain.py`") from None
    except (*LOAD_ERRORS, MemoryError) as error:  # a damaged size may ask for too much memory
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        advice = "the file is damaged or foreign: copy it again or train it again"
        raise UserError(f"cannot read {path} as a checkpoint ({reason[:120]}): {advice}") from None
    return check_checkpoint(checkpoint, path)


@functools.lru_cache(64)
def _damaged_record(path: Path, weights: bool, size: int, modified: int) -> str:
    """Cached, because an adapter's parent is opened more than once; size and mtime are part of the key."""
    return find_damaged_record(path, lambda name: weights or "/data/" not in name)


def load_state(model: Transformer, state: dict[str, torch.Tensor], where: str | os.PathLike[str]) -> None:
    """Load a model's or its adapter's tensors. Raises UserError if a name or shape differs or a value is not finite."""
    state = dict(state)
    expected = adapter_state(model) if model.adapter else model.state_dict()
    if model.config.tie_embeddings and not model.adapter:
        state.setdefault("lm_head.weight", state.get("model.embed_tokens.weight", torch.empty(0)))
    check_state_names(expected, state, where)
    for name, tensor in state.items():
        # The sum is a cheap test; if it is not finite (it may overflow), every value is tested.
        if not math.isfinite(tensor.sum(dtype=torch.float32)) and not bool(tensor.isfinite().all()):
            raise UserError(
                f"{where}: {name} is not finite (NaN or infinity): the file is damaged or training diverged"
            )
    model.load_state_dict({**model.state_dict(), **state}, strict=True)


def load_model(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    parent: str | os.PathLike[str] | None = None,
    open_folder: FolderLoader | None = None,
) -> LoadedModel:
    """Load a .pth: (model in fp32 and eval mode, tokenizer, checkpoint without its weights).

    An adapter is merged into its parent: `parent`, or the file that the adapter names (see `open_adapter`).
    `open_folder` loads Hugging Face folders; `open_model` in ../export/hf_import.py passes it. Raises UserError.
    """
    if Path(path).is_dir():
        if not open_folder:
            raise UserError(f"{path} is a folder, not a .pth")
        return open_folder(path, device)
    checkpoint = read_checkpoint(path)
    state = checkpoint.pop("model")
    if "adapter" in checkpoint:
        model = open_adapter(path, checkpoint["adapter"], state, parent, open_folder)
        merge(model)
    elif parent:
        raise UserError(f"{path} is a full model, not an adapter: leave out the parent")
    else:
        config = ModelConfig(**checkpoint["config"])
        check_shapes(config, state, path)
        model = Transformer(config)
        load_state(model, state, path)
    return model.to(device).eval(), load_carried_tokenizer(checkpoint, path), checkpoint


def load_carried_tokenizer(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> ChatTokenizer:
    """The tokenizer in a checkpoint. Raises UserError if it is damaged or has more ids than the model has rows."""
    try:
        tokenizer = ChatTokenizer(checkpoint["tokenizer"]["files"])
    except UserError as error:
        raise UserError(f"{path}: its tokenizer: {error}") from None
    if tokenizer.vocab_size > checkpoint["config"]["vocab_size"]:
        ids, rows = tokenizer.vocab_size - 1, checkpoint["config"]["vocab_size"]
        raise UserError(f"{path}: the tokenizer has ids up to {ids}, the model {rows} rows: the file is damaged")
    return tokenizer


def model_fingerprint(path: str | os.PathLike[str], open_folder: FolderLoader | None = None) -> str:
    """16 hex digits: a hash of the model's tensors; for an adapter it includes the parent's fingerprint."""
    if Path(path).is_dir():
        state, adapter = model_state_dict(load_model(path, open_folder=open_folder)[0]), {}
    else:
        checkpoint = read_checkpoint(path)
        state = checkpoint["model"]
        adapter = {name: value for name, value in checkpoint.get("adapter", {}).items() if name != "parent"}
    return state_fingerprint(state, adapter)


def state_fingerprint(state: dict[str, torch.Tensor], adapter: dict[str, Any] | None = None) -> str:
    """16 hex digits of the SHA-256 of names, dtypes, shapes and bytes of the tensors, and the adapter's settings."""
    digest = hashlib.sha256(json.dumps(adapter or {}, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def record_parent(
    model: Transformer,
    parent: str | os.PathLike[str],
    adapter_path: str | os.PathLike[str],
    open_folder: FolderLoader | None = None,
) -> None:
    """Record the parent's file name and fingerprint in a model with a new adapter; they are saved with the adapter.

    Raises UserError if the adapter would overwrite its parent.
    """
    if Path(parent).resolve() == Path(adapter_path).resolve():
        raise UserError(f"the adapter would overwrite its parent {parent}: choose another --out_dir")
    model.adapter |= {"parent": str(parent), "parent_fingerprint": model_fingerprint(parent, open_folder)}


def open_adapter(
    path: str | os.PathLike[str],
    adapter: dict[str, Any],
    state: dict[str, torch.Tensor],
    parent: str | os.PathLike[str] | None = None,
    open_folder: FolderLoader | None = None,
) -> Transformer:
    """The parent with the adapter attached, not merged (CPU, fp32). The parent may itself be an adapter.

    Searches the parent in the adapter's folder, at the recorded path, and in the folder above; `parent`: only there.
    Raises UserError if no parent is found or no candidate has the recorded fingerprint.
    """
    name, expected_fingerprint = Path(adapter["parent"]), adapter["parent_fingerprint"]
    lora = LoRAConfig(**{field: adapter[field] for field in ("rank", "alpha", "dropout", "targets")})
    check_ranks(state, lora.rank, path)
    beside = Path(path).absolute().parent
    candidates = [Path(parent)] if parent else [beside / name.name, name, beside.parent / name.name]
    candidates = [file for file in dict.fromkeys(candidates) if file.exists() and not file.samefile(path)]
    if not candidates:
        raise UserError(f"{path} is an adapter for {parent or name}, which is not there: put it beside the adapter")
    found = {file: model_fingerprint(file, open_folder) for file in candidates}
    parent = next((file for file in candidates if found[file] == expected_fingerprint), None)
    if parent is None:
        others = ", ".join(f"{file} is {fingerprint}" for file, fingerprint in found.items())
        raise UserError(
            f"{path} is an adapter for {name} with fingerprint {expected_fingerprint}, but {others}: "
            f"put the model that it was trained on beside it, or run `python {STAGE_SCRIPTS['lora_sft']}` again"
        )
    model, _, _ = load_model(parent, open_folder=open_folder)
    attach(model, lora)
    load_state(model, state, path)
    return model


def list_checkpoints(out_dir: str | os.PathLike[str], stage: str) -> list[Path]:
    """The checkpoints of a stage in `out_dir`, sorted by name, without resume states of earlier versions."""
    paths = Path(out_dir).glob(f"{stage}_[0-9]*.pth")
    return sorted(path for path in paths if ".resume" not in path.name)


def find_checkpoint(out_dir: str | os.PathLike[str], stage: str) -> Path:
    """The checkpoint of a stage in `out_dir`. Raises UserError if there is none or more than one."""
    matches = list_checkpoints(out_dir, stage)
    if not matches:
        example = "".join(f", as {file}" for file in sorted(Path(out_dir).glob(f"*/{stage}_[0-9]*.pth"))[:1])
        advice = f"run `python {STAGE_SCRIPTS[stage]}` first, or name the file{example}"
        raise UserError(f"no {stage}_*.pth in {out_dir}: {advice}")
    if len(matches) > 1:
        names = ", ".join(str(path) for path in matches)
        raise UserError(f"several {stage} models in {out_dir} ({names}): choose one by its file name")
    return matches[0]


def find_parent(stage: str, *folders: str | os.PathLike[str]) -> Path:
    """The checkpoint that `stage` starts from by default, in the first of these folders that has one.

    Raises UserError as `find_checkpoint` does.
    """
    parents = PARENT_STAGES[stage]
    found = ((folder, parent) for folder in folders for parent in parents if list_checkpoints(folder, parent))
    return find_checkpoint(*next(found, (folders[-1], parents[-1])))


def trained_stages(out_dir: str | os.PathLike[str]) -> list[str]:
    """The stages with a checkpoint in `out_dir`, in training order."""
    return [stage for stage in PARENT_STAGES if list_checkpoints(out_dir, stage)]


def latest_checkpoint(out_dir: str | os.PathLike[str]) -> Path:
    """The checkpoint of the last stage that has one. Raises UserError if that stage has several, or none has one."""
    return find_checkpoint(out_dir, (trained_stages(out_dir) or ["pretrain"])[-1])
