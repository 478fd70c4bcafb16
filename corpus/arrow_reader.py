"""Rows of parquet and arrow files (IPC files and streams, what `datasets` saves), by batches, with pyarrow.

Nested structs and lists become dicts and lists; the line of a row is its number. A row group or a batch that cannot be
read ends the file, unless damage is accepted: then reading continues with the next one. Every batch is validated before
use: pyarrow trusts the offsets in a file, and wrong ones would read foreign memory.

Read next: txt_reader.py (the other formats).
"""

from collections.abc import Callable, Iterator
from typing import Any

from common.errors import UserError
from corpus.input_files import Source
from corpus.json_reader import Rows
from corpus.stats import DataReport

BATCH_ROWS = 1000
ARROW_MAGIC = 8  # bytes in front of the stream that every arrow file contains
END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream


def read_parquet(source: Source, report: DataReport) -> Rows:
    """Rows of a parquet file."""
    return _rows(source, report, "parquet", _parquet_parts)


def read_arrow(source: Source, report: DataReport) -> Rows:
    """Rows of an arrow file, in the file format ("ARROW1") or the streaming format."""
    return _rows(source, report, "arrow", _arrow_parts)


Part = tuple[Callable[[], Iterator[Any]], int]  # its record batches, and how many rows it has (0: unknown)


def _rows(source: Source, report: DataReport, form: str, parts_of: Callable[[Source], Iterator[Part]]) -> Rows:
    if source.packed:
        raise UserError(f"{source.name} is a packed {form} file: unpack it first")
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"reading {form} files needs one more package: pip install pyarrow") from None
    # What pyarrow raises for damaged files: its own errors, and those of Python for impossible sizes and names.
    errors = (pyarrow.ArrowException, OSError, EOFError, MemoryError, ValueError, OverflowError, NotImplementedError)
    number, done, parts = 0, 0, parts_of(source)
    while True:
        before, rows = number, 0
        try:
            part = next(parts, None)
            if part is None:
                return
            batches, rows = part
            done += 1
            for batch in batches():
                for row in _batch_rows(batch):
                    number += 1
                    source.line = number
                    if row is None:
                        report.unreadable("malformed UTF-8 or a value out of range", source.name, number)
                    else:
                        yield number, row
        except errors:
            rows = rows or number // max(1, done)  # unknown: as many as the others have
            source.damage(f"truncated or damaged {form} file", max(0, rows - (number - before)))
            if not report.accept_damaged:
                return


def _parquet_parts(source: Source) -> Iterator[Part]:
    """Row groups."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(source.raw, page_checksum_verification=True)
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        yield lambda group=group: file.iter_batches(BATCH_ROWS, row_groups=[group]), rows  # type: ignore[misc]


def _arrow_parts(source: Source) -> Iterator[Part]:
    """The batches of an arrow file; of a stream, or of a file without its end, all of them as one part."""
    import pyarrow.ipc

    is_file = source.head().startswith(b"ARROW1")
    try:
        reader = pyarrow.ipc.open_file(source.raw) if is_file else None
    except (pyarrow.ArrowException, OSError):  # without its end: a stream behind 8 bytes
        reader = None
    if reader is None:
        source.raw.seek(ARROW_MAGIC if is_file else 0)
        yield lambda: _slices(pyarrow.ipc.open_stream(source.raw)), 0
        if not source.damages and (is_file or not _ends_with(source, END)):
            raise EOFError  # of the writer: the stream was cut between two batches
        return
    for number in range(reader.num_record_batches):
        yield lambda number=number: _slices([reader.get_batch(number)]), 0  # type: ignore[misc]


def _ends_with(source: Source, end: bytes) -> bool:
    source.raw.seek(max(0, source.size - len(end)))
    return source.raw.read(len(end)) == end


def _slices(batches: Any) -> Iterator[Any]:
    for batch in batches:
        batch.validate(full=True)
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
