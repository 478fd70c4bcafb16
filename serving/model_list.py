"""What stands in out/: every model there, explained in a few numbers. Reads headers and reports, never whole models.

    out/full_sft_512.pth        a checkpoint (an adapter counts: it finds its parent when it is opened)
    out/demo/dpo_256.pth        one folder further down
    out/exported/               a transformers folder

Temporary files and folders of data are no models. A file that cannot be read stays on the shelf with its error, so
that the page can say what is wrong with it. The last stage of the chain stands first, never the newest file.
Called by page.py. Read next: ../export/model_facts.py (where the numbers come from).
"""

import functools
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from export.model_facts import model_facts
from model.checkpoint import PARENT_STAGES
from model.config import ModelConfig
from model.rope import extend_context
from model.rope_flags import RopeScaling

STAGE_ORDER = list(PARENT_STAGES)


@dataclass(frozen=True)
class ModelEntry:
    """A model on the shelf. Where the file could not be read `error` says why, and the rest is empty."""

    path: Path
    name: str  # as the page calls it: the path inside out/, without .pth; of a folder with a / behind it
    error: str = ""
    facts: dict[str, Any] = field(default_factory=dict)  # see export/model_facts.py

    @property
    def stage(self) -> str:
        return self.facts.get("stage", "")

    @property
    def is_chat_model(self) -> bool:
        """A pretrained model goes on with a text; the others answer."""
        return self.stage != "pretrain" and bool(self.facts.get("chat_format"))

    @property
    def max_seq_len(self) -> int:
        return self.facts["config"]["max_seq_len"]

    @property
    def scores(self) -> list[tuple[str, dict[str, float]]]:
        """(what, {language: value}): "accuracy:NAME" of the reports beside it, longest first, or its validation."""
        reports = sorted(self.facts.get("scores", ()), key=lambda score: -sum(score["questions"].values()))
        if reports:
            return [(f"accuracy:{score['name']}", score["accuracy"]) for score in reports]
        validation = self.facts.get("validation", {})
        return [(name, validation[name]) for name in ("val_reward_accuracy", "bits_per_byte") if validation.get(name)][
            :1
        ]


def file_version(path: Path) -> tuple[int, int]:
    """Changes when a training run replaces the file. Raises OSError when it is gone."""
    status = (path / "config.json" if path.is_dir() else path).stat()
    return status.st_mtime_ns, status.st_size


def with_rope_scaling(model: ModelEntry, rope: RopeScaling | None) -> ModelEntry:
    """The model with the length that --rope_scaling gives it; with an error where it cannot be scaled."""
    if not rope or model.error:
        return model
    try:
        config = extend_context(ModelConfig(**model.facts["config"]), *rope)
    except UserError as error:
        return replace(model, error=f"{model.path}: {error}")
    return replace(model, facts={**model.facts, "config": config.to_dict()})


def find_models(out_dir: Path) -> list[Path]:
    """The models in a folder and in its folders: nearest first, then the latest stage, then by name."""

    def sort_key(path: Path) -> tuple[int, int, str]:
        stage = next((i for i, stage in enumerate(STAGE_ORDER) if path.name.startswith(f"{stage}_")), -1)
        return len(path.parts), -stage, str(path)

    found = (path for pattern in ("*", "*/*") for path in Path(out_dir).glob(pattern))
    return sorted((path for path in found if is_model(path)), key=sort_key)


def is_model(path: Path) -> bool:
    if path.name.startswith("."):  # a file that is being written
        return False
    if path.is_dir():
        return (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    return path.suffix == ".pth" and path.is_file()


def list_models(out_dir: Path, files: tuple[Path, ...] = ()) -> list[ModelEntry]:
    """The models in `out_dir`, or those files and folders, each called by what tells it from the others."""
    if not files:
        return [read_model_entry(path, out_dir) for path in find_models(out_dir)]
    paths = list(dict.fromkeys(path.absolute() for path in files))
    try:
        root = Path(os.path.commonpath([path.parent for path in paths]))
    except ValueError:  # Windows: on different drives
        root = out_dir
    return [read_model_entry(path, root) for path in paths]


def read_model_entry(path: Path, root: Path) -> ModelEntry:
    """A model as it stands on the shelf. Raises nothing for a bad file: see `error`."""
    path = Path(path)
    shown_path = path.relative_to(root) if path.is_relative_to(root) else path
    name = str(shown_path).removesuffix(".pth") + "/" * path.is_dir()
    try:
        reports = tuple(sorted((str(report), file_version(report)) for report in path.parent.glob("*.json")))
        return _read_model_entry(path, name, (file_version(path), reports))
    except OSError as error:
        return ModelEntry(path, name, f"{path}: {error.strerror or error}")


@functools.lru_cache(maxsize=256)
def _read_model_entry(path: Path, name: str, _: tuple[Any, ...]) -> ModelEntry:
    try:
        return ModelEntry(path, name, facts=model_facts(path))
    except UserError as error:
        return ModelEntry(path, name, str(error))
