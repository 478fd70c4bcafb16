"""Examples of a dataset: documents, chats and pairs of answers, and the split that each one belongs to.

    validation if blake2b(content) / 2^64 < val_share, separately for each language

The split depends only on the content, not on the order of the files: a text is in the same split of every dataset. For
chats the hashed content is the first question, so no question is in both splits. If more than 20 chats start with the
same question ("Hi"), the hash of the whole chat is used after the 20th. Small datasets hold out more: of n examples of
a language, at least min(20, n / 20) are validation examples, those with the lowest hashes.

Read next: read_examples.py (rows -> examples), prepare_text.py and prepare_chats.py (examples -> shards).
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from corpus.chats import Message
from corpus.language import LANGUAGES

MIN_VALIDATION_EXAMPLES = 20  # per language; below 400 examples, a twentieth of them
MAX_SAME_QUESTION = 20  # chats with the same first question that are split by it; later ones by the whole chat
BATCH_EXAMPLES, BATCH_CHARACTERS = 1000, 500_000  # limits of one batch for the tokenizer


@dataclass(frozen=True)
class Example:
    """A document, a chat or a pair of answers, with its position in the input files."""

    text: str
    messages: list[Message]  # empty for plain text; for pairs the prompt of both answers
    language: str
    split_hash: int  # 64-bit hash that chooses the split
    file: str
    line: int
    answers: tuple[list[Message], ...] = ()  # pairs only: chosen, rejected
    content_hash: int = 0  # chats and pairs: 64-bit hash of all messages
    source: str = ""  # documents only: the value of the row's source key


def text_hash(text: str) -> int:
    """64-bit hash of a text, equal on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def messages_hash(messages: Iterable[Message]) -> int:
    """64-bit hash of the roles, contents and weights of all messages."""
    return text_hash("\0".join(f"{turn['role']}{turn.get('weight', '')}\0{turn['content']}" for turn in messages))


def question_hash(messages: list[Message]) -> int:
    """64-bit hash of a chat's first question."""
    return text_hash(next(message["content"] for message in messages if message["role"] == "user"))


def batch_examples(examples: Iterable[tuple[str, Example]]) -> Iterator[list[tuple[str, Example]]]:
    """Group (split, example) pairs into lists of bounded size, in order."""
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
    """Yield (split, example) by the rule of the module docstring; the split is train, val_zh or val_en."""
    for is_validation, example in mark_validation(examples, val_share):
        yield (f"val_{example.language}" if is_validation else "train"), example


def mark_validation(examples: Iterable[Example], val_share: float) -> Iterator[tuple[bool, Example]]:
    """Yield (is_validation, example) by the rule of the module docstring, in one pass.

    Until a language has MIN_VALIDATION_EXAMPLES validation examples, that many groups with the lowest hashes are held
    back, because the split may need them at the end. At most MIN_VALIDATION_EXAMPLES * MAX_SAME_QUESTION examples of
    each language are in memory.
    """
    limit = val_share * 2.0**64
    question_counts = bytearray(1 << 24 if val_share else 1)  # approximate count of examples per hash, 16 MiB
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
    """Examples of one language that may become validation examples, grouped by hash."""

    def __init__(self) -> None:
        self.num_examples = self.num_validation = 0  # all examples of the language; those in the validation split
        self.groups: dict[int, list[Example]] = {}

    def hold(self, key: int, example: Example) -> list[Example]:
        """Hold an example back; return the examples that are now certain to be training examples."""
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
        """Remove and return all held examples."""
        examples = [example for group in self.groups.values() for example in group]
        self.groups.clear()
        return examples

    def choose_validation(self) -> set[int]:
        """id() of the held examples that join the validation split: whole groups, lowest hash first."""
        num_wanted = min(MIN_VALIDATION_EXAMPLES, self.num_examples // MIN_VALIDATION_EXAMPLES) - self.num_validation
        chosen: set[int] = set()
        for key in sorted(self.groups):
            group = self.groups[key]
            if len(chosen) + len(group) <= num_wanted:
                chosen.update(map(id, group))
        if num_wanted > 0 and not chosen:  # every group is too large: many chats start with the same question
            group = min(self.groups.values(), key=len, default=[])
            chosen.update(
                id(example) for example in sorted(group, key=lambda example: example.content_hash)[:num_wanted]
            )
        return chosen
