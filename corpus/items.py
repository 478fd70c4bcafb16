"""Rows -> items, each with its language and its side: exact duplicates out, a validation split set aside.

    validation if blake2b(content) / 2^64 < val_share, for each language by itself

The side depends on the content alone, never on the order of the files: the same text is on the same side in every data
set. For chats the content is the first question, so that no question is both trained and tested. A language with 20
items or more of which none has so low a hash gives the lowest one, so that small data has a validation split too.

Read next: read.py (where rows come from), pairs.py (pairs of answers), pack_texts.py and pack.py (where they go).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from corpus.chats import Message, chat_text, whole_turns
from corpus.language import LANGUAGES, language_of
from corpus.read import Path_, read_chats, read_texts
from corpus.report import DataReport

ENOUGH_FOR_VALIDATION = 20
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


def text_items(paths: Iterable[Path_], report: DataReport, source_key: str = "") -> Iterator[Item]:
    """All documents of the files, without exact duplicates. Memory: about 80 bytes a document, for the hashes."""
    seen: set[int] = set()
    for document in read_texts(paths, report, source_key):
        key = content_key(document.text)
        if key in seen:
            report.drop("exact duplicate", document.source_file, document.line)
            continue
        seen.add(key)
        language = language_of(document.text)
        yield Item(document.text, [], language, key, document.source_file, document.line, source=document.source)


def chat_items(paths: Iterable[Path_], report: DataReport) -> Iterator[Item]:
    """All chats of the files that have an answer, up to their last answer, without exact duplicates."""
    seen: set[int] = set()
    for chat in read_chats(paths, report):
        messages = whole_turns(chat.messages)
        if not messages:
            report.drop("no answer, so nothing to train on", chat.source_file, chat.line)
            continue
        identity = content_key(json.dumps(messages, ensure_ascii=False))
        if identity in seen:
            report.drop("exact duplicate", chat.source_file, chat.line)
            continue
        seen.add(identity)
        if len(messages) < len(chat.messages):
            report.shorten("without its last question, which has no answer", chat.source_file, chat.line)
        question = next(message["content"] for message in messages if message["role"] == "user")
        text = chat_text(messages)
        place = (chat.source_file, chat.line)
        yield Item(text, messages, language_of(text), content_key(question), *place, identity=identity)


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
    """Yields (is_validation, item), by the rule at the top of this file.

    Until a language has its first validation item, the item with the lowest hash so far is held back: at the end it
    may be the one. So the choice needs neither a second pass nor memory for more than one item.
    """
    limit = val_share * 2.0**64
    held: dict[str, list[Item]] = {}  # several only when chats share their question
    settled: set[str] = set()
    count = dict.fromkeys(LANGUAGES, 0)
    for item in items:
        count[item.language] += 1
        lowest = held.get(item.language, [])
        if item.key < limit:
            settled.add(item.language)
            yield from ((False, other) for other in held.pop(item.language, []))
            yield True, item
        elif item.language in settled or not limit:
            yield False, item
        elif not lowest or item.key < lowest[0].key:
            yield from ((False, other) for other in lowest)
            held[item.language] = [item]
        elif item.key == lowest[0].key:
            lowest.append(item)
        else:
            yield False, item
    for language, rest in held.items():
        yield from ((count[language] >= ENOUGH_FOR_VALIDATION, item) for item in rest)
