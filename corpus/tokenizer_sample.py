"""Samples the training text of a tokenizer, and held-out text to measure it, from any amount of text.

    held out    documents with a content hash in the lowest 1 %: also validation documents of data_process.py
    sample      of the others, those with the lowest hashes (rotated by the seed), up to `byte_budget`:
                    5/7 of the bytes Chinese, 2/7 English; if one language has too little, the other fills the budget

Duplicates are sampled once. The sample does not depend on the order of the documents; memory depends on the budget, not
on the input. Reading stops after `read_budget` bytes of text, divided evenly among the files.

Read next: tokenizer_training.py (trains on the sample), readers.py (files -> documents).
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from corpus.examples import text_hash
from corpus.language import LANGUAGES, detect_language
from corpus.readers import read_texts
from corpus.stats import DataStats
from corpus.validation_split import MIN_VALIDATION_EXAMPLES

LANGUAGE_FRACTIONS = {"zh": 5 / 7, "en": 2 / 7}  # of the byte budget: 5 Chinese characters per 6 English ones
HELD_OUT_FRACTION = 0.01
HELD_OUT_BYTES = 2_000_000  # per language; more text does not change the third digit of the result
SAMPLE_CHUNK_CHARACTERS = 20_000  # long documents are sampled in chunks, so that no book fills the budget alone
_HASH_RANGE = 2**64


class _LowestHashes:
    """Keeps the texts with the lowest keys, at most `budget` bytes of them."""

    def __init__(self, budget: float) -> None:
        self.budget, self.size = budget, 0
        self.heap: list[tuple[int, str, int]] = []  # (-key, text, bytes): the highest key is popped first
        self.keys: set[int] = set()

    def add(self, key: int, text: str) -> None:
        if key in self.keys or (self.size >= self.budget and key > -self.heap[0][0]):
            return
        length = len(text.encode())
        heapq.heappush(self.heap, (-key, text, length))
        self.keys.add(key)
        self.size += length
        while self.size - self.heap[0][2] >= self.budget:
            key, _, length = heapq.heappop(self.heap)
            self.keys.discard(-key)
            self.size -= length

    def texts(self, budget: float) -> list[str]:
        """The texts in the order of their keys, up to `budget` bytes."""
        chosen = []
        for _, text, length in sorted(self.heap, reverse=True):
            if budget <= 0:
                break
            chosen.append(text)
            budget -= length
        return chosen


@dataclass
class TextSample:
    """The result of `sample_texts`; all dicts are by language, "zh" and "en"."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    held_out: dict[str, list[str]] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LANGUAGES, 0))  # read
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LANGUAGES, 0))  # read
    truncated_files: list[str] = field(default_factory=list)  # files that were not read to the end


def sample_texts(
    files: Sequence[str],
    report: DataStats,
    byte_budget: int,
    read_budget: int,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda read: None,
) -> TextSample:
    """Sample texts in one pass over the files. `on_progress` is called with the number of bytes read so far.

    Raises UserError if there is no text, if a file is unusable, or if too many rows are bad.
    """
    sample = TextSample()
    chosen = {language: _LowestHashes(byte_budget) for language in LANGUAGES}
    held_out = {language: _LowestHashes(HELD_OUT_BYTES) for language in LANGUAGES}
    missing = [file for file in files if not Path(file).exists()]
    if missing:
        raise UserError(f"{missing[0]}: no such file")
    done = 0
    for i, file in enumerate(files):
        report.bytes_read = lambda: 0  # reset: the previous file may have been closed before its end
        end = sum(sample.bytes.values()) + (read_budget - sum(sample.bytes.values())) / (len(files) - i)
        documents = read_texts([file], report)
        for document in documents:
            language, key = detect_language(document.text), text_hash(document.text)
            sample.documents[language] += 1
            sample.bytes[language] += len(document.text.encode())
            is_held_out = key < HELD_OUT_FRACTION * _HASH_RANGE
            lowest_hashes = held_out[language] if is_held_out else chosen[language]
            for start in range(0, len(document.text), SAMPLE_CHUNK_CHARACTERS):
                chunk = document.text[start : start + SAMPLE_CHUNK_CHARACTERS]
                chunk_hash = text_hash(chunk) if start else key
                lowest_hashes.add((chunk_hash + seed * 0x9E3779B97F4A7C15) % _HASH_RANGE, chunk)
            on_progress(done + report.bytes_read())
            if sum(sample.bytes.values()) >= end:
                sample.truncated_files.append(file)
                break
        done += Path(file).stat().st_size
    if not any(sample.documents.values()):
        raise UserError(f"no text in {', '.join(files)}: a row needs a text or a chat")
    missing_bytes = {
        language: max(0.0, LANGUAGE_FRACTIONS[language] * byte_budget - chosen[language].size) for language in LANGUAGES
    }
    for language in LANGUAGES:
        extra_bytes = sum(missing_bytes.values()) - missing_bytes[language]
        sample.texts[language] = chosen[language].texts(LANGUAGE_FRACTIONS[language] * byte_budget + extra_bytes)
        sample.held_out[language] = held_out[language].texts(HELD_OUT_BYTES)
        if not sample.held_out[language] and sample.documents[language] >= MIN_VALIDATION_EXAMPLES:
            sample.held_out[language] = [sample.texts[language].pop(0)]
    return sample
