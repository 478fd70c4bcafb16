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

from corpus.chats import Message, chat_text, is_trained, whole_turns
from corpus.language import LANGUAGES, language_of
from corpus.readers import Path_, read_chats, read_texts
from corpus.row_text import READER, RowReader
from corpus.stats import DataReport

ENOUGH = 20  # validation items of a language; with fewer, a twentieth of its items
COMMON = 20  # chats with one first question; for those beyond it the whole chat decides
BATCH_ITEMS, BATCH_CHARACTERS = 1000, 500_000  # handed to the tokenizer at once


@dataclass(frozen=True)
class Item:
    """A document or a chat on its way."""

    text: str
    messages: list[Message]  # empty for plain text; of a pair only what both answers share
    language: str
    key: int  # 64-bit hash that chooses the split
    file: str
    line: int
    answers: tuple[list[Message], ...] = ()  # pairs only: the better answer, the worse one
    identity: int = 0  # chats and pairs: 64-bit hash of all messages
    source: str = ""  # texts only, where they are labelled


def content_key(text: str) -> int:
    """64-bit hash of a text, the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def text_items(
    paths: Iterable[Path_], report: DataReport, source_key: str = "", reader: RowReader = READER
) -> Iterator[Item]:
    """All documents of the files, without exact duplicates. Memory: about 80 bytes a document, for the hashes."""
    seen: set[int] = set()
    for document in read_texts(paths, report, source_key, reader):
        key = content_key(document.text)
        if key in seen:
            report.drop("exact duplicate", document.source_file, document.line)
            continue
        seen.add(key)
        language = language_of(document.text)
        yield Item(document.text, [], language, key, document.source_file, document.line, source=document.source)


def chat_items(
    paths: Iterable[Path_], report: DataReport, reader: RowReader = READER, only: str = ""
) -> Iterator[Item]:
    """All chats of the files that have an answer, up to their last answer, without exact duplicates.

    `only`: "single" keeps chats of one turn, "multi" those of several.
    """
    seen: set[int] = set()
    for chat in read_chats(paths, report, reader):
        place = (chat.source_file, chat.line)
        messages = whole_turns(chat.messages)
        if not any(map(is_trained, messages)):
            report.drop("no answer, so nothing to train on", *place)
            continue
        turns = sum(message["role"] == "user" for message in messages)
        if only and (only == "single") != (turns == 1):
            report.drop("of one turn (--only multi)" if turns == 1 else "of several turns (--only single)", *place)
            continue
        identity = messages_key(messages)
        if identity in seen:
            report.drop("exact duplicate", *place)
            continue
        seen.add(identity)
        report.note_row(chat.content.changes, chat.content.unused, *place)
        if len(messages) < len(chat.messages):
            report.shorten("without its last question, which has no answer", *place)
        text = chat.content.text if messages is chat.messages else chat_text(messages)
        yield Item(text, messages, language_of(text), question_key(messages), *place, identity=identity)


def messages_key(messages: Iterable[Message]) -> int:
    """The hash of roles, contents and weights of all messages."""
    return content_key("\0".join(f"{turn['role']}{turn.get('weight', '')}\0{turn['content']}" for turn in messages))


def question_key(messages: list[Message]) -> int:
    """The hash of a chat's first question."""
    return content_key(next(message["content"] for message in messages if message["role"] == "user"))


def in_batches(items: Iterable[tuple[str, Item]]) -> Iterator[list[tuple[str, Item]]]:
    """Lists of (split, item) of bounded size, in their order."""
    batch: list[tuple[str, Item]] = []
    characters = 0
    for split, item in items:
        batch.append((split, item))
        characters += len(item.text)
        if len(batch) >= BATCH_ITEMS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def in_splits(items: Iterable[Item], val_share: float) -> Iterator[tuple[str, Item]]:
    """(split, item), by the rule at the top of this file: the split is train, val_zh or val_en."""
    for is_validation, item in split_validation(items, val_share):
        yield (f"val_{item.language}" if is_validation else "train"), item


def split_validation(items: Iterable[Item], val_share: float) -> Iterator[tuple[bool, Item]]:
    """Yields (is_validation, item), by the rule at the top of this file, in one pass.

    Until a language has ENOUGH validation items, the ENOUGH groups of lowest hash are held back: at the end some of
    them may be needed. Memory: at most ENOUGH * COMMON items of each language.
    """
    limit = val_share * 2.0**64
    opened = bytearray(1 << 24 if val_share else 1)  # approximate count of items per hash, 16 MB
    sides = {language: _Held() for language in LANGUAGES}
    for item in items:
        held = sides[item.language]
        held.count += 1
        key = item.key
        if limit and item.identity:  # chats and pairs may share their question
            slot = key % len(opened)
            if opened[slot] >= COMMON:
                key = item.identity
            else:
                opened[slot] += 1
        if key < limit:
            held.found += 1
            yield True, item
        elif not limit or held.found >= ENOUGH:
            yield False, item
        else:
            yield from ((False, other) for other in held.add(key, item))
        if held.found >= ENOUGH and held.groups:
            yield from ((False, other) for other in held.release())
    for held in sides.values():
        chosen = held.choose()
        yield from ((id(item) in chosen, item) for item in held.release())


class _Held:
    """The items of one language that may become validation items and are held back, in groups of one hash."""

    def __init__(self) -> None:
        self.count = self.found = 0  # all items; those that are in the validation split
        self.groups: dict[int, list[Item]] = {}

    def add(self, key: int, item: Item) -> list[Item]:
        """Hold an item back; returns the items that are training items for certain."""
        if key not in self.groups and len(self.groups) >= ENOUGH:
            highest = max(self.groups)
            if key > highest:
                return [item]
            released = self.groups.pop(highest)
        else:
            released = []
        self.groups.setdefault(key, []).append(item)
        return released

    def release(self) -> list[Item]:
        items = [item for group in self.groups.values() for item in group]
        self.groups.clear()
        return items

    def choose(self) -> set[int]:
        """The ids of the held items that go to the validation split, lowest hash first, whole groups where they fit."""
        wanted = min(ENOUGH, self.count // ENOUGH) - self.found
        chosen: set[int] = set()
        for key in sorted(self.groups):
            group = self.groups[key]
            if len(chosen) + len(group) <= wanted:
                chosen.update(map(id, group))
        if wanted > 0 and not chosen:  # every group is too large: one question opens many chats
            group = min(self.groups.values(), key=len, default=[])
            chosen.update(id(item) for item in sorted(group, key=lambda item: item.identity)[:wanted])
        return chosen
