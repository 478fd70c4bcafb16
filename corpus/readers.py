"""One reader for each file format: an open Source -> (line, row), streaming.

    READERS[sniff(source)](source, report)    -> (line, row): an object, or a piece of plain text (str)

Bad rows are counted in the report with their line and skipped; nothing is raised. Memory is bounded: lines, paragraphs
and JSON values are read in pieces and have a maximum size.

Read next: sources.py (opening, telling the format), read.py (rows -> documents and chats).
"""

import codecs
import csv
import json
from collections.abc import Iterator
from typing import Any

from corpus.errors import UserError
from corpus.report import DataReport
from corpus.sources import PIECE, Source

MAX_LINE = 64 << 20  # bytes of one line of jsonl or csv; longer ones are bad rows

Rows = Iterator[tuple[int, Any]]


def _lines(source: Source, report: DataReport) -> Iterator[tuple[int, bytes]]:
    """(line number, line with its end); a line above MAX_LINE is a bad row."""
    number = 0
    while line := source.readline(MAX_LINE):
        number += 1
        source.line = number
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            while (rest := source.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
            report.unreadable(f"a line longer than {MAX_LINE >> 20} MB", source.name, number)
            continue
        yield number, line


def _read_jsonl(source: Source, report: DataReport) -> Rows:
    for number, line in _lines(source, report):
        if line.isspace():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            report.unreadable("malformed UTF-8", source.name, number)
        except (ValueError, RecursionError):
            report.unreadable("NUL character" if b"\0" in line else "broken JSON", source.name, number)
        else:
            yield number, row


def _read_json(source: Source, report: DataReport) -> Rows:
    """A JSON array, or objects one after the other over any number of lines, without holding the whole file."""
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode  # a bad byte spoils its row only
    parse = json.JSONDecoder(strict=False).raw_decode
    buffer, size, more, first, in_array = "", PIECE, True, True, False
    while True:
        stripped = buffer.lstrip(" \t\r\n,")
        source.line += buffer.count("\n", 0, len(buffer) - len(stripped))
        buffer = stripped
        if buffer.startswith("[") and first:
            buffer, first, in_array = buffer[1:], False, True
            continue
        if buffer.startswith("]") and in_array:
            return
        try:
            value, end = parse(buffer)
            whole = end < len(buffer) or isinstance(value, (dict, list, str)) or not more  # "12" may go on as "123"
        except (ValueError, RecursionError):
            whole = False
        if whole:
            first, size = False, PIECE
            yield source.line, value
            source.line += buffer.count("\n", 0, end)
            buffer = buffer[end:]
        elif more and len(buffer) < MAX_LINE:
            piece = source.read(size)
            more, size = bool(piece), min(2 * size, MAX_LINE)
            buffer += decode(piece, not piece)
        else:
            if buffer or (in_array and not source.damage):
                report.unreadable("broken JSON: the rest of the file is lost", source.name, source.line)
            return


def _read_csv(source: Source, report: DataReport) -> Rows:
    """Rows as {column: text}. Quotes double, backslashes are text, line ends inside quotes stay as they are."""
    csv.field_size_limit(MAX_LINE)
    lines = (line.decode("utf-8", "surrogateescape") for _, line in _lines(source, report))
    first = next(lines, "")
    delimiter = "\t" if first.count("\t") > first.count(",") else ","
    columns = [name.strip().lower() for name in next(csv.reader([first], delimiter=delimiter), [])]
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        number = rows.line_num + 2  # the row's first line; the header was line 1
        try:
            cells = next(rows, None)
        except csv.Error as error:
            report.unreadable("NUL character" if "NUL" in str(error) else "broken csv quoting", source.name, number)
            continue
        if cells is None:
            break
        if len(cells) != len(columns):
            if cells:
                report.unreadable("wrong number of csv columns", source.name, number)
            continue
        yield number, dict(zip(columns, cells, strict=True))


def _read_txt(source: Source, report: DataReport) -> Rows:
    """Documents are separated by blank lines; longer ones than PIECE come in several, cut at a line or sentence end."""
    start, block = 1, bytearray()
    for number, line in _text_lines(source):
        blank = line.isspace()
        if block and (blank or len(block) + len(line) > PIECE):
            yield from _text_block(block, source, start, report)
            block = bytearray()
        if not block:
            start = number
        if not blank:
            block += line
    if block:
        yield from _text_block(block, source, start, report)


def _text_lines(source: Source) -> Iterator[tuple[int, bytes]]:
    """(line number, line or piece of a very long line); pieces end after a sentence, or at least between characters."""
    number, pending = 1, b""
    while line := source.readline(PIECE - len(pending)):
        source.line = number
        line = pending + line
        pending = b""
        if not line.endswith(b"\n") and len(line) == PIECE:
            ends = [line.rfind(mark) + len(mark) for mark in (b". ", "。".encode(), "！".encode(), "？".encode())]
            cut = max(end for end in [*ends, 0])
            if cut < PIECE // 2:
                cut = next((i for i in range(PIECE - 1, PIECE - 5, -1) if line[i] & 0xC0 != 0x80), PIECE)
            line, pending = line[:cut], line[cut:]
        yield number, line
        number += line.endswith(b"\n")
    if pending:
        yield number, pending


def _text_block(block: bytearray, source: Source, line: int, report: DataReport) -> Rows:
    try:
        yield line, block.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        report.unreadable("malformed UTF-8", source.name, line)


def _read_parquet(source: Source, report: DataReport) -> Rows:
    """Rows by batches of 1,000; the line is the row's number."""
    if source.packed:
        source.damage = "a packed parquet file: unpack it first"
        return
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading parquet files needs one more package: pip install pyarrow") from None
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(source.raw).iter_batches(1000):
            for i in range(batch.num_rows):
                number += 1
                source.line = number
                try:
                    row = batch.slice(i, 1).to_pylist()[0]
                except (ValueError, OverflowError):
                    report.unreadable("malformed UTF-8 or a value out of range", source.name, number)
                else:
                    yield number, row
    except (pyarrow.ArrowException, OSError, EOFError):
        source.damage = "truncated or damaged parquet file"


READERS = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "txt": _read_txt, "parquet": _read_parquet}
