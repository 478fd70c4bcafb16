"""Damaged files: an error with its place, or, with --accept_damaged, a counted loss.

    a.jsonl.gz: damaged at byte 81,920 of 120,000 (a gzip stream that breaks off): 3,000 rows were read, about 1,400 are
    lost (38,080 bytes): ...

A compressed stream that breaks off, a parquet file without its end and a disk that cannot be read lose rows that were
never seen. They are estimated by bytes: rows read / bytes read * bytes lost, at least 1 for each damaged place.

Read next: compression.py and input_files.py (where damage is found), stats.py (how it counts).
"""

from dataclasses import dataclass
from typing import Any

from common.errors import UserError

COPY_FILE_AGAIN = "copy or download the file again"


@dataclass(frozen=True)
class Damage:
    """A place of a file from which on bytes cannot be used. `position` and `lost` are bytes of the file on the disk."""

    reason: str
    offset: int
    lost_bytes: int = 0  # 0: unknown, for example because the file ends too early
    lost_rows: int = 0  # rows that are lost here, where the format says it; 0: to be estimated


class DamagedFile(UserError):
    """A file that is read only in part. The rows before the damage were delivered."""


def count_damages(file: str, size: int, damages: list[Damage], line: int, report: Any) -> None:
    """Count what the damages of a file cost, or raise DamagedFile unless the report accepts damaged files."""
    read = report.num_rows_in(file)
    lost_bytes = sum(damage.lost_bytes for damage in damages)
    for damage in damages:
        rows = damage.lost_rows or max(1, round(read * damage.lost_bytes / max(1, size - lost_bytes)))
        location = f"{file}: damaged at byte {damage.offset:,} of {size:,} ({damage.reason})"
        loss = "how many are lost is unknown"
        if damage.lost_bytes or damage.lost_rows:
            loss = f"about {rows:,} are lost" + (f" ({damage.lost_bytes:,} bytes)" if damage.lost_bytes else "")
        text = f"{location}: {read:,} rows were read, {loss}"
        if not report.accept_damaged:
            alternative = ", or use what can be read with --accept_damaged" if report.accept_damaged is False else ""
            raise DamagedFile(f"{text}: {COPY_FILE_AGAIN}{alternative}")
        report.add_note(text)
        report.rows_lost(damage.reason, file, line, rows)
