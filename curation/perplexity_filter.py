"""Selects training chats by the cross-entropy of their answers under a pretrained model.

    score of a chat = mean of -log p(token | preceding tokens) over the tokens of its answers, in nats per token

    --keep_entropy 2.5,4.5          this range; zh=2.5,4.5 for one language (repeat the flag for another one)
    --keep_entropy 20%,80%          the range between these percentiles, per language
    --keep_fraction 0.5             the half of the range that is nearest to its median, per language

A low score: the model can write the answer already, or the answer repeats itself. A high score: the answer is noise, in
the wrong language, or too hard. The selection by the cross-entropy of the pretrained model follows MindLLM
(arXiv:2310.15777, "entropy-based quality filtering" of instructions for lightweight models). Our choices: only answers
are scored, a pretrained scorer sees chats without role markers, ranges may differ by language, and they can be
percentiles, since nats per token depend on the vocabulary. Validation chats are never filtered: models trained on
different selections are compared on the same chats. Selection is not always better than random sampling
(arXiv:2410.09335).

Reads and writes   <out_dir>.scores-<scorer>.jsonl: [hash of the chat, nats per token, scored tokens, language, CRC-32],
                   appended during scoring. Another range needs no new scoring, and a killed run resumes. Truncated or
                   damaged lines are scored again.
Read next: perplexity_scorer.py (computes the scores), ../data_process.py, ../corpus/prepare_chats.py.
"""

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.checksums import checksum
from common.cli import flag
from common.errors import UserError, escape_controls
from common.flag_types import path_string, positive_fraction
from corpus.data_flags import DataFlags
from corpus.examples import ChatExample
from corpus.language import LANGUAGES
from corpus.readers import PathLike
from corpus.stats import DataStats

HISTOGRAM_BINS, EXAMPLES_PER_BIN = 12, 2
SCORE_SCALE, MAX_NATS = 10_000, 200_000  # scores are stored as int32 with four decimals
FILTER_GROUP = "filter by a model's cross-entropy (see curation/perplexity_filter.py)"


@dataclass(frozen=True)
class ScoreRange:
    """A value of --keep_entropy: nats per token, or percentiles if `percent`; language "" means all languages."""

    low: float
    high: float
    percent: bool
    language: str = ""


def parse_score_range(text: str) -> ScoreRange:
    """Parse LOW,HIGH (nats per token) or LOW%,HIGH% (percentiles), optionally after zh= or en=. Raises UserError."""
    number_pattern = r"(\d+(?:\.\d+)?)(%?)"
    match = re.fullmatch(rf"\s*(?:([a-z]+)=)?{number_pattern},{number_pattern}\s*", text)
    text = escape_controls(text)[:80]
    usage = "write 2.5,4.5 (nats per token), 20%,80% (percentiles) or zh=2.5,4.5 (one language)"
    if not match or match[3] != match[5] or (match[1] or LANGUAGES[0]) not in LANGUAGES:
        raise UserError(f"--keep_entropy {text}: {usage}")
    low, high = float(match[2]), float(match[4])
    if low >= high or (match[3] and high > 100):
        raise UserError(f"--keep_entropy {text}: the first number must be smaller, percentiles at most 100: {usage}")
    return ScoreRange(low, high, bool(match[3]), match[1] or "")


@dataclass(frozen=True)
class PerplexityFlags(DataFlags):
    """Flags of `data_process.py sft` that select chats by a model's cross-entropy."""

    scorer: str | None = flag(None, "pretrained model that scores every chat, for example out/pretrain_512.pth",
                              type=path_string, metavar="MODEL", group=FILTER_GROUP)  # fmt: skip
    keep_entropy: tuple[ScoreRange, ...] = flag((), "keep chats whose answers have LOW to HIGH nats per token; "
        "20%%,80%%: percentiles; zh=2,4: one language",
        type=parse_score_range, action="append", metavar="LOW,HIGH", group=FILTER_GROUP)  # fmt: skip
    keep_fraction: float = flag(1.0, "keep this fraction of the chats, those nearest to the middle of the range",
                                type=positive_fraction, aliases=("keep_share",), group=FILTER_GROUP)  # fmt: skip

    def check(self) -> None:
        if not self.scorer and (self.keep_entropy or self.keep_fraction != 1):
            raise UserError("--keep_entropy and --keep_fraction need --scorer MODEL, a pretrained model")


class ScoreStore:
    """The scores of chats by one scorer, in memory and in a file. Memory: 13 bytes per chat, 39 while loading."""

    def __init__(self, path: Path) -> None:
        self.path, self.has_new_rows = path, False
        self._load()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a", encoding="utf-8")
            if path.stat().st_size:
                self.file.write("\n")  # the last line may be truncated by a kill; empty lines are ignored
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None

    def _load(self) -> None:
        """Load three columns, sorted by key: keys, nats * SCORE_SCALE, indices into LANGUAGES."""
        columns = array("Q"), array("i"), array("b")
        if self.path.is_file():
            with self.path.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    if row := parse_score_line(line):
                        for column, value in zip(columns, row, strict=True):
                            column.append(value)
        keys = np.asarray(columns[0])
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        last = order[np.append(keys[1:] != keys[:-1], True)[: len(keys)]]  # a later line wins
        del keys, order
        self.keys, self.nats, self.languages = (np.asarray(column)[last] for column in columns)

    def add(self, rows: Iterable[tuple[int, float, int, str]]) -> None:
        """Append rows of (key, nats per token, scored tokens, language). `close` makes them visible to `get`."""
        try:
            for key, nats, tokens, language in rows:
                row = [key, round(nats, 4), tokens, language]
                self.file.write(json.dumps([*row, _row_checksum(row)]) + "\n")
                self.has_new_rows = True
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None

    def close(self) -> None:
        self.file.close()
        if self.has_new_rows:
            self._load()

    def get(self, key: int) -> tuple[float, str] | None:
        """(nats per token, language) of the chat with this content_hash, or None."""
        index = int(self.keys.searchsorted(np.uint64(key)))
        if index == len(self.keys) or self.keys[index] != key:
            return None
        return int(self.nats[index]) / SCORE_SCALE, LANGUAGES[self.languages[index]]

    def for_language(self, language: str) -> np.ndarray:
        """All scores of a language, shape (chats,)."""
        return self.nats[self.languages == LANGUAGES.index(language)] / SCORE_SCALE

    def digest(self) -> str:
        """Hash of all scores."""
        digest = hashlib.blake2b(digest_size=8)
        for column in (self.keys, self.nats, self.languages):
            digest.update(column)
        return digest.hexdigest()


def parse_score_line(line: str) -> tuple[int, int, int] | None:
    """(key, nats * SCORE_SCALE, index into LANGUAGES) of a line of the file; None if it is truncated or damaged."""
    try:
        row = json.loads(line)
        if len(row) == 5 and row.pop() != _row_checksum(row):
            return None
        key, nats, tokens, language = row  # files of earlier versions have no checksum
        if isinstance(key, int) and 0 <= key < 2**64 and 0 <= nats < MAX_NATS and tokens > 0:
            return key, round(nats * SCORE_SCALE), LANGUAGES.index(language)
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    return None


def _row_checksum(row: list[Any]) -> str:
    return checksum(json.dumps(row).encode())


def scores_path(out_dir: PathLike, scorer: str) -> Path:
    """Path of the scores, beside `out_dir`: they must survive when the dataset is replaced."""
    path = Path(os.path.normpath(out_dir))
    return path.with_name(f"{path.name}.scores-{scorer}.jsonl")


class PerplexityFilter:
    """Drops training chats whose score is outside an interval per language, and collects chats for the histogram.

    Raises UserError if no chat has a score inside its interval.
    """

    def __init__(self, scores: ScoreStore, ranges: Sequence[ScoreRange] = (), keep_fraction: float = 1.0) -> None:
        self.scores = scores
        self.limits: dict[str, tuple[float, float]] = {}
        self.edges: dict[str, np.ndarray] = {}  # of the histogram bins
        self.bin_examples: dict[tuple[str, int], list[tuple[int, str]]] = {}  # (language, bin) -> (hash, text)
        found = []
        for language in LANGUAGES:
            nats = scores.for_language(language)
            if not len(nats):
                continue
            chosen = [score_range for score_range in ranges if score_range.language in ("", language)]
            self.limits[language] = score_interval(nats, chosen[-1] if chosen else None, keep_fraction)
            self.edges[language] = bin_edges(nats)
            found.append(f"{language} from {nats.min():.2f} to {nats.max():.2f}")
        if found and not any(self.keep_mask(language).any() for language in self.limits):
            raise UserError(f"--keep_entropy keeps no chat: the scores in nats per token are {', '.join(found)}")

    def keep_mask(self, language: str) -> np.ndarray:
        """True for the scores of a language that are kept, shape (chats,), bool."""
        nats, (low, high) = self.scores.for_language(language), self.limits[language]
        return (nats >= low) & (nats <= high)

    def fingerprint_fields(self) -> dict[str, Any]:
        """Settings that determine the selection, for the fingerprint of the dataset."""
        return {"limits": self.limits, "scores": self.scores.digest()}

    def provenance(self) -> dict[str, Any]:
        """The entry of meta.json: the file of the scores and the interval of each language."""
        limits = {k: [None if np.isinf(edge) else round(edge, 4) for edge in v] for k, v in self.limits.items()}
        return {"chosen": {"scores": self.scores.path.name, "kept_between": limits}}

    def filter_examples(
        self, examples: Iterable[ChatExample], val_fraction: float, stats: DataStats
    ) -> Iterator[ChatExample]:
        """Yield the examples without training chats outside the interval, which are counted by reason.

        A chat without a score is kept.
        """
        for example in examples:
            reason = ""
            if score := self.scores.get(example.content_hash):
                nats, language = score
                self._add_bin_example(example, nats, language)
                low, high = self.limits[language]
                if nats < low:
                    reason = f"entropy of its answers below {low:.2f} ({language})"
                elif nats > high:
                    reason = f"entropy of its answers above {high:.2f} ({language})"
            if reason and example.split_hash >= val_fraction * 2.0**64:  # validation chats are never filtered
                stats.row_dropped(reason, example.file, example.line)
            else:
                yield example

    def _add_bin_example(self, example: ChatExample, nats: float, language: str) -> None:
        """Keep the chats with the lowest hashes of each bin, so that the choice is deterministic."""
        kept = self.bin_examples.setdefault((language, int(bin_index(self.edges[language], nats))), [])
        if len(kept) < EXAMPLES_PER_BIN or example.content_hash < kept[-1][0]:
            question, answer = example.messages[-2]["content"], example.messages[-1]["content"]
            kept.append((example.content_hash, f"{clip_text(question)} → {clip_text(answer)}"))
            kept.sort()
            del kept[EXAMPLES_PER_BIN:]


def score_interval(nats: np.ndarray, score_range: ScoreRange | None, keep_fraction: float) -> tuple[float, float]:
    """The lowest and highest score to keep: the range, or its fraction `keep_fraction` nearest to the median."""
    low, high = -np.inf, np.inf
    if score_range:
        low, high = score_range.low, score_range.high
        if score_range.percent:
            low, high = np.percentile(nats, [low, high])
    inside = nats[(nats >= low) & (nats <= high)]
    if keep_fraction < 1 and len(inside):
        median = np.median(inside)
        max_distance = np.quantile(abs(inside - median), keep_fraction)
        low, high = max(low, median - max_distance), min(high, median + max_distance)
    return float(low), float(high)


# ---- the histogram ---------------------------------------------------------------------------------------------------
def bin_edges(nats: np.ndarray) -> np.ndarray:
    """Edges of HISTOGRAM_BINS equal bins from the 1st to the 99th percentile, rounded to 0.05, shape (bins + 1,).

    The first and last bin also count the scores outside the edges.
    """
    low, high = np.percentile(nats, [1, 99])
    low, high = np.floor(low * 20) / 20, np.ceil(high * 20) / 20
    return np.linspace(low, max(high, low + 0.05 * HISTOGRAM_BINS), HISTOGRAM_BINS + 1)


def bin_index(edges: np.ndarray, nats: Any) -> Any:
    """Index of the bin of a score, or of each score of an array."""
    return np.clip(np.searchsorted(edges, nats, side="right") - 1, 0, HISTOGRAM_BINS - 1)


def clip_text(text: str, length: int = 36) -> str:
    """The text on one line, at most `length` characters, without control characters."""
    line = "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))
    return line if len(line) <= length else line[: length - 1] + "…"


def print_histogram(score_filter: PerplexityFilter) -> None:
    """Print a table per language: the range of each bin, its chats, how many are kept, and examples."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=140)
    for language, edges in score_filter.edges.items():
        nats, kept = score_filter.scores.for_language(language), score_filter.keep_mask(language)
        counts = np.bincount(bin_index(edges, nats), minlength=HISTOGRAM_BINS)
        inside = np.bincount(bin_index(edges, nats[kept]), minlength=HISTOGRAM_BINS)
        title = f"{language}: {len(nats):,} chats, median {np.median(nats):.2f} nats per token of the answers; "
        table = Table(title=title + f"kept {kept.sum():,} ({kept.mean():.1%})", title_justify="left")
        for name in ("nats per token", "chats", "kept"):
            table.add_column(name, justify="right")
        table.add_column("")
        table.add_column("examples", overflow="fold")
        for i in range(HISTOGRAM_BINS):
            bar = "#" * round(24 * counts[i] / counts.max())
            edge = f"{edges[i]:.2f} … {edges[i + 1]:.2f}"
            example_text = "\n".join(text for _, text in score_filter.bin_examples.get((language, i), []))
            table.add_row(edge, f"{counts[i]:,}", f"{inside[i]:,}", bar, Text(example_text))
        console.print(table)
