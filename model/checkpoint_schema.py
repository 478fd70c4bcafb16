"""What the content of a .pth must look like: types, names and sizes, checked before anything is built from it.

    {format, stage, config, tokenizer: {fingerprint, files: {name: text}}, model: {name: tensor}, lineage: [dict]}
    and optionally adapter {rank, alpha, dropout, targets, parent, parent_fingerprint}, license

A file of another program, of a damaged disk, or of a person who wants to break this one has any types. The tensors'
shapes are compared with the config on the meta device, so a config of terabytes allocates nothing.
Called by checkpoint.read_checkpoint. Read next: config.py (the limits of the config), checkpoint.py.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError, printable
from model.config import ModelConfig
from model.lora import LoRAConfig
from model.transformer import Transformer

FORMAT = 1
PARTS = {"format", "stage", "config", "tokenizer", "model"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STAGE = r"[a-z][a-z0-9_]{0,63}"
FILE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
MOST_TENSORS = 2**20
DEEPEST = 8  # levels of a lineage's entry
LONGEST = 100_000  # characters of one text in a lineage

ENTRY: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("stage", "data", "source", "model_type", "data_history", "stopped"), (str,)),
    **dict.fromkeys(("steps", "tokens", "pairs", "seed"), (int,)),
    **dict.fromkeys(("seconds", "loss", "learning_rate"), (int, float)),
    "validation": (dict,),
}

Checkpoint = dict[str, Any]


def check_checkpoint(content: Any, path: str | os.PathLike[str]) -> Checkpoint:
    """The content, if it has the form above; its config has all fields, control characters in its lineage are spelled
    out.

    Raises UserError naming the file and the first part that is wrong.
    """
    if not isinstance(content, dict) or not content.keys() >= PARTS:
        raise UserError(f"{path} is not a model of this project: it lacks one of {', '.join(sorted(PARTS))}")
    if content["format"] != FORMAT:
        raise UserError(f"{path} has format {content['format']!r:.40}, this version reads {FORMAT}: train it again")
    for part, check in CHECKS.items():
        if part in content and (problem := check(content[part])):
            raise UserError(f"{path}: {problem}: the file is damaged or foreign")
    if total_bytes(content["model"]) > 2 * Path(path).stat().st_size:
        raise UserError(f"{path}: its tensors overlap in the file: the file is damaged or foreign")
    lineage = [as_printable(entry) for entry in content.get("lineage") or []]
    return {**content, "config": ModelConfig(**content["config"]).to_dict(), "lineage": lineage}


def check_shapes(config: ModelConfig, state: dict[str, torch.Tensor], where: str | os.PathLike[str]) -> None:
    """Raises UserError unless the tensors have the names and shapes of a model of this config. Allocates nothing.

    A layer, and an expert, have a tensor at least: counting them first bounds the time that this takes.
    """
    least = config.n_layers * (config.n_shared_experts + config.n_routed_experts if config.use_moe else 1)
    if least > len(state):
        raise UserError(f"{where} does not fit the model: {len(state)} tensors are not {config.n_layers} layers")
    with torch.device("meta"):
        model = Transformer(config)
    own = dict(model.state_dict())
    if config.tie_embeddings and "lm_head.weight" not in state:
        own.pop("lm_head.weight")
    check_names(own, state, where)


def check_ranks(state: dict[str, torch.Tensor], rank: int, where: str | os.PathLike[str]) -> None:
    """Raises UserError unless the matrices A of an adapter have its rank; new ones are as large as it says."""
    ranks = {tensor.shape[0] for name, tensor in state.items() if name.endswith(".lora_A.weight") and tensor.dim()}
    if ranks != {rank}:
        raise UserError(f"{where} does not fit: it holds matrices of rank {sorted(ranks)}, the adapter says {rank}")


def check_names(own: dict[str, torch.Tensor], state: dict[str, torch.Tensor], where: str | os.PathLike[str]) -> None:
    """Raises UserError listing what differs between the model's names and shapes and those of a file."""
    differences = [f"missing {name}" for name in own.keys() - state.keys()]
    differences += [f"unknown {printable(name)}" for name in state.keys() - own.keys()]
    differences += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if differences:
        shown = "; ".join(sorted(differences)[:5])
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise UserError(f"{where} does not fit the model: {shown}{more}")


def total_bytes(state: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def wrong_stage(stage: Any) -> str:
    return "" if isinstance(stage, str) and re.fullmatch(STAGE, stage) else "stage is not a name of a stage"


def wrong_config(config: Any) -> str:
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        return "config is not a dict of numbers by name"
    try:
        ModelConfig(**config)
    except (TypeError, ValueError) as error:  # a field that this version does not have, or a value that it refuses
        return f"written by another version of this project ({error!s:.300})"
    return ""


def wrong_tokenizer(tokenizer: Any) -> str:
    files = tokenizer.get("files") if isinstance(tokenizer, dict) else None
    if not isinstance(files, dict) or not isinstance(files.get("tokenizer.json"), str):
        return "tokenizer.files holds no tokenizer.json"
    for name, text in files.items():
        if not (isinstance(name, str) and re.fullmatch(FILE_NAME, name) and isinstance(text, str)):
            return f"tokenizer.files: {name!r:.60} is not a file name with a text"
    return "" if isinstance(tokenizer.get("fingerprint"), str) else "tokenizer.fingerprint is not text"


def wrong_model(state: Any) -> str:
    if not isinstance(state, dict) or not 0 < len(state) <= MOST_TENSORS:
        return "model is not a dict of tensors"
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            return f"model: {name!r:.80} is not a tensor with a name"
        if problem := wrong_tensor(tensor):
            return f"model: {printable(name):.80} is {problem}"
    return ""


def wrong_tensor(tensor: torch.Tensor) -> str:
    """Why this is no tensor of weights, in a few words; "" if it is one: dense, floating point, on the CPU, in memory
    of its own size."""
    if tensor.layout != torch.strided:
        return f"{tensor.layout}, not dense"
    if tensor.dtype not in DTYPES:
        return f"of type {tensor.dtype}"
    if tensor.device.type != "cpu":
        return f"on the device {tensor.device.type}"
    if tensor.is_nested or tensor.is_quantized:
        return "nested or quantised"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "expanded: it has more elements than the file"
    return ""


def wrong_lineage(lineage: Any) -> str:
    if lineage is None:
        return ""
    if not isinstance(lineage, list) or not all(isinstance(entry, dict) for entry in lineage):
        return "lineage is not a list of entries"
    if not all(is_plain(entry) for entry in lineage):
        return "lineage holds more than texts, numbers and lists"
    return next(filter(None, map(wrong_entry, lineage)), "")


def wrong_entry(entry: dict[str, Any]) -> str:
    """The known fields of a stage have their types; other ones may be added by later versions."""
    for name, kinds in ENTRY.items():
        if name in entry and not isinstance(entry[name], (*kinds, type(None))):
            return f"lineage: {name} is not {' or '.join(kind.__name__ for kind in kinds)}"
    return ""


def wrong_adapter(adapter: Any) -> str:
    if not isinstance(adapter, dict) or not is_plain(adapter):
        return "adapter is not a dict of texts and numbers"
    try:
        LoRAConfig(**{name: adapter[name] for name in ("rank", "alpha", "dropout", "targets")})
    except (KeyError, UserError) as error:
        return f"written by another version of this project ({error!s:.300})"
    wrong = [name for name in ("parent", "parent_fingerprint") if not is_name(adapter.get(name))]
    return f"adapter.{wrong[0]} is not a name" if wrong else ""


def wrong_license(license: Any) -> str:
    return "" if license is None or is_name(license) else "license is not a name"


def is_name(value: Any) -> bool:
    """Whether it is text that can be the name of a file."""
    if not isinstance(value, str) or not 0 < len(value) <= 1024 or "\0" in value:
        return False
    try:
        return all(len(os.fsencode(part)) <= 255 for part in Path(value).parts)
    except UnicodeEncodeError:  # half a character
        return False


def is_plain(value: Any, depth: int = DEEPEST) -> bool:
    """Whether a value consists of what JSON can hold, and not too deeply."""
    if isinstance(value, dict) and depth:
        return all(isinstance(key, str) and is_plain(entry, depth - 1) for key, entry in value.items())
    if isinstance(value, (list, tuple)) and depth:
        return all(is_plain(entry, depth - 1) for entry in value)
    if isinstance(value, str):
        return len(value) <= LONGEST
    if isinstance(value, int):
        return abs(value) < 2**63
    return value is None or isinstance(value, float)


def as_printable(value: Any) -> Any:
    """The value with the control characters of all its texts spelled out."""
    if isinstance(value, dict):
        return {as_printable(key): as_printable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_printable(entry) for entry in value]
    return printable(value) if isinstance(value, str) else value


CHECKS = {
    "stage": wrong_stage,
    "config": wrong_config,
    "tokenizer": wrong_tokenizer,
    "model": wrong_model,
    "lineage": wrong_lineage,
    "adapter": wrong_adapter,
    "license": wrong_license,
}
