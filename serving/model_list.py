"""List the models in out/ with their facts. Reads headers and reports, never whole models.

    out/full_sft_512.pth        a checkpoint (or an adapter: its parent is found when it is opened)
    out/demo/dpo_256.pth        in a subfolder, one level deep
    out/exported/               a transformers folder

Temporary files and data folders are skipped. A file that cannot be read is listed with its error, which the page
shows. The last stage of the chain is listed first, never the newest file.
Called by page.py. Read next: ../export/model_facts.py (where the facts come from).
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
    """A listed model. If its file could not be read, `error` says why and `facts` is empty."""

    path: Path
    name: str  # shown on the page: the path inside out/ without .pth; a folder's ends with /
    error: str = ""
    facts: dict[str, Any] = field(default_factory=dict)  # see export/model_facts.py

    @property
    def stage(self) -> str:
        return self.facts.get("stage", "")

    @property
    def is_chat_model(self) -> bool:
        """False for a pretrained model, which continues a text, and for a model without a chat format."""
        return self.stage != "pretrain" and bool(self.facts.get("chat_format"))

    @property
    def has_tools(self) -> bool:
        """Whether its chat format may have tools and thoughts; a template of an imported model is tried when asked."""
        return self.is_chat_model and self.facts["chat_format"] in ("chatml", "template")

    @property
    def max_seq_len(self) -> int:
        return self.facts["config"]["max_seq_len"]

    @property
    def scores(self) -> list[tuple[str, dict[str, float]]]:
        """[(label, {language: value})]: "accuracy:NAME" of each report beside the model, most questions first.

        Without reports, one validation metric.
        """
        reports = sorted(self.facts.get("scores", ()), key=lambda score: -sum(score["questions"].values()))
        if reports:
            return [(f"accuracy:{score['name']}", score["accuracy"]) for score in reports]
        validation = self.facts.get("validation", {})
        return [(name, validation[name]) for name in ("val_reward_accuracy", "bits_per_byte") if validation.get(name)][
            :1
        ]


def file_version(path: Path) -> tuple[int, int]:
    """(mtime in ns, size), which changes when a training run replaces the file. Raises OSError if it is missing."""
    status = (path / "config.json" if path.is_dir() else path).stat()
    return status.st_mtime_ns, status.st_size


def with_rope_scaling(model: ModelEntry, rope: RopeScaling | None) -> ModelEntry:
    """The model with the context length that --rope_scaling gives it, or with an error if it cannot be scaled."""
    if not rope or model.error:
        return model
    try:
        config = extend_context(ModelConfig(**model.facts["config"]), *rope)
    except UserError as error:
        return replace(model, error=f"{model.path}: {error}")
    return replace(model, facts={**model.facts, "config": config.to_dict()})


def find_models(out_dir: Path) -> list[Path]:
    """The models in a folder and its subfolders, sorted by depth, then latest stage first, then by name."""

    def sort_key(path: Path) -> tuple[int, int, str]:
        stage = next((i for i, stage in enumerate(STAGE_ORDER) if path.name.startswith(f"{stage}_")), -1)
        return len(path.parts), -stage, str(path)

    found = (path for pattern in ("*", "*/*") for path in Path(out_dir).glob(pattern))
    return sorted((path for path in found if is_model(path)), key=sort_key)


def is_model(path: Path) -> bool:
    if path.name.startswith("."):  # a temporary file of a checkpoint that is being written
        return False
    if path.is_dir():
        return (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    return path.suffix == ".pth" and path.is_file()


def list_models(out_dir: Path, files: tuple[Path, ...] = ()) -> list[ModelEntry]:
    """The models in `out_dir`, or `files` instead; their names are the paths below their common folder."""
    if not files:
        return [read_model_entry(path, out_dir) for path in find_models(out_dir)]
    paths = list(dict.fromkeys(path.absolute() for path in files))
    try:
        root = Path(os.path.commonpath([path.parent for path in paths]))
    except ValueError:  # Windows: on different drives
        root = out_dir
    return [read_model_entry(path, root) for path in paths]


def read_model_entry(path: Path, root: Path) -> ModelEntry:
    """Return the entry of a model. A file that cannot be read raises no error; its entry has `error` set."""
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
