"""Progress bar over the bytes of the input files, for data_process.py and train_tokenizer.py."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from corpus.stats import DataStats


@contextlib.contextmanager
def reading_progress_bar(files: Sequence[str], stats: DataStats) -> Iterator[Callable[[], None]]:
    """Show on stderr how much of the files is read, if it is a terminal; yields the function that updates the bar."""
    total = sum(Path(file).stat().st_size for file in files)
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, transient=True, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=total)

        def on_batch() -> None:
            speed = f"{stats.megabytes_per_second:.1f} MB/s" if stats.text_bytes else "reading"
            bar.update(task, completed=stats.bytes_read(), description=f"{stats.read:,} rows  {speed}")

        yield on_batch
