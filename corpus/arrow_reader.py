"""Rows of parquet and arrow files (IPC files and streams, what `datasets` saves), by batches, with pyarrow.

Nested structs and lists become dicts and lists; the line of a row is its number. A row group or a batch that cannot be
read ends the file, unless damage is accepted: then reading continues with the next one. Every batch is validated before
use: pyarrow trusts the offsets in a file, and wrong ones would read foreign memory.

Read next: txt_reader.py (the other formats).
"""

from collections.abc import Callable, Iterator
from typing import Any

from common.errors import UserError
from corpus.input_files import InputFile
from corpus.json_reader import NumberedRows
from corpus.stats import DataStats

ARROW_BATCH_ROWS = 1000
ARROW_MAGIC_BYTES = 8  # bytes in front of the stream that every arrow file contains
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream


def read_parquet(input_file: InputFile, report: DataStats) -> NumberedRows:
    """Rows of a parquet file."""
    return _read_rows(input_file, report, "parquet", _parquet_row_groups)


def read_arrow(input_file: InputFile, report: DataStats) -> NumberedRows:
    """Rows of an arrow file, in the file format ("ARROW1") or the streaming format."""
    return _read_rows(input_file, report, "arrow", _arrow_row_groups)


RowGroup = tuple[Callable[[], Iterator[Any]], int]  # its record batches, and how many rows it has (0: unknown)


def _read_rows(
    input_file: InputFile,
    report: DataStats,
    format_name: str,
    open_row_groups: Callable[[InputFile], Iterator[RowGroup]],
) -> NumberedRows:
    if input_file.is_compressed:
        raise UserError(f"{input_file.name} is a packed {format_name} file: unpack it first")
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"reading {format_name} files needs one more package: pip install pyarrow") from None
    # What pyarrow raises for damaged files: its own errors, and those of Python for impossible sizes and names.
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
            rows = rows or number // max(1, num_groups)  # unknown: as many as the others have
            input_file.add_damage(f"truncated or damaged {format_name} file", max(0, rows - (number - before)))
            if not report.accept_damaged:
                return


def _parquet_row_groups(input_file: InputFile) -> Iterator[RowGroup]:
    """Row groups."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(input_file.raw, page_checksum_verification=True)
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        yield lambda group=group: file.iter_batches(ARROW_BATCH_ROWS, row_groups=[group]), rows  # type: ignore[misc]


def _arrow_row_groups(input_file: InputFile) -> Iterator[RowGroup]:
    """The batches of an arrow file; of a stream, or of a file without its end, all of them as one part."""
    import pyarrow.ipc

    is_file = input_file.head().startswith(b"ARROW1")
    try:
        reader = pyarrow.ipc.open_file(input_file.raw) if is_file else None
    except (pyarrow.ArrowException, OSError):  # without its end: a stream behind 8 bytes
        reader = None
    if reader is None:
        input_file.raw.seek(ARROW_MAGIC_BYTES if is_file else 0)
        yield lambda: _slice_batches(pyarrow.ipc.open_stream(input_file.raw)), 0
        if not input_file.damages and (is_file or not _ends_with(input_file, STREAM_END)):
            raise EOFError  # of the writer: the stream was cut between two batches
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
