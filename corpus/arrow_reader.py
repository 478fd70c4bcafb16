"""Rows of parquet and arrow files (IPC files and streams, what `datasets` saves), by batches, with pyarrow.

Nested structs and lists become dicts and lists; the line of a row is its number.

Read next: readers.py (the other formats).
"""

from collections.abc import Iterator
from typing import Any

from common.errors import UserError
from corpus.json_reader import Rows
from corpus.report import DataReport
from corpus.sources import Source

BATCH_ROWS = 1000


def read_parquet(source: Source, report: DataReport) -> Rows:
    """Rows of a parquet file."""
    return _rows(source, report, "parquet")


def read_arrow(source: Source, report: DataReport) -> Rows:
    """Rows of an arrow file, in the file format ("ARROW1") or the streaming format."""
    return _rows(source, report, "arrow")


def _rows(source: Source, report: DataReport, form: str) -> Rows:
    if source.packed:
        source.damage = f"a packed {form} file: unpack it first"
        return
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"reading {form} files needs one more package: pip install pyarrow") from None
    number = 0
    try:
        for batch in _batches(source, form):
            for row in _batch_rows(batch):
                number += 1
                source.line = number
                if row is None:
                    report.unreadable("malformed UTF-8 or a value out of range", source.name, number)
                else:
                    yield number, row
    except (pyarrow.ArrowException, OSError, EOFError):
        source.damage = f"truncated or damaged {form} file"


def _batches(source: Source, form: str) -> Iterator[Any]:
    import pyarrow.ipc
    import pyarrow.parquet

    if form == "parquet":
        yield from pyarrow.parquet.ParquetFile(source.raw).iter_batches(BATCH_ROWS)
        return
    if source.head().startswith(b"ARROW1"):
        reader = pyarrow.ipc.open_file(source.raw)
        batches: Iterator[Any] = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        batches = iter(pyarrow.ipc.open_stream(source.raw))
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch; None for one that Python cannot hold."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError):
        pass
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0]
        except (ValueError, OverflowError):
            yield None
