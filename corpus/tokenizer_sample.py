"""Any amount of text -> the few megabytes that a tokenizer is trained on, and the held-out text that it is judged by.

    held out    documents whose content hash is below 1 % of all hashes: those that data_process.py validates with
    sample      of the others those with the lowest hashes (turned by the seed), until the byte budget is full:
                    5/7 of the bytes Chinese, 2/7 English; where one language has less, the other fills the rest

Equal documents count once. The choice depends on the documents, not on their order, and memory on the budget, not on
the input. Reading ends after `read_budget` bytes of text, shared fairly among the files.

Read next: tokenizer_training.py (what the sample is for), readers.py (where documents come from).
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from corpus.examples import ENOUGH, content_key
from corpus.language import LANGUAGES, language_of
from corpus.readers import read_texts
from corpus.stats import DataReport

SHARE = {"zh": 5 / 7, "en": 2 / 7}  # of the budget, in UTF-8 bytes: 5 Chinese characters for 6 of English
HELD_OUT_SHARE = 0.01
HELD_OUT_BYTES = 2_000_000  # a language; more would not change the third digit
PIECE = 20_000  # characters; one book must not fill the budget alone
_RING = 2**64


class _Lowest:
    """Keeps the texts with the lowest keys, at most `budget` bytes of them."""

    def __init__(self, budget: float) -> None:
        self.budget, self.size = budget, 0
        self.heap: list[tuple[int, str, int]] = []  # (-key, text, bytes): the highest key is on top, ready to go
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
        """The texts by rising key, until `budget` bytes are full."""
        chosen = []
        for _, text, length in sorted(self.heap, reverse=True):
            if budget <= 0:
                break
            chosen.append(text)
            budget -= length
        return chosen


@dataclass
class TextSample:
    """What was read and what was chosen. `texts` and `held_out` are by language."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    held_out: dict[str, list[str]] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LANGUAGES, 0))  # read
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LANGUAGES, 0))  # read
    unfinished: list[str] = field(default_factory=list)  # files that were not read to their end


def sample_texts(
    files: Sequence[str],
    report: DataReport,
    byte_budget: int,
    read_budget: int,
    seed: int = 0,
    advance: Callable[[int], None] = lambda read: None,
) -> TextSample:
    """One pass over the files. `advance` is told, now and then, how many bytes of the files are read.

    Raises UserError when there is no text at all, when a file cannot be used, or when too many rows are bad.
    """
    sample = TextSample()
    chosen = {language: _Lowest(byte_budget) for language in LANGUAGES}
    held_out = {language: _Lowest(HELD_OUT_BYTES) for language in LANGUAGES}
    missing = [file for file in files if not Path(file).exists()]
    if missing:
        raise UserError(f"{missing[0]}: no such file")
    done = 0
    for i, file in enumerate(files):
        report.position = lambda: 0  # the reader counts from here on; the last file may be closed in the middle
        end = sum(sample.bytes.values()) + (read_budget - sum(sample.bytes.values())) / (len(files) - i)
        documents = read_texts([file], report)
        for document in documents:
            language, key = language_of(document.text), content_key(document.text)
            sample.documents[language] += 1
            sample.bytes[language] += len(document.text.encode())
            is_held_out = key < HELD_OUT_SHARE * _RING
            keep = held_out[language] if is_held_out else chosen[language]
            for start in range(0, len(document.text), PIECE):
                piece = document.text[start : start + PIECE]
                piece_key = content_key(piece) if start else key
                keep.add((piece_key + seed * 0x9E3779B97F4A7C15) % _RING, piece)
            advance(done + report.position())
            if sum(sample.bytes.values()) >= end:
                sample.unfinished.append(file)
                break
        done += Path(file).stat().st_size
    if not any(sample.documents.values()):
        raise UserError(f"no text in {', '.join(files)}: a row needs a text, or a chat")
    short = {language: max(0.0, SHARE[language] * byte_budget - chosen[language].size) for language in LANGUAGES}
    for language in LANGUAGES:
        rest = sum(short.values()) - short[language]
        sample.texts[language] = chosen[language].texts(SHARE[language] * byte_budget + rest)
        sample.held_out[language] = held_out[language].texts(HELD_OUT_BYTES)
        if not sample.held_out[language] and sample.documents[language] >= ENOUGH:
            sample.held_out[language] = [sample.texts[language].pop(0)]
    return sample
