"""Damaged files: an error with the byte offset or, with --accept_damaged, an estimated number of lost rows.

    a.jsonl.gz: damaged at byte 81,920 of 120,000 (truncated gzip stream): 3,000 rows were read, about 1,400 are
    lost (38,080 bytes): ...

Truncated streams and files and disk read errors lose an unknown number of rows. The estimate is
rows read / bytes read * bytes lost, at least 1 for each damage.

Read next: compression.py and input_files.py (detect damage), stats.py (counts rows).
"""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError

COPY_FILE_AGAIN = "copy or download the file again"


@dataclass(frozen=True)
class Damage:
    """An unusable region of a file. `offset` and `lost_bytes` count bytes of the file on disk."""

    reason: str
    offset: int
    lost_bytes: int = 0  # 0: unknown, for example in a truncated file
    lost_rows: int = 0  # as stated by the format; 0: estimated from bytes


class DamagedFile(UserError):
    """Raised for a file that can be read only in part, after its readable rows were yielded."""


class DataFile(io.FileIO):
    """A file opened for reading. A read error ends it and is recorded in `damages`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.size = os.fstat(self.fileno()).st_size
        self.damages: list[Damage] = []
        self.has_failed = False
        self.raises_errors = False  # True: read errors are raised instead

    def readinto(self, target: Any) -> int:
        try:
            return 0 if self.has_failed else super().readinto(target) or 0
        except OSError as error:
            if self.raises_errors:
                raise
            self.has_failed = True
            self.damages.append(Damage(describe_read_error(error), self.tell(), self.size - self.tell()))
            return 0


def describe_read_error(error: OSError) -> str:
    return f"cannot be read: {error.strerror or error}"


def count_damages(file: str, size: int, damages: list[Damage], line: int, report: Any) -> None:
    """Counts the rows lost to damage. Raises DamagedFile unless the report accepts damaged files."""
    read = report.num_rows_in(file)
    lost_bytes = sum(damage.lost_bytes for damage in damages)
    for damage in damages:
        rows = damage.lost_rows or max(1, round(read * damage.lost_bytes / max(1, size - lost_bytes)))
        location = f"{file}: damaged at byte {damage.offset:,} of {size:,} ({damage.reason})"
        loss = "the number of lost rows is unknown"
        if damage.lost_bytes or damage.lost_rows:
            loss = f"about {rows:,} are lost" + (f" ({damage.lost_bytes:,} bytes)" if damage.lost_bytes else "")
        text = f"{location}: {read:,} rows were read, {loss}"
        if not report.accept_damaged:
            alternative = ", or use what can be read with --accept_damaged" if report.accept_damaged is False else ""
            raise DamagedFile(f"{text}: {COPY_FILE_AGAIN}{alternative}")
        report.add_note(text)
        report.rows_lost(damage.reason, file, line, rows)
