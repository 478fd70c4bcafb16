"""Statistics of a data pass: rows read, kept, dropped and bad (reasons, first locations), languages, lengths, speed.

No row is dropped silently. Every row is counted as exactly one of
    kept      in the dataset, perhaps changed or without some of its keys; changes and unused keys are counted by name
    dropped   valid, but left out on purpose: an exact duplicate, a chat that does not fit, a bad label
    bad       unusable: broken JSON, a number instead of text, a truncated archive, ...
so read = kept + dropped + bad. Bad rows are skipped up to the fraction `max_bad_fraction`; above it the run ends with
an error. The rows lost in a damaged part of a file are estimated from the size of the rows before it (damage.py).

Read next: readers.py (counts the rows), stats_tables.py (prints the tables).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from common.errors import UserError
from corpus.layouts import explain_expected_keys

MAX_LOCATIONS = 3  # locations kept per reason
MAX_REASONS = 40  # keeps the tables within one screen
EMPTY_FILE = "empty file"
MIN_BAD_TO_JUDGE, MIN_READ_TO_JUDGE = 100, 1000  # bad rows and rows read before `max_bad_fraction` is checked
FIRST_BIN_TOKENS, LENGTH_BINS = 16, 13  # length histogram: up to 16, 32, ... 65,536 tokens


class BadRow(Exception):
    """A row that cannot be used. The message is the reason, without the row's content."""


class DroppedRow(BadRow):
    """A valid row that is left out on purpose: counted as dropped, not as bad."""


@dataclass
class ReasonCount:
    count: int = 0
    first: list[tuple[str, int]] = field(default_factory=list)  # (file, line) of the first few

    def locations(self) -> str:
        return ", ".join(f"{file}:{line}" for file, line in self.first)


class Reasons(dict[str, ReasonCount]):
    """Reasons by name, with the number of their rows; after MAX_REASONS names, all others are "other reasons"."""

    def add(self, reason: str, file: str, line: int, rows: int = 1) -> None:
        if reason not in self and len(self) >= MAX_REASONS:
            reason = "other reasons"
        entry = self.setdefault(reason, ReasonCount())
        entry.count += rows
        if len(entry.first) < MAX_LOCATIONS:
            entry.first.append((file, line))

    @property
    def num_rows(self) -> int:
        return sum(reason.count for reason in self.values())

    def by_count(self) -> list[tuple[str, ReasonCount]]:
        """(name, reason), the most frequent reasons first."""
        return sorted(self.items(), key=lambda item: -item[1].count)

    def merge(self, other: dict[str, Any]) -> None:
        """Add reasons in the format of `to_dict`."""
        for name, entry in other.items():
            mine = self.setdefault(name, ReasonCount())
            mine.count += entry["count"]
            locations = [place.rpartition(":") for place in entry["first"]]
            mine.first = [*mine.first, *((file, int(line)) for file, _, line in locations)][:MAX_LOCATIONS]

    def to_dict(self) -> dict[str, Any]:
        """{name: {"count": rows, "first": ["file:line", …]}}"""
        return {
            name: {"count": reason.count, "first": [f"{file}:{line}" for file, line in reason.first]}
            for name, reason in self.items()
        }


@dataclass
class _FileStats:
    rows: int = 0
    good: int = 0
    lost: int = 0  # in accepted damage
    keys: dict[str, None] = field(default_factory=dict)  # in order of appearance


class DataStats:
    """Counts of one pass over the data. Above the fraction `max_bad_fraction` (0..1) of bad rows, the run ends.

    `accept_damaged`: whether the readable part of a damaged file is used; None for commands without this flag.
    """

    def __init__(self, max_bad_fraction: float = 0.01, accept_damaged: bool | None = None) -> None:
        self.max_bad_fraction, self.accept_damaged = max_bad_fraction, accept_damaged
        self.read = self.kept = 0
        self.bad, self.dropped = Reasons(), Reasons()
        self.changed = Reasons()  # rows that are kept, but changed: without their last turns, …
        self.unused = Reasons()  # keys that have a value in some rows and that no reader uses
        self.accepted_rows = 0  # bad rows lost in accepted damage; `max_bad_fraction` does not count them
        self.files: dict[str, _FileStats] = {}
        self.languages: dict[str, dict[str, int]] = {}
        self.histogram = [0] * (LENGTH_BINS + 1)
        self.trained_tokens = 0  # chats only
        self.notes: list[str] = []  # further notes about the files, one line each
        self.input_bytes = 0  # bytes of all input files, as far as known
        self.bytes_read: Callable[[], int] = lambda: 0  # bytes of the input files read so far
        self.text_bytes = 0  # UTF-8 bytes tokenized in this run
        self._start = time.perf_counter()

    @property
    def bad_rows(self) -> int:
        return self.bad.num_rows

    @property
    def dropped_rows(self) -> int:
        return self.dropped.num_rows

    # ---- counting ----
    def row_read(self, file: str, row: Any = None) -> None:
        """Count a row as read. Keeps the keys of the first objects of each file for error messages."""
        self.read += 1
        count = self.files.setdefault(file, _FileStats())
        count.rows += 1
        if not count.good and isinstance(row, dict) and len(count.keys) < 12:
            count.keys.update(dict.fromkeys(" ".join(str(key)[:40].split()) for key in list(row)[:12]))

    def row_ok(self, file: str) -> None:
        self.files[file].good += 1

    def row_bad(self, reason: str, file: str, line: int, rows: int = 1) -> None:
        """Count a row that `row_read` has counted as bad. Raises UserError if `max_bad_fraction` must be exceeded."""
        self.bad.add(reason, file, line, rows)
        if self.bad_rows >= MIN_BAD_TO_JUDGE and self.read >= MIN_READ_TO_JUDGE:
            self.check_cap(expected_rows=self.read * max(1.0, self.input_bytes / max(1, self.bytes_read())))

    def row_unreadable(self, reason: str, file: str, line: int, rows: int = 1) -> None:
        """Count a row, or an estimated number of rows, that could not be read as read and as bad."""
        self._count_lost_rows(file, rows)
        self.row_bad(reason, file, line, rows)

    def rows_lost(self, reason: str, file: str, line: int, rows: int) -> None:
        """Count an estimated number of rows, lost in accepted damage, as bad rows outside of `max_bad_fraction`."""
        self._count_lost_rows(file, rows)
        self.bad.add(reason, file, line, rows)
        self.accepted_rows += rows
        self.files[file].lost += rows

    def _count_lost_rows(self, file: str, rows: int) -> None:
        self.row_read(file)
        self.read += rows - 1
        self.files[file].rows += rows - 1

    def num_rows_in(self, file: str) -> int:
        """Number of rows read from the file so far."""
        return self.files[file].rows if file in self.files else 0

    def estimate_rows(self, file: str, lost: int, read: int) -> int:
        """Estimated number of rows in `lost` bytes of a file of which `read` bytes were read; at least 1."""
        return max(1, round(lost * self.num_rows_in(file) / max(1, read - lost)))

    def row_dropped(self, reason: str, file: str, line: int) -> None:
        """Count a valid row that is left out on purpose."""
        self.dropped.add(reason, file, line)

    def row_truncated(self, reason: str, file: str, line: int) -> None:
        """Count a row that is kept, but changed."""
        self.changed.add(reason, file, line)

    def row_changed(self, changes: list[str], unused: list[str], file: str, line: int) -> None:
        """Count the changes of a kept row, and its keys that have a value and are not used."""
        for reason in changes:
            self.changed.add(reason, file, line)
        for key in unused:
            self.unused.add(key, file, line)

    def add_note(self, text: str) -> None:
        """Add a line about a file, printed under the table; equal notes are printed once."""
        if text not in self.notes:
            self.notes.append(text)

    def row_kept(
        self, language: str, characters: int, tokens: int, utf8_bytes: int, trained_tokens: int = 0, longest: int = 0,
        markers: int = 0,
    ) -> None:  # fmt: skip
        """Count a document, chat or pair that is in the dataset, with its characters, tokens and UTF-8 bytes.

        `longest`: tokens of its longest document, for the length histogram (default: `tokens`). `markers`: how many of
        the tokens are markers, which no characters belong to.
        """
        self.kept += 1
        self.trained_tokens += trained_tokens
        self.text_bytes += utf8_bytes
        counts = self.languages.setdefault(language, {})
        amounts = {"documents": 1, "characters": characters, "tokens": tokens, "bytes": utf8_bytes, "markers": markers}
        for name, amount in amounts.items():
            counts[name] = counts.get(name, 0) + amount
        self.histogram[min(LENGTH_BINS, max(0, ((longest or tokens) - 1) // FIRST_BIN_TOKENS).bit_length())] += 1

    # ---- limits ----
    def check_cap(self, expected_rows: float = 0) -> None:
        """Raises UserError if more than `max_bad_fraction` of the rows read, or of `expected_rows` if larger, are bad.

        While reading, the remaining rows count as good, so one bad part of a large file does not end the run.
        """
        counted = self.bad_rows - self.accepted_rows
        if counted > self.max_bad_fraction * max(self.read, expected_rows):
            worst = self.bad.by_count()[:4]
            reasons = "; ".join(f"{reason.count:,} x {name} (first: {reason.locations()})" for name, reason in worst)
            raise UserError(
                f"{counted:,} of {self.read:,} rows read are bad ({counted / self.read:.1%}, allowed are "
                f"{self.max_bad_fraction:.1%}): {reasons}: fix the data or raise --max_bad_fraction"
            )

    def check_file(self, file: str, kind: str) -> None:
        """Raises UserError if no row of the file is usable. `kind`: see explain_expected_keys."""
        count = self.files.get(file, _FileStats())
        empty = any(name == file for name, _ in self.bad.get(EMPTY_FILE, ReasonCount()).first)
        if count.good or count.rows == count.lost or empty:
            return
        here = [item for item in self.bad.items() if any(name == file for name, _ in item[1].first)]
        shown = (here or list(self.bad.items()))[:3]
        reasons = "; ".join(f"{name} ({reason.locations()})" for name, reason in shown)
        raise UserError(
            f"{file}: none of its {count.rows:,} rows is usable: {reasons}: {explain_expected_keys(kind, count.keys)}"
        )

    # ---- output ----
    @property
    def tokens(self) -> int:
        return sum(counts["tokens"] for counts in self.languages.values())

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def megabytes_per_second(self) -> float:
        """Megabytes of UTF-8 text tokenised per second of this run."""
        return self.text_bytes / 1e6 / max(self.seconds, 1e-9)

    def merge(self, other: dict[str, Any]) -> None:
        """Add the counts of another DataStats, given as its `to_dict`."""
        self.read += other["read"]
        self.kept += other["kept"]
        self.trained_tokens += other.get("trained_tokens", 0)
        self.bad.merge(other["bad"])
        self.dropped.merge(other["dropped"])
        self.changed.merge(other.get("shortened", {}))
        self.unused.merge(other.get("unused", {}))
        for language, counts in other["languages"].items():
            mine = self.languages.setdefault(language, {})
            for name, amount in counts.items():
                mine[name] = mine.get(name, 0) + amount
        self.histogram = [a + b for a, b in zip(self.histogram, other["lengths"].values(), strict=True)]
        for text in other.get("notes", ()):
            self.add_note(text)

    def to_dict(self) -> dict[str, Any]:
        """All counts as plain values for meta.json; without times, so that equal data gives equal files."""
        report: dict[str, Any] = {"read": self.read, "kept": self.kept, "dropped": self.dropped.to_dict()}
        report |= {"bad": self.bad.to_dict(), "languages": self.languages, "tokens": self.tokens}
        report["lengths"] = dict(zip(histogram_labels(), self.histogram, strict=True))
        if self.trained_tokens:
            report |= {"trained_tokens": self.trained_tokens}
        if self.trained_tokens or self.changed:
            report |= {"shortened": self.changed.to_dict()}
        if self.unused:
            report |= {"unused": self.unused.to_dict()}
        if self.notes:
            report["notes"] = self.notes
        return report

    def print_skipped(self) -> None:
        """Print one line per reason, for steps that print their own tables."""
        for kind, reasons in (("bad, left out", self.bad), ("skipped", self.dropped), ("kept, but", self.changed)):
            for name, reason in reasons.by_count():
                print(f"{kind}: {reason.count:,} x {name} (first: {reason.locations()})")
        self.print_notes()

    def print_notes(self) -> None:
        """Print one line per note, and one per key that has a value in some rows and is not used."""
        for note in self.notes:
            print(f"note: {note}")
        for key, reason in self.unused.by_count():
            print(f"note: {reason.count:,} rows have a `{key}` that is not used (first: {reason.locations()})")


def histogram_labels() -> list[str]:
    """Labels of the length bins: "<= 16" ... "<= 65536", "more"."""
    return [f"<= {FIRST_BIN_TOKENS << i}" for i in range(LENGTH_BINS)] + ["more"]
