"""Which chats teach a small model: those that are neither trivial nor beyond it, by the cross-entropy of its parent.

    score of a chat = mean of -log p(token | what comes before) over its answers, in nats a token, by a pretrained model

    --keep_entropy 2.5,4.5          this band; zh=2.5,4.5 for one language (give the flag once for each)
    --keep_entropy 20%,80%          the band between these percentiles, for each language by itself
    --keep_share 0.5                of the band, the half nearest to its middle, for each language by itself

A low score says that the model could have written the answer already, or that it repeats itself; a high one that the
answer is noise, in the wrong language, or too hard. What follows MindLLM (arXiv:2310.15777, "entropy-based quality
filtering" of instructions for lightweight models): that the pretrained model's own cross-entropy decides. What is our
choice: answers alone are scored, chats are shown to the scorer without markers, bands may differ by language, and they
can be percentiles, since nats a token depend on the vocabulary. Validation chats are never filtered, so that models
trained on different choices are compared on the same ones. Choosing does not always win over drawing at random
(arXiv:2410.09335).

Reads and writes   <out_dir>.scores-<scorer>.jsonl: [hash of the chat, nats a token, scored tokens, language, CRC-32],
                   appended as they are computed; another band costs no second scoring, and a killed run continues. A
                   line that is cut or damaged is scored again.
Read next: perplexity_scorer.py (who scores), ../data_process.py, ../corpus/prepare_chats.py.
"""

import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.checksums import checksum
from common.errors import UserError, printable
from corpus.examples import Item
from corpus.language import LANGUAGES
from corpus.readers import Path_
from corpus.stats import DataReport

BINS = 12  # of the histogram
SCALE, MOST_NATS = 10_000, 200_000  # scores have four decimals and fit into an int32
Items = Callable[[Iterable[Path_], DataReport], Iterator[Item]]  # as corpus.examples.chat_items


@dataclass(frozen=True)
class Band:
    """What --keep_entropy asks for; "" as language: for all."""

    low: float
    high: float
    percent: bool
    language: str = ""


def parse_band(text: str) -> Band:
    """LOW,HIGH in nats a token, LOW%,HIGH% in percentiles, each perhaps after zh= or en=. Raises UserError."""
    number = r"(\d+(?:\.\d+)?)(%?)"
    found, text = re.fullmatch(rf"\s*(?:([a-z]+)=)?{number},{number}\s*", text), printable(text)[:80]
    how = "write 2.5,4.5 (nats a token), 20%,80% (percentiles) or zh=2.5,4.5 (one language)"
    if not found or found[3] != found[5] or (found[1] or LANGUAGES[0]) not in LANGUAGES:
        raise UserError(f"--keep_entropy {text}: {how}")
    low, high = float(found[2]), float(found[4])
    if low >= high or (found[3] and high > 100):
        raise UserError(f"--keep_entropy {text}: the smaller number first, percentiles at most 100: {how}")
    return Band(low, high, bool(found[3]), found[1] or "")


class Scores:
    """The scores of chats by one scorer, in memory and in a file. Memory: 13 bytes a chat, 39 while reading."""

    def __init__(self, path: Path) -> None:
        self.path, self.added = path, False
        self._read()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a", encoding="utf-8")
            if path.stat().st_size:
                self.file.write("\n")  # after a line that a kill has cut; empty lines mean nothing
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None

    def _read(self) -> None:
        """Three columns, sorted by key: keys, ten-thousandths of a nat (as exact as the file), places in LANGUAGES."""
        columns = array("Q"), array("i"), array("b")
        if self.path.is_file():
            with self.path.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    if row := score_of(line):
                        for column, value in zip(columns, row, strict=True):
                            column.append(value)
        keys = np.asarray(columns[0])
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        last = order[np.append(keys[1:] != keys[:-1], True)[: len(keys)]]  # a later line wins
        del keys, order
        self.keys, self.nats, self.languages = (np.asarray(column)[last] for column in columns)

    def add(self, rows: Iterable[tuple[int, float, int, str]]) -> None:
        """Write rows of (key, nats a token, scored tokens, language); `get` and `of` know them after `close`."""
        try:
            for key, nats, tokens, language in rows:
                row = [key, round(nats, 4), tokens, language]
                self.file.write(json.dumps([*row, _row_checksum(row)]) + "\n")
                self.added = True
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None

    def close(self) -> None:
        self.file.close()
        if self.added:
            self._read()

    def get(self, key: int) -> tuple[float, str] | None:
        """(nats a token, language) of a chat by its Item.identity."""
        place = int(self.keys.searchsorted(np.uint64(key)))
        if place == len(self.keys) or self.keys[place] != key:
            return None
        return int(self.nats[place]) / SCALE, LANGUAGES[self.languages[place]]

    def of(self, language: str) -> np.ndarray:
        """All scores of a language, shape (chats,)."""
        return self.nats[self.languages == LANGUAGES.index(language)] / SCALE

    def digest(self) -> str:
        """Names all of them."""
        digest = hashlib.blake2b(digest_size=8)
        for column in (self.keys, self.nats, self.languages):
            digest.update(column)
        return digest.hexdigest()


def score_of(line: str) -> tuple[int, int, int] | None:
    """(key, ten-thousandths of a nat, place in LANGUAGES) of a line of the file; None if it is cut or damaged."""
    try:
        row = json.loads(line)
        if len(row) == 5 and row.pop() != _row_checksum(row):
            return None
        key, nats, tokens, language = row  # without a checksum in files of earlier versions
        if isinstance(key, int) and 0 <= key < 2**64 and 0 <= nats < MOST_NATS and tokens > 0:
            return key, round(nats * SCALE), LANGUAGES.index(language)
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    return None


def _row_checksum(row: list[Any]) -> str:
    return checksum(json.dumps(row).encode())


def scores_path(out_dir: Path_, scorer: str) -> Path:
    """Beside the data set: replacing it must not throw them away."""
    place = Path(os.path.normpath(out_dir))
    return place.with_name(f"{place.name}.scores-{scorer}.jsonl")


class Choice:
    """The interval of scores that is kept, for each language."""

    def __init__(self, scores: Scores, bands: list[Band], keep_share: float = 1.0) -> None:
        self.scores = scores
        self.limits: dict[str, tuple[float, float]] = {}
        for language in LANGUAGES:
            own = scores.of(language)
            band = next((b for b in reversed(bands) if b.language in ("", language)), None)
            if len(own):
                self.limits[language] = interval(own, band, keep_share)
        if self.limits and not any(self.keeps(language).any() for language in self.limits):
            ranges = (f"{k} from {scores.of(k).min():.2f} to {scores.of(k).max():.2f}" for k in self.limits)
            raise UserError(f"--keep_entropy keeps no chat: the scores are, in nats a token, {', '.join(ranges)}")

    def keeps(self, language: str) -> np.ndarray:
        """Which of a language's scores are kept, shape (chats,), bool."""
        scores, (low, high) = self.scores.of(language), self.limits[language]
        return (scores >= low) & (scores <= high)

    def objection(self, item: Item) -> str:
        """Why a chat is left out, or "" when it is kept. A chat that could not be scored is kept."""
        known = self.scores.get(item.identity)
        if known is None:
            return ""
        low, high = self.limits[known[1]]
        if known[0] < low:
            return f"entropy of its answers below {low:.2f} ({known[1]})"
        return f"entropy of its answers above {high:.2f} ({known[1]})" if known[0] > high else ""

    def job(self) -> dict[str, Any]:
        """What the choice depends on."""
        return {"limits": self.limits, "scores": self.scores.digest()}

    def chosen(self, items: Items, val_share: float, look: Callable[[Item], None]) -> Items:
        """`items` without the training chats that are not kept; what is left out is counted with its reason.

        `look` is shown every item first.
        """

        def only_chosen(paths: Iterable[Path_], report: DataReport) -> Iterator[Item]:
            for item in items(paths, report):
                look(item)
                validation = item.key < val_share * 2.0**64
                if not validation and (reason := self.objection(item)):
                    report.drop(reason, item.file, item.line)
                else:
                    yield item

        return only_chosen


def interval(scores: np.ndarray, band: Band | None, keep_share: float) -> tuple[float, float]:
    """The lowest and highest score to keep: the band, or the share of it that is nearest to its median."""
    low, high = -np.inf, np.inf
    if band:
        low, high = np.percentile(scores, [band.low, band.high]) if band.percent else (band.low, band.high)
    inside = scores[(scores >= low) & (scores <= high)]
    if keep_share < 1 and len(inside):
        middle = np.median(inside)
        reach = np.quantile(abs(inside - middle), keep_share)
        low, high = max(low, middle - reach), min(high, middle + reach)
    return float(low), float(high)


# ---- showing ---------------------------------------------------------------------------------------------------------
class Examples:
    """A few chats of every bin of the histogram: those with the lowest hashes, so the same ones every time."""

    def __init__(self, scores: Scores, per_bin: int) -> None:
        self.scores, self.per_bin = scores, per_bin
        self.edges = {language: bin_edges(scores.of(language)) for language in LANGUAGES}
        self.kept: dict[tuple[str, int], list[tuple[int, str]]] = {}

    def consider(self, item: Item) -> None:
        known = self.scores.get(item.identity)
        if known is None or not self.per_bin:
            return
        nats, language = known
        own = self.kept.setdefault((language, int(bin_of(self.edges[language], nats))), [])
        if len(own) < self.per_bin or item.identity < own[-1][0]:
            question, answer = item.messages[-2]["content"], item.messages[-1]["content"]
            own.append((item.identity, f"{clip(question)} → {clip(answer)}"))
            own.sort()
            del own[self.per_bin :]


def bin_edges(scores: np.ndarray) -> np.ndarray:
    """Edges of BINS equal bins from the 1st to the 99th percentile, rounded to 0.05; the outer bins take the rest."""
    if not len(scores):
        return np.linspace(0, 1, BINS + 1)
    low, high = np.percentile(scores, [1, 99])
    low, high = np.floor(low * 20) / 20, np.ceil(high * 20) / 20
    return np.linspace(low, max(high, low + 0.05 * BINS), BINS + 1)


def bin_of(edges: np.ndarray, nats: Any) -> Any:
    """The bin of a score, or of each score of an array."""
    return np.clip(np.searchsorted(edges, nats, side="right") - 1, 0, BINS - 1)


def clip(text: str, length: int = 36) -> str:
    """One line, shortened, without anything that a terminal would obey."""
    line = "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))
    return line if len(line) <= length else line[: length - 1] + "…"


def print_histogram(choice: Choice, examples: Examples) -> None:
    """A table for each language: bins of nats a token, how many chats, which are kept, and examples."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=140)
    for language in choice.limits:
        scores, edges, kept = choice.scores.of(language), examples.edges[language], choice.keeps(language)
        counts = np.bincount(bin_of(edges, scores), minlength=BINS)
        inside = np.bincount(bin_of(edges, scores[kept]), minlength=BINS)
        title = f"{language}: {len(scores):,} chats, median {np.median(scores):.2f} nats a token of the answers; "
        table = Table(title=title + f"kept {kept.sum():,} ({kept.mean():.1%})", title_justify="left")
        for name in ("nats a token", "chats", "kept"):
            table.add_column(name, justify="right")
        table.add_column("")
        table.add_column("examples", overflow="fold")
        for i in range(BINS):
            bar = "#" * round(24 * counts[i] / counts.max())
            edge = f"{edges[i]:.2f} … {edges[i + 1]:.2f}"
            shown = "\n".join(text for _, text in examples.kept.get((language, i), []))
            table.add_row(edge, f"{counts[i]:,}", f"{inside[i]:,}", bar, Text(shown))
        console.print(table)


def summary(choice: Choice) -> dict[str, Any]:
    """What meta.json remembers: the scores' file and the interval of each language."""
    limits = {k: [None if np.isinf(edge) else round(edge, 4) for edge in v] for k, v in choice.limits.items()}
    return {"scores": choice.scores.path.name, "kept_between": limits}
