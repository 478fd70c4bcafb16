"""Prints the statistics of a data pass as tables.

Read next: stats.py.
"""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from corpus.stats import DataStats, histogram_labels

PLAIN_WIDTH = 120  # of tables if stdout is not a terminal


def print_stats(stats: DataStats) -> None:
    """Print rows by reason, notes, languages, lengths and speed; plain text if stdout is not a terminal."""
    rows = [("read", stats.read, ""), ("kept", stats.kept, "")]
    for kind, reasons in (("kept, but ", stats.changed), ("dropped: ", stats.dropped), ("bad: ", stats.bad)):
        for name, reason in reasons.by_count():
            rows.append((kind + name, reason.count, reason.locations()))
    cells = [(name, f"{count:,}", f"{count / max(stats.read, 1):.2%}", where) for name, count, where in rows]
    print_table("rows", ("", "rows", "fraction", "first at"), cells, left=(0, 3))
    stats.print_notes()
    if stats.kept:
        _print_languages(stats)
    if stats.tokens:
        _print_lengths(stats.histogram)
    if stats.trained_tokens:
        print(f"trained tokens: {stats.trained_tokens:,} ({stats.trained_tokens / stats.tokens:.1%} of all)")
    if stats.text_bytes:
        megabytes, speed = stats.text_bytes / 1e6, stats.megabytes_per_second
        print(f"{megabytes:,.1f} MB of text in {stats.seconds:.1f} s: {speed:.2f} MB/s")


def _print_languages(stats: DataStats) -> None:
    headers = ["", "documents", "characters", "tokens", "fraction of tokens", "characters / token"]
    if not stats.tokens:  # prompts have none
        headers = headers[:3]
    rows = []
    for language, counts in sorted(stats.languages.items(), reverse=True):
        cells = [f"{counts[name]:,}" for name in headers[1:4]]
        text_tokens = counts["tokens"] - counts.get("markers", 0)
        fraction, ratio = counts["tokens"] / max(stats.tokens, 1), counts["characters"] / max(text_tokens, 1)
        rows.append((language, *cells, f"{fraction:.1%}", f"{ratio:.2f}")[: len(headers)])
    print_table("languages", headers, rows)


def _print_lengths(histogram: Sequence[int]) -> None:
    filled = [i for i, count in enumerate(histogram) if count]
    bins = list(zip(histogram_labels(), histogram, strict=True))[filled[0] : filled[-1] + 1]
    rows = [(label, f"{count:,}", "#" * round(40 * count / max(histogram))) for label, count in bins]
    print_table("length in tokens", ("tokens", "rows", ""), rows, left=(2,))


def print_table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> None:
    """Print a table. `left`: the columns that are aligned to the left; all others hold numbers."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(headers):
        table.add_column(name, justify="left" if number in left else "right", overflow="fold")
    for cells in rows:
        table.add_row(*map(Text, cells))  # Text, not str: rich would parse a file name like "[red]" as markup
    console.print(table)
