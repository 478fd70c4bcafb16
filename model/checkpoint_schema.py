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

from common.errors import UserError, escape_controls
from model.config import ModelConfig
from model.lora import LoRAConfig
from model.transformer import Transformer

CHECKPOINT_FORMAT = 1
REQUIRED_KEYS = {"format", "stage", "config", "tokenizer", "model"}
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STAGE_PATTERN = r"[a-z][a-z0-9_]{0,63}"
FILE_NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
MAX_TENSORS = 2**20
MAX_LINEAGE_DEPTH = 8  # levels of a lineage's entry
MAX_LINEAGE_TEXT = 100_000  # characters of one text in a lineage

LINEAGE_FIELD_TYPES: dict[str, tuple[type, ...]] = {
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
    if not isinstance(content, dict) or not content.keys() >= REQUIRED_KEYS:
        raise UserError(f"{path} is not a model of this project: it lacks one of {', '.join(sorted(REQUIRED_KEYS))}")
    if content["format"] != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path} has format {content['format']!r:.40}, this version reads {CHECKPOINT_FORMAT}: train it again"
        )
    for key, check in KEY_CHECKS.items():
        if key in content and (problem := check(content[key])):
            raise UserError(f"{path}: {problem}: the file is damaged or foreign")
    if state_bytes(content["model"]) > 2 * Path(path).stat().st_size:
        raise UserError(f"{path}: its tensors overlap in the file: the file is damaged or foreign")
    lineage = [escape_controls_in(entry) for entry in content.get("lineage") or []]
    return {**content, "config": ModelConfig(**content["config"]).to_dict(), "lineage": lineage}


def check_encodable_path(path: str | os.PathLike[str]) -> None:
    """Raises UserError for a name that torch, which opens files by UTF-8 names, cannot open."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: the name is not UTF-8, torch cannot open it: rename the file or its folder") from None


def check_shapes(config: ModelConfig, state: dict[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Raises UserError unless the tensors have the names and shapes of a model of this config. Allocates nothing.

    A layer, and an expert, have a tensor at least: counting them first bounds the time that this takes.
    """
    min_tensors = config.n_layers * (config.n_shared_experts + config.n_routed_experts if config.use_moe else 1)
    if min_tensors > len(state):
        raise UserError(f"{path} does not fit the model: {len(state)} tensors are not {config.n_layers} layers")
    with torch.device("meta"):
        model = Transformer(config)
    expected = dict(model.state_dict())
    if config.tie_embeddings and "lm_head.weight" not in state:
        expected.pop("lm_head.weight")
    check_state_names(expected, state, path)


def check_ranks(state: dict[str, torch.Tensor], rank: int, path: str | os.PathLike[str]) -> None:
    """Raises UserError unless the matrices A of an adapter have its rank; new ones are as large as it says."""
    ranks = {tensor.shape[0] for name, tensor in state.items() if name.endswith(".lora_A.weight") and tensor.dim()}
    if ranks != {rank}:
        raise UserError(f"{path} does not fit: it holds matrices of rank {sorted(ranks)}, the adapter says {rank}")


def check_state_names(
    expected: dict[str, torch.Tensor], state: dict[str, torch.Tensor], path: str | os.PathLike[str]
) -> None:
    """Raises UserError listing what differs between the model's names and shapes and those of a file."""
    differences = [f"missing {name}" for name in expected.keys() - state.keys()]
    differences += [f"unknown {escape_controls(name)}" for name in state.keys() - expected.keys()]
    differences += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if expected[name].shape != state[name].shape
    ]
    if differences:
        shown = "; ".join(sorted(differences)[:5])
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise UserError(f"{path} does not fit the model: {shown}{more}")


def state_bytes(state: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def stage_problem(stage: Any) -> str:
    return "" if isinstance(stage, str) and re.fullmatch(STAGE_PATTERN, stage) else "stage is not a name of a stage"


def config_problem(config: Any) -> str:
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        return "config is not a dict of numbers by name"
    try:
        ModelConfig(**config)
    except (TypeError, ValueError) as error:  # a field that this version does not have, or a value that it refuses
        return f"written by another version of this project ({error!s:.300})"
    return ""


def tokenizer_problem(tokenizer: Any) -> str:
    files = tokenizer.get("files") if isinstance(tokenizer, dict) else None
    if not isinstance(files, dict) or not isinstance(files.get("tokenizer.json"), str):
        return "tokenizer.files holds no tokenizer.json"
    for name, text in files.items():
        if not (isinstance(name, str) and re.fullmatch(FILE_NAME_PATTERN, name) and isinstance(text, str)):
            return f"tokenizer.files: {name!r:.60} is not a file name with a text"
    return "" if isinstance(tokenizer.get("fingerprint"), str) else "tokenizer.fingerprint is not text"


def state_problem(state: Any) -> str:
    if not isinstance(state, dict) or not 0 < len(state) <= MAX_TENSORS:
        return "model is not a dict of tensors"
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            return f"model: {name!r:.80} is not a tensor with a name"
        if problem := tensor_problem(tensor):
            return f"model: {escape_controls(name):.80} is {problem}"
    return ""


def tensor_problem(tensor: torch.Tensor) -> str:
    """Why this is no tensor of weights, in a few words; "" if it is one: dense, floating point, on the CPU, in memory
    of its own size."""
    if tensor.layout != torch.strided:
        return f"{tensor.layout}, not dense"
    if tensor.dtype not in WEIGHT_DTYPES:
        return f"of type {tensor.dtype}"
    if tensor.device.type != "cpu":
        return f"on the device {tensor.device.type}"
    if tensor.is_nested or tensor.is_quantized:
        return "nested or quantised"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "expanded: it has more elements than the file"
    return ""


def lineage_problem(lineage: Any) -> str:
    if lineage is None:
        return ""
    if not isinstance(lineage, list) or not all(isinstance(entry, dict) for entry in lineage):
        return "lineage is not a list of entries"
    if not all(is_json_value(entry) for entry in lineage):
        return "lineage holds more than texts, numbers and lists"
    return next(filter(None, map(entry_problem, lineage)), "")


def entry_problem(entry: dict[str, Any]) -> str:
    """The known fields of a stage have their types; other ones may be added by later versions."""
    for name, types in LINEAGE_FIELD_TYPES.items():
        if name in entry and not isinstance(entry[name], (*types, type(None))):
            return f"lineage: {name} is not {' or '.join(kind.__name__ for kind in types)}"
    return ""


def adapter_problem(adapter: Any) -> str:
    if not isinstance(adapter, dict) or not is_json_value(adapter):
        return "adapter is not a dict of texts and numbers"
    try:
        LoRAConfig(**{name: adapter[name] for name in ("rank", "alpha", "dropout", "targets")})
    except (KeyError, UserError) as error:
        return f"written by another version of this project ({error!s:.300})"
    wrong = [name for name in ("parent", "parent_fingerprint") if not is_file_name(adapter.get(name))]
    return f"adapter.{wrong[0]} is not a name" if wrong else ""


def license_problem(license: Any) -> str:
    return "" if license is None or is_file_name(license) else "license is not a name"


def is_file_name(value: Any) -> bool:
    """Whether it is text that can be the name of a file."""
    if not isinstance(value, str) or not 0 < len(value) <= 1024 or "\0" in value:
        return False
    try:
        return all(len(os.fsencode(key)) <= 255 for key in Path(value).parts)
    except UnicodeEncodeError:  # half a character
        return False


def is_json_value(value: Any, depth: int = MAX_LINEAGE_DEPTH) -> bool:
    """Whether a value consists of what JSON can hold, and not too deeply."""
    if isinstance(value, dict) and depth:
        return all(isinstance(key, str) and is_json_value(entry, depth - 1) for key, entry in value.items())
    if isinstance(value, (list, tuple)) and depth:
        return all(is_json_value(entry, depth - 1) for entry in value)
    if isinstance(value, str):
        return len(value) <= MAX_LINEAGE_TEXT
    if isinstance(value, int):
        return abs(value) < 2**63
    return value is None or isinstance(value, float)


def escape_controls_in(value: Any) -> Any:
    """The value with the control characters of all its texts spelled out."""
    if isinstance(value, dict):
        return {escape_controls_in(key): escape_controls_in(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [escape_controls_in(entry) for entry in value]
    return escape_controls(value) if isinstance(value, str) else value


KEY_CHECKS = {
    "stage": stage_problem,
    "config": config_problem,
    "tokenizer": tokenizer_problem,
    "model": state_problem,
    "lineage": lineage_problem,
    "adapter": adapter_problem,
    "license": license_problem,
}
