"""Validate the content of a .pth before a model is built from it: types, names, shapes and sizes.

    {format, stage, config, tokenizer: {fingerprint, files: {name: text}}, model: {name: tensor}, lineage: [dict]}
    and optionally adapter {rank, alpha, dropout, targets, parent, parent_fingerprint}, license

Files may be damaged, foreign or malicious, so no type is assumed. Shapes are compared with a model on the meta device:
a config of any size allocates no memory.
Called by checkpoint.read_checkpoint. Read next: config.py (the limits of the config), checkpoint.py.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from common.errors import UserError, escape_controls
from model.config import ModelConfig
from model.lora import LoRAConfig
from model.transformer import Decoder

CHECKPOINT_FORMAT = 1
REQUIRED_KEYS = {"format", "stage", "config", "tokenizer", "model"}
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STAGE_PATTERN = r"[a-z][a-z0-9_]{0,63}"
FILE_NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
MAX_TENSORS = 2**20
MAX_LINEAGE_DEPTH = 8  # nesting levels of a lineage entry
MAX_LINEAGE_TEXT = 100_000  # characters of a string in a lineage

LINEAGE_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("stage", "data", "source", "model_type", "data_history", "stopped"), (str,)),
    **dict.fromkeys(("steps", "tokens", "pairs", "seed"), (int,)),
    **dict.fromkeys(("seconds", "loss", "learning_rate"), (int, float)),
    "validation": (dict,),
}

Checkpoint = dict[str, Any]


def check_checkpoint(content: Any, path: str | os.PathLike[str]) -> Checkpoint:
    """Validate a checkpoint; returns it with all config fields and with control characters in its lineage escaped.

    Raises UserError with the file and the first invalid field.
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
    state: dict[str, torch.Tensor] = content["model"]
    if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > 2 * Path(path).stat().st_size:
        raise UserError(f"{path}: its tensors overlap in the file: the file is damaged or foreign")
    lineage = [escape_controls_in(entry) for entry in content.get("lineage") or []]
    return {**content, "config": ModelConfig(**content["config"]).to_dict(), "lineage": lineage}


def check_encodable_path(path: str | os.PathLike[str]) -> None:
    """Raises UserError if the file name is not valid UTF-8, which torch requires."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: the name is not UTF-8, torch cannot open it: rename the file or its folder") from None


class _NoInit(TorchFunctionMode):
    """The functions of torch.nn.init return their tensor as it is.

    The meta device has nothing to initialize, and torch would import torch._dynamo for it, which takes a second.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def check_shapes(config: ModelConfig, state: dict[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Raises UserError unless the tensors have the names and shapes of a model of this config. Allocates no memory."""
    # Each layer and each expert has at least one tensor. Comparing the counts first bounds the time of this function.
    min_tensors = config.n_layers * (config.n_shared_experts + config.n_routed_experts if config.use_moe else 1)
    if min_tensors > len(state):
        raise UserError(f"{path} does not fit the model: {len(state)} tensors are not {config.n_layers} layers")
    with torch.device("meta"), _NoInit():
        expected = {f"model.{name}": tensor for name, tensor in Decoder(config).state_dict().items()}
    if not config.tie_embeddings or "lm_head.weight" in state:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]  # of equal shape
    check_state_names(expected, state, path)


def check_ranks(state: dict[str, torch.Tensor], rank: int, path: str | os.PathLike[str]) -> None:
    """Raises UserError unless all matrices A of an adapter have the rank of its settings."""
    ranks = {tensor.shape[0] for name, tensor in state.items() if name.endswith(".lora_A.weight") and tensor.dim()}
    if ranks != {rank}:
        raise UserError(f"{path} does not fit: it holds matrices of rank {sorted(ranks)}, the adapter says {rank}")


def check_state_names(
    expected: dict[str, torch.Tensor], state: dict[str, torch.Tensor], path: str | os.PathLike[str]
) -> None:
    """Raises UserError, listing up to five differences, if names or shapes differ from the model's."""
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


def stage_problem(stage: Any) -> str:
    return "" if isinstance(stage, str) and re.fullmatch(STAGE_PATTERN, stage) else "stage is not a name of a stage"


def config_problem(config: Any) -> str:
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        return "config is not a dict of numbers by name"
    try:
        ModelConfig(**config)
    except (TypeError, ValueError) as error:  # an unknown field or an invalid value
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
    """Why the tensor is not a valid weight, or "": it must be dense, floating point, on the CPU, and not expanded."""
    if tensor.layout != torch.strided:
        return f"{tensor.layout}, not dense"
    if tensor.dtype not in WEIGHT_DTYPES:
        return f"of type {tensor.dtype}"
    if tensor.device.type != "cpu":
        return f"on the device {tensor.device.type}"
    if tensor.is_nested or tensor.is_quantized:
        return "nested or quantised"
    is_expanded = tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    return "expanded: it has more elements than the file" if is_expanded else ""


def lineage_problem(lineage: Any) -> str:
    if lineage is None:
        return ""
    if not isinstance(lineage, list) or not all(isinstance(entry, dict) for entry in lineage):
        return "lineage is not a list of entries"
    if not all(is_json_value(entry) for entry in lineage):
        return "lineage holds more than texts, numbers and lists"
    for entry in lineage:  # unknown fields are allowed: later versions may add some
        for name, types in LINEAGE_FIELD_TYPES.items():
            if not isinstance(entry.get(name), (*types, type(None))):
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


def is_file_name(value: Any) -> bool:
    """Whether the value is a string that can be a file name."""
    if not isinstance(value, str) or not 0 < len(value) <= 1024 or "\0" in value:
        return False
    try:
        return all(len(os.fsencode(key)) <= 255 for key in Path(value).parts)
    except UnicodeEncodeError:  # a lone surrogate
        return False


def is_json_value(value: Any, depth: int = MAX_LINEAGE_DEPTH) -> bool:
    """Whether a value is JSON data of at most `depth` levels, with strings and integers of limited size."""
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
    """The value with control characters escaped in all its strings."""
    if isinstance(value, dict):
        return {escape_controls_in(key): escape_controls_in(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [escape_controls_in(entry) for entry in value]
    return escape_controls(value) if isinstance(value, str) else value


KEY_CHECKS: dict[str, Callable[[Any], str]] = {
    "stage": stage_problem,
    "config": config_problem,
    "tokenizer": tokenizer_problem,
    "model": state_problem,
    "lineage": lineage_problem,
    "adapter": adapter_problem,
    "license": lambda name: "" if name is None or is_file_name(name) else "license is not a name",
}
