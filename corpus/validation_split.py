"""Assigns examples to training or validation.

    validation if blake2b(content) / 2^64 < val_fraction, separately for each language

The split depends only on the content, not on the order of the files: a text is in the same split of every dataset. For
chats the hashed content is the first question, so no question is in both splits. If more than 20 chats start with the
same question ("Hi"), the hash of the whole chat is used after the 20th. Small datasets hold out more: of n examples at
least min(20, n / 20) are validation examples, those with the lowest hashes. The chats of a question stay together; only
if all of them would be too many is the last question divided.

Read next: examples.py (the examples), prepare_text.py, prepare_chats.py and prepare_prompts.py (write
them to their splits).
"""

from collections.abc import Iterable
from typing import TypeVar

from corpus.examples import ChatExample, PairExample, PromptExample, TextExample
from corpus.language import LANGUAGES

MIN_VALIDATION_EXAMPLES = 20  # per language and of all; below 400 examples, a twentieth of them
MAX_SAME_QUESTION = 20  # chats with the same first question that are split by it; later ones by the whole chat

ExampleT = TypeVar("ExampleT", TextExample, ChatExample, PairExample, PromptExample)
Assigned = list[tuple[str, ExampleT]]  # (split, example); a split is train, val_zh or val_en


class ValidationSplit:
    """The rule of the module docstring, in one pass.

    Until a language has MIN_VALIDATION_EXAMPLES validation examples, that many groups of examples with the lowest
    hashes are candidates: `assign` keeps them, because the split may need them at the end (`held_back`). At most
    MIN_VALIDATION_EXAMPLES * MAX_SAME_QUESTION examples of each language are in memory.
    """

    def __init__(self, val_fraction: float) -> None:
        self.limit = val_fraction * 2.0**64
        self.question_counts = bytearray(1 << 24 if val_fraction else 1)  # approximate examples per hash, 16 MiB
        self.candidates = {language: _Candidates() for language in LANGUAGES}

    def assign(self, examples: Iterable[ExampleT]) -> Assigned:
        """(split, example) of these examples and of earlier candidates, as far as their split is certain."""
        assigned: Assigned = []
        for example in examples:
            candidates, key = self.candidates[example.language], self._split_key(example)
            candidates.num_examples += 1
            if key < self.limit:
                candidates.num_validation += 1
                assigned.append((f"val_{example.language}", example))
            elif not self.limit or candidates.num_validation >= MIN_VALIDATION_EXAMPLES:
                assigned.append(("train", example))
            else:
                assigned += [("train", other) for other in candidates.add(key, example)]
            if candidates.num_validation >= MIN_VALIDATION_EXAMPLES and candidates.groups:
                assigned += [("train", other) for other in candidates.pop_all()]
        return assigned

    def held_back(self) -> Assigned:
        """(split, example) of the remaining candidates, after the last call of `assign`."""
        assigned: Assigned = []
        wanted = {language: wanted_examples(each.num_examples) for language, each in self.candidates.items()}
        largest = max(wanted, key=lambda language: self.candidates[language].num_examples)
        total = sum(each.num_examples for each in self.candidates.values())
        wanted[largest] += max(0, wanted_examples(total) - sum(wanted.values()))
        for language, candidates in self.candidates.items():
            chosen = candidates.choose_validation(wanted[language])
            assigned += [
                (f"val_{language}" if id(example) in chosen else "train", example) for example in candidates.pop_all()
            ]
        return assigned

    def _split_key(self, example: ExampleT) -> int:
        """The hash of the content; for chats of a question that is already common, the hash of the whole chat."""
        if self.limit and example.content_hash:
            slot = example.split_hash % len(self.question_counts)
            if self.question_counts[slot] >= MAX_SAME_QUESTION:
                return example.content_hash
            self.question_counts[slot] += 1
        return example.split_hash


def wanted_examples(count: int) -> int:
    """The number of validation examples that `count` examples have at least."""
    return min(MIN_VALIDATION_EXAMPLES, count // MIN_VALIDATION_EXAMPLES)


class _Candidates:
    """The examples of one language that may become validation examples, grouped by hash."""

    def __init__(self) -> None:
        self.num_examples = self.num_validation = 0  # all examples of the language; those in the validation split
        self.groups: dict[int, list] = {}

    def add(self, key: int, example: ExampleT) -> list[ExampleT]:
        """Add a candidate; returns the examples that are now certain to be training examples."""
        released: list[ExampleT] = []
        if key not in self.groups and len(self.groups) >= MIN_VALIDATION_EXAMPLES:
            highest = max(self.groups)
            if key > highest:
                return [example]
            released = self.groups.pop(highest)
        self.groups.setdefault(key, []).append(example)
        return released

    def pop_all(self) -> list:
        """Remove and return all candidates."""
        examples = [example for group in self.groups.values() for example in group]
        self.groups.clear()
        return examples

    def choose_validation(self, wanted: int) -> set[int]:
        """id() of the candidates that join the validation split, until it has `wanted` examples.

        Whole groups that fit, lowest hash first; then the smallest other group, or its part if it is larger than
        `wanted`.
        """
        missing = wanted - self.num_validation
        chosen: set[int] = set()
        others = []
        for _, group in sorted(self.groups.items()):
            if len(chosen) + len(group) <= missing:
                chosen.update(map(id, group))
            else:
                others.append(group)
        if len(chosen) < missing and others:
            group = min(others, key=len)
            size = len(group) if len(group) <= wanted else missing - len(chosen)
            chosen.update(map(id, sorted(group, key=lambda example: example.content_hash)[:size]))
        return chosen
