"""Examples of a dataset: documents, chats, pairs of answers and prompts; their hashes and batches.

Read next: read_examples.py (rows -> examples), validation_split.py (train or validation).
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from corpus.chats import Message, chat_text
from corpus.language import LANGUAGES
from model.chatml import PART_KEYS

BATCH_EXAMPLES, BATCH_CHARACTERS = 1000, 500_000

Item = TypeVar("Item")


@dataclass(frozen=True)
class TextExample:
    """A document, with its position in the input files."""

    text: str
    language: str
    split_hash: int  # 64-bit hash of the text; chooses the split
    file: str
    line: int
    source: str = ""  # the row's value under the source key, or the file name

    content_hash: ClassVar[int] = 0  # not used: documents do not share a question


@dataclass(frozen=True)
class ChatExample:
    """A chat. `text` is all its messages, for statistics."""

    messages: list[Message]
    text: str = ""
    language: str = "en"
    split_hash: int = 0  # 64-bit hash of the first question; chooses the split
    content_hash: int = 0  # 64-bit hash of all messages
    file: str = ""
    line: int = 0

    kind: ClassVar[str] = "chats"  # "kind" in the meta.json of the token folder

    def to_row(self) -> dict[str, Any]:
        """The example as a row of train.jsonl or val.jsonl."""
        return {"messages": self.messages, "lang": self.language}

    @classmethod
    def from_row(cls, row: dict[str, Any], file: str, line: int) -> "ChatExample":
        """The example of a row that `to_row` made. Raises ValueError, TypeError, … for any other row."""
        return cls(row["messages"], chat_text(row["messages"]), known_language(row), file=file, line=line)


@dataclass(frozen=True)
class PairExample:
    """A prompt with a better and a worse answer. `text` is all their messages, for statistics."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    text: str = ""
    language: str = "en"
    split_hash: int = 0
    content_hash: int = 0
    file: str = ""
    line: int = 0

    kind: ClassVar[str] = "pairs"

    @property
    def answers(self) -> tuple[list[Message], list[Message]]:
        return self.chosen, self.rejected

    def to_row(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected, "lang": self.language}

    @classmethod
    def from_row(cls, row: dict[str, Any], file: str, line: int) -> "PairExample":
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
        text = chat_text([*prompt, *chosen, *rejected])
        return cls(prompt, chosen, rejected, text, known_language(row), file=file, line=line)


@dataclass(frozen=True)
class PromptExample:
    """A prompt with the reference of its answer. `text` is both, for statistics."""

    messages: list[Message]
    reference: str
    text: str = ""
    language: str = "en"
    split_hash: int = 0  # 64-bit hash of the first question; chooses the split
    content_hash: int = 0  # 64-bit hash of all messages
    file: str = ""
    line: int = 0

    kind: ClassVar[str] = "prompts"

    def to_row(self) -> dict[str, Any]:
        """The example as a row of train.jsonl or val.jsonl, which prompt_data.py reads."""
        return {"messages": self.messages, "reference": self.reference, "language": self.language}


def known_language(row: dict[str, Any]) -> str:
    """The language of a stored row. Raises ValueError for another text, since it becomes part of a file name."""
    if row["lang"] not in LANGUAGES:
        raise ValueError(row["lang"])
    return row["lang"]


# ---- hashes and batches ----------------------------------------------------------------------------------------------
def text_hash(text: str) -> int:
    """64-bit hash of a text, equal on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def messages_hash(messages: Iterable[Message]) -> int:
    """64-bit hash of the roles, contents, weights and other parts of all messages."""
    return text_hash("\0".join(map(_message_key, messages)))


def _message_key(message: Message) -> str:
    parts = {key: message[key] for key in PART_KEYS if key in message} if len(message) > 2 else {}
    key = f"{message['role']}{message.get('weight', '')}\0{message['content']}"
    return f"{key}\0{json.dumps(parts, ensure_ascii=False)}" if parts else key


def question_hash(messages: list[Message]) -> int:
    """64-bit hash of a chat's first question."""
    return text_hash(next(message["content"] for message in messages if message["role"] == "user"))


def next_batch(items: Iterator[Item], length: Callable[[Any], int] = lambda item: len(item.text)) -> list[Item]:
    """Pull the next items: BATCH_EXAMPLES, or fewer if they have BATCH_CHARACTERS characters; [] at the end."""
    batch: list[Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += length(item)
        if len(batch) >= BATCH_EXAMPLES or characters >= BATCH_CHARACTERS:
            break
    return batch
