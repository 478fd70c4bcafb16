"""Prompts with references, for training with rewards: their rows and the reader of their folder.

    dataset/rl/train.jsonl, val.jsonl    {"messages": [..., the last one of role user or tool], "reference": "42",
                                          "language": "zh" or "en"}
    dataset/rl/meta.json                 kind "prompts", rows and checksums of both files

The rows hold no tokens: a prompt is rendered when it is trained on.
Read next: prepare_prompts.py (writes the folder), ../trainer/rewards.py (compares an answer with its reference).
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import PathLike
from corpus.dataset_meta import PREPARE_COMMANDS, read_checked_meta
from corpus.language import LANGUAGES
from model.chat_template import Message

PROMPT_ROLES = ("user", "tool")  # of the last message of a prompt
PREPARE_COMMAND = PREPARE_COMMANDS["prompts"]


@dataclass(frozen=True)
class PromptRow:
    """A prompt and the reference of its answer. `file`, `line`: where the row stands, for messages about it."""

    messages: list[Message]
    reference: str
    language: str = "en"
    file: str = ""
    line: int = 0

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The tools that the system message offers, as JSON schemas; [] without tools."""
        return self.messages[0].get("tools") or []


def prompt_row(row: Any, file: str, line: int) -> PromptRow:
    """The prompt of a row of train.jsonl or val.jsonl. Raises ValueError, TypeError or KeyError for any other row."""
    messages, reference, language = row["messages"], row["reference"], row["language"]
    if language not in LANGUAGES or not isinstance(reference, str) or messages[-1]["role"] not in PROMPT_ROLES:
        raise ValueError("not a prompt with a reference")
    if not all(isinstance(message["content"], str) and isinstance(message["role"], str) for message in messages):
        raise TypeError("a message without text")
    return PromptRow(messages, reference, language, file, line)


def read_prompts(folder: PathLike, split: str) -> list[PromptRow]:
    """Read the prompts of a split ("train" or "val") of a folder of `data_process.py rl`; "val" may have none.

    Raises UserError with the command to run if the folder is missing, damaged or of another kind of data.
    """
    path = Path(folder) / f"{split}.jsonl"
    size, checksum = read_prompts_meta(folder)["checksums"][path.name]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): run `{PREPARE_COMMAND}` again") from None
    if len(data) != size or f"{zlib.crc32(data):08x}" != checksum:
        raise UserError(
            f"{path} is damaged (it differs from its checksum in meta.json): run `{PREPARE_COMMAND}` again; if you "
            "edited rows by hand, pass the edited file as FILES"
        )
    try:
        return [prompt_row(json.loads(line), str(path), number) for number, line in enumerate(data.splitlines(), 1)]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise UserError(f"{path}: not rows that data_process.py wrote: run `{PREPARE_COMMAND}` again") from None


def read_prompts_meta(folder: PathLike) -> dict[str, Any]:
    """Read the meta.json of a folder of prompts. Raises UserError if it is missing, damaged or of another kind."""
    meta = read_checked_meta(folder)
    if meta is None:
        raise UserError(f"no prompts in {folder}: run `{PREPARE_COMMAND}` first")
    if meta.get("kind") != "prompts":
        raise UserError(f"{folder} holds other data than prompts ({meta.get('kind')}): run `{PREPARE_COMMAND}` first")
    return meta


def prompts_fingerprint(folder: PathLike, split: str = "train") -> str:
    """Fingerprint of the prompts of a split, independent of the folder's location: bytes and CRC-32 of its file."""
    size, checksum = read_prompts_meta(folder)["checksums"][f"{split}.jsonl"]
    return f"{size:x}-{checksum}"
