"""Tables as Markdown and csv, and progress bars.

Read next: report_markdown.py, exam_report.py (the pages).
"""

import csv
import io
from collections.abc import Iterable
from typing import Any, TypeVar

ItemT = TypeVar("ItemT")


def table_row(*cells: str) -> str:
    """A row of a Markdown table. The cells must be escaped (common/markdown.py)."""
    return f"| {' | '.join(cells)} |"


def csv_text(rows: list[dict[str, Any]]) -> str:
    """The rows as csv, with the keys of the first one as header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def with_progress(items: Iterable[ItemT], label: str, total: int | None = None) -> Iterable[ItemT]:
    """Yields the items, with a progress bar if stderr is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, label, total=total, console=console, disable=not console.is_terminal, transient=True)
