"""Examples of a dataset: documents, chats and pairs of answers, read from the rows of files without exact duplicates.

    read_documents(paths, stats)        -> TextExample    for `data_process.py pretrain`
    read_chat_examples(paths, stats)    -> ChatExample    for `sft`
    read_pair_examples(paths, stats)    -> PairExample    for `dpo`
    next_batch(examples)                -> a list of up to 1,000 examples or 500,000 characters

Duplicates are recognised by 64-bit hashes, which take about 80 bytes per example.
Read next: readers.py (files -> rows), row_text.py (row -> text, chat or pair), validation_split.py.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from corpus.chats import Message, chat_text, is_trained, trim_unanswered
from corpus.language import LANGUAGES, detect_language
from corpus.readers import PathLike, read_contents
from corpus.row_text import DEFAULT_READER, RowReader
from corpus.stats import DataStats

BATCH_EXAMPLES, BATCH_CHARACTERS = 1000, 500_000
FILE_AS_SOURCE = "file"  # a source_key: the file name is the source

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
    command: ClassVar[str] = "sft"  # of data_process.py

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
    command: ClassVar[str] = "dpo"

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


def known_language(row: dict[str, Any]) -> str:
    """The language of a stored row. Raises ValueError for another text, since it becomes part of a file name."""
    if row["lang"] not in LANGUAGES:
        raise ValueError(row["lang"])
    return row["lang"]


# ---- rows -> examples ------------------------------------------------------------------------------------------------
def read_documents(
    paths: Iterable[PathLike], stats: DataStats, source_key: str = "", reader: RowReader = DEFAULT_READER
) -> Iterator[TextExample]:
    """Yield the documents of the files. A chat is one document: its text without role markers.

    `source_key`: the row key that holds the source, "file" for the file name, or "" for no sources.
    Raises UserError if a file has rows but no usable one, or if too many rows are bad.
    """
    seen: set[int] = set()
    for file, line, row, content in read_contents(paths, stats, "text", reader.read_text):
        unused = [key for key in content.unused if key != source_key]
        if content.changes or unused:
            stats.row_changed(content.changes, unused, file, line)
        split_hash = text_hash(content.text)
        if split_hash in seen:
            stats.row_dropped("exact duplicate", file, line)
            continue
        seen.add(split_hash)
        source = row.get(source_key) if source_key and isinstance(row, dict) else ""
        if source_key == FILE_AS_SOURCE:
            source = Path(file).name.split(".")[0]
        source = source if isinstance(source, str) else ""
        yield TextExample(content.text, detect_language(content.text), split_hash, file, line, source)


def read_chat_examples(
    paths: Iterable[PathLike], stats: DataStats, reader: RowReader = DEFAULT_READER, only: str = ""
) -> Iterator[ChatExample]:
    """Yield the chats of the files, each cut after its last answer. Chats without an answer are dropped.

    `only`: "single" keeps chats of one turn, "multi" chats of several turns.
    """
    seen: set[int] = set()
    for file, line, _, content in read_contents(paths, stats, "chat", reader.read_chat):
        messages = trim_unanswered(content.messages)
        content_hash = messages_hash(messages)
        reason = _chat_drop_reason(messages, only) or ("exact duplicate" if content_hash in seen else "")
        if reason:
            stats.row_dropped(reason, file, line)
            continue
        seen.add(content_hash)
        stats.row_changed(content.changes, content.unused, file, line)
        if len(messages) < len(content.messages):
            stats.row_truncated("without its last question, which has no answer", file, line)
        text = content.text if messages is content.messages else chat_text(messages)
        yield ChatExample(messages, text, detect_language(text), question_hash(messages), content_hash, file, line)


def _chat_drop_reason(messages: list[Message], only: str) -> str:
    """Why a chat is left out; "" if it is kept."""
    if not any(map(is_trained, messages)):
        return "no answer, so nothing to train on"
    turns = sum(message["role"] == "user" for message in messages)
    if only == "multi" and turns == 1:
        return "of one turn (--only multi)"
    return "of several turns (--only single)" if only == "single" and turns != 1 else ""


def read_pair_examples(
    paths: Iterable[PathLike], stats: DataStats, reader: RowReader = DEFAULT_READER
) -> Iterator[PairExample]:
    """Yield the pairs of the files; pairs with equal answers are dropped and counted.

    As for chats, the first question determines the split: a question held out by SFT is held out here as well.
    """
    seen: set[int] = set()
    for file, line, _, content in read_contents(paths, stats, "pair", reader.read_pair):
        prompt, (chosen, rejected) = content.messages, content.answers
        content_hash = text_hash(json.dumps([prompt, chosen, rejected], ensure_ascii=False))
        if content_hash in seen:
            stats.row_dropped("exact duplicate", file, line)
            continue
        seen.add(content_hash)
        stats.row_changed(content.changes, content.unused, file, line)
        hashes = question_hash(prompt), content_hash
        yield PairExample(prompt, chosen, rejected, content.text, detect_language(content.text), *hashes, file, line)


# ---- hashes and batches ----------------------------------------------------------------------------------------------
def text_hash(text: str) -> int:
    """64-bit hash of a text, equal on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def messages_hash(messages: Iterable[Message]) -> int:
    """64-bit hash of the roles, contents and weights of all messages."""
    return text_hash("\0".join(f"{turn['role']}{turn.get('weight', '')}\0{turn['content']}" for turn in messages))


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
