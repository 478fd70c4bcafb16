"""Rows -> items, each with its language and its side: exact duplicates out, a validation split set aside.

    validation if blake2b(content) / 2^64 < val_share, for each language by itself

The side depends on the content alone, never on the order of the files: the same text is on the same side in every data
set. For chats the content is the first question, so that no question is both trained and tested; only where one
question opens more than 20 chats ("Hi"), the whole chat decides for those after the 20th. In small data sets more are
held out: of n items of a language at least min(20, n / 20) are validation items, those of lowest hash.

Read next: readers.py (where rows come from), preferences.py (pairs of answers), prepare_text.py and prepare_chats.py
(items -> shards).
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from corpus.chats import Message, chat_text, is_trained, trim_unanswered
from corpus.language import LANGUAGES, detect_language
from corpus.readers import PathLike, read_chats, read_texts
from corpus.row_text import DEFAULT_READER, RowReader
from corpus.stats import DataStats

MIN_VALIDATION_EXAMPLES = 20  # validation items of a language; with fewer, a twentieth of its items
MAX_SAME_QUESTION = 20  # chats with one first question; for those beyond it the whole chat decides
BATCH_EXAMPLES, BATCH_CHARACTERS = 1000, 500_000  # handed to the tokenizer at once


@dataclass(frozen=True)
class Example:
    """A document or a chat on its way."""

    text: str
    messages: list[Message]  # empty for plain text; of a pair only what both answers share
    language: str
    split_hash: int  # 64-bit hash that chooses the split
    file: str
    line: int
    answers: tuple[list[Message], ...] = ()  # pairs only: the better answer, the worse one
    content_hash: int = 0  # chats and pairs: 64-bit hash of all messages
    source: str = ""  # texts only, where they are labelled


def text_hash(text: str) -> int:
    """64-bit hash of a text, the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def read_text_examples(
    paths: Iterable[PathLike], report: DataStats, source_key: str = "", reader: RowReader = DEFAULT_READER
) -> Iterator[Example]:
    """All documents of the files, without exact duplicates. Memory: about 80 bytes a document, for the hashes."""
    seen: set[int] = set()
    for document in read_texts(paths, report, source_key, reader):
        key = text_hash(document.text)
        if key in seen:
            report.row_dropped("exact duplicate", document.source_file, document.line)
            continue
        seen.add(key)
        language = detect_language(document.text)
        yield Example(document.text, [], language, key, document.source_file, document.line, source=document.source)


def read_chat_examples(
    paths: Iterable[PathLike], report: DataStats, reader: RowReader = DEFAULT_READER, only: str = ""
) -> Iterator[Example]:
    """All chats of the files that have an answer, up to their last answer, without exact duplicates.

    `only`: "single" keeps chats of one turn, "multi" those of several.
    """
    seen: set[int] = set()
    for chat in read_chats(paths, report, reader):
        location = (chat.source_file, chat.line)
        messages = trim_unanswered(chat.messages)
        if not any(map(is_trained, messages)):
            report.row_dropped("no answer, so nothing to train on", *location)
            continue
        turns = sum(message["role"] == "user" for message in messages)
        if only and (only == "single") != (turns == 1):
            report.row_dropped(
                "of one turn (--only multi)" if turns == 1 else "of several turns (--only single)", *location
            )
            continue
        content_hash = messages_hash(messages)
        if content_hash in seen:
            report.row_dropped("exact duplicate", *location)
            continue
        seen.add(content_hash)
        report.row_changed(chat.content.changes, chat.content.unused, *location)
        if len(messages) < len(chat.messages):
            report.row_truncated("without its last question, which has no answer", *location)
        text = chat.content.text if messages is chat.messages else chat_text(messages)
        yield Example(
            text, messages, detect_language(text), question_hash(messages), *location, content_hash=content_hash
        )


def messages_hash(messages: Iterable[Message]) -> int:
    """The hash of roles, contents and weights of all messages."""
    return text_hash("\0".join(f"{turn['role']}{turn.get('weight', '')}\0{turn['content']}" for turn in messages))


def question_hash(messages: list[Message]) -> int:
    """The hash of a chat's first question."""
    return text_hash(next(message["content"] for message in messages if message["role"] == "user"))


def batch_examples(examples: Iterable[tuple[str, Example]]) -> Iterator[list[tuple[str, Example]]]:
    """Lists of (split, item) of bounded size, in their order."""
    batch: list[tuple[str, Example]] = []
    characters = 0
    for split, example in examples:
        batch.append((split, example))
        characters += len(example.text)
        if len(batch) >= BATCH_EXAMPLES or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def assign_splits(examples: Iterable[Example], val_share: float) -> Iterator[tuple[str, Example]]:
    """(split, item), by the rule at the top of this file: the split is train, val_zh or val_en."""
    for is_validation, example in mark_validation(examples, val_share):
        yield (f"val_{example.language}" if is_validation else "train"), example


def mark_validation(examples: Iterable[Example], val_share: float) -> Iterator[tuple[bool, Example]]:
    """Yields (is_validation, item), by the rule at the top of this file, in one pass.

    Until a language has MIN_VALIDATION_EXAMPLES, as many groups of lowest hash are held back: at the end some of
    them may be needed. Memory: at most MIN_VALIDATION_EXAMPLES * MAX_SAME_QUESTION items of each language.
    """
    limit = val_share * 2.0**64
    question_counts = bytearray(1 << 24 if val_share else 1)  # approximate count of items per hash, 16 MB
    held_back = {language: _HeldBack() for language in LANGUAGES}
    for example in examples:
        held = held_back[example.language]
        held.num_examples += 1
        key = example.split_hash
        if limit and example.content_hash:  # chats and pairs may share their question
            slot = key % len(question_counts)
            if question_counts[slot] >= MAX_SAME_QUESTION:
                key = example.content_hash
            else:
                question_counts[slot] += 1
        if key < limit:
            held.num_validation += 1
            yield True, example
        elif not limit or held.num_validation >= MIN_VALIDATION_EXAMPLES:
            yield False, example
        else:
            yield from ((False, other) for other in held.hold(key, example))
        if held.num_validation >= MIN_VALIDATION_EXAMPLES and held.groups:
            yield from ((False, other) for other in held.release())
    for held in held_back.values():
        chosen = held.choose_validation()
        yield from ((id(example) in chosen, example) for example in held.release())


class _HeldBack:
    """The items of one language that may become validation items and are held back, in groups of one hash."""

    def __init__(self) -> None:
        self.num_examples = self.num_validation = 0  # all items; those that are in the validation split
        self.groups: dict[int, list[Example]] = {}

    def hold(self, key: int, example: Example) -> list[Example]:
        """Hold an item back; returns the items that are training items for certain."""
        if key not in self.groups and len(self.groups) >= MIN_VALIDATION_EXAMPLES:
            highest = max(self.groups)
            if key > highest:
                return [example]
            released = self.groups.pop(highest)
        else:
            released = []
        self.groups.setdefault(key, []).append(example)
        return released

    def release(self) -> list[Example]:
        examples = [example for group in self.groups.values() for example in group]
        self.groups.clear()
        return examples

    def choose_validation(self) -> set[int]:
        """The ids of the held items that go to the validation split, lowest hash first, whole groups where they fit."""
        num_wanted = min(MIN_VALIDATION_EXAMPLES, self.num_examples // MIN_VALIDATION_EXAMPLES) - self.num_validation
        chosen: set[int] = set()
        for key in sorted(self.groups):
            group = self.groups[key]
            if len(chosen) + len(group) <= num_wanted:
                chosen.update(map(id, group))
        if num_wanted > 0 and not chosen:  # every group is too large: one question opens many chats
            group = min(self.groups.values(), key=len, default=[])
            chosen.update(
                id(example) for example in sorted(group, key=lambda example: example.content_hash)[:num_wanted]
            )
        return chosen
