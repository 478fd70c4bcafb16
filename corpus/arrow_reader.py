"""Reads parquet and arrow files (IPC files and streams, as `datasets` saves them) batch by batch with pyarrow.

Nested structs and lists become dicts and lists; the line of a row is its number. An unreadable row group or batch ends
the file; if damage is accepted, reading continues with the next one. Every batch is validated before use: pyarrow
trusts the offsets in a file, and wrong offsets read memory outside the buffer.

Read next: readers.py (the caller).
"""

from collections.abc import Callable, Iterator
from typing import Any

from common.errors import UserError
from common.packages import require_packages
from corpus.damage import Damage
from corpus.input_files import InputFile, NumberedRows
from corpus.stats import DataStats

ARROW_BATCH_ROWS = 1000
ARROW_MAGIC_BYTES = 8  # bytes before the stream inside an arrow file
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"  # end-of-stream marker


def read_parquet(input_file: InputFile, report: DataStats) -> NumberedRows:
    """Yields (row number, row) of a parquet file."""
    return _read_rows(input_file, report, "parquet", _parquet_row_groups)


def read_arrow(input_file: InputFile, report: DataStats) -> NumberedRows:
    """Yields (row number, row) of an arrow file in the IPC file format ("ARROW1") or the IPC streaming format."""
    return _read_rows(input_file, report, "arrow", _arrow_row_groups)


RowGroup = tuple[Callable[[], Iterator[Any]], int]  # (opens its record batches, number of rows or 0 if unknown)


def _read_rows(
    input_file: InputFile,
    report: DataStats,
    format_name: str,
    open_row_groups: Callable[[InputFile], Iterator[RowGroup]],
) -> NumberedRows:
    if input_file.is_compressed:
        raise UserError(f"{input_file.name} is a compressed {format_name} file: unpack it first")
    require_packages(f"reading {format_name} files", "pyarrow")
    import pyarrow

    input_file.file.raises_errors = True
    # pyarrow raises its own errors for damaged files, and Python's for impossible sizes and names.
    errors = (pyarrow.ArrowException, OSError, EOFError, MemoryError, ValueError, OverflowError, NotImplementedError)
    number, num_groups, row_groups = 0, 0, open_row_groups(input_file)
    while True:
        before, rows = number, 0
        try:
            row_group = next(row_groups, None)
            if row_group is None:
                return
            batches, rows = row_group
            num_groups += 1
            for batch in batches():
                for row in _batch_rows(batch):
                    number += 1
                    input_file.line = number
                    if row is None:
                        report.row_unreadable("malformed UTF-8 or a value out of range", input_file.name, number)
                    else:
                        yield number, row
        except errors:
            rows = rows or number // max(1, num_groups)  # if unknown: the mean of the row groups before
            reason, lost_rows = f"truncated or damaged {format_name} file", max(0, rows - (number - before))
            input_file.damages.append(Damage(reason, input_file.raw.tell(), 0, lost_rows))
            if not report.accept_damaged:
                return


def _parquet_row_groups(input_file: InputFile) -> Iterator[RowGroup]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(input_file.raw, page_checksum_verification=True)
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        yield lambda group=group: file.iter_batches(ARROW_BATCH_ROWS, row_groups=[group]), rows  # type: ignore[misc]


def _arrow_row_groups(input_file: InputFile) -> Iterator[RowGroup]:
    """Yields the batches of an arrow file one by one; those of a stream or of a truncated file as one group."""
    import pyarrow.ipc

    is_file = input_file.head().startswith(b"ARROW1")
    try:
        reader = pyarrow.ipc.open_file(input_file.raw) if is_file else None
    except (pyarrow.ArrowException, OSError):  # no footer: read the stream after the magic bytes
        reader = None
    if reader is None:
        input_file.raw.seek(ARROW_MAGIC_BYTES if is_file else 0)
        yield lambda: _slice_batches(pyarrow.ipc.open_stream(input_file.raw)), 0
        if not input_file.damages and (is_file or not _ends_with(input_file, STREAM_END)):
            raise EOFError  # the stream was truncated between two batches
        return
    for number in range(reader.num_record_batches):
        yield lambda number=number: _slice_batches([reader.get_batch(number)]), 0  # type: ignore[misc]


def _ends_with(input_file: InputFile, end: bytes) -> bool:
    input_file.raw.seek(max(0, input_file.size - len(end)))
    return input_file.raw.read(len(end)) == end


def _slice_batches(batches: Any) -> Iterator[Any]:
    for batch in batches:
        batch.validate(full=True)
        for start in range(0, batch.num_rows, ARROW_BATCH_ROWS):
            yield batch.slice(start, ARROW_BATCH_ROWS)


def _batch_rows(batch: Any) -> list[dict[str, Any] | None]:
    """Returns the rows of a batch; None for a row that cannot be converted to Python objects."""
    try:
        rows: list[dict[str, Any] | None] = batch.to_pylist()
        return rows
    except (ValueError, OverflowError):
        return [None] if batch.num_rows == 1 else [_batch_rows(batch.slice(i, 1))[0] for i in range(batch.num_rows)]
