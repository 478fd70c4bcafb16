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

AGAIN = "copy or download the file again"


@dataclass(frozen=True)
class Damage:
    """A place of a file from which on bytes cannot be used. `position` and `lost` are bytes of the file on the disk."""

    reason: str
    position: int
    lost: int = 0  # 0: unknown, for example because the file ends too early
    rows: int = 0  # rows that are lost here, where the format says it; 0: to be estimated


class DamagedFile(UserError):
    """A file that is read only in part. The rows before the damage were delivered."""


def settle(file: str, size: int, damages: list[Damage], line: int, report: Any) -> None:
    """Count what the damages of a file cost, or raise DamagedFile unless the report accepts damaged files."""
    read = report.rows_of(file)
    lost = sum(damage.lost for damage in damages)
    for damage in damages:
        rows = damage.rows or max(1, round(read * damage.lost / max(1, size - lost)))
        place = f"{file}: damaged at byte {damage.position:,} of {size:,} ({damage.reason})"
        loss = "how many are lost is unknown"
        if damage.lost or damage.rows:
            loss = f"about {rows:,} are lost" + (f" ({damage.lost:,} bytes)" if damage.lost else "")
        text = f"{place}: {read:,} rows were read, {loss}"
        if not report.accept_damaged:
            way = ", or use what can be read with --accept_damaged" if report.accept_damaged is False else ""
            raise DamagedFile(f"{text}: {AGAIN}{way}")
        report.note(text)
        report.lose(damage.reason, file, line, rows)
