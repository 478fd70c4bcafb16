"""Plain-text reader, and the table of readers by format; all of them stream.

    FORMAT_READERS[sniff_format(input_file)](input_file, report)    -> (line, row): an object, or plain text (str)

Bad rows are counted in the report with their line and skipped. Memory is bounded: lines, paragraphs and JSON values are
read in chunks and have a maximum size.

Read next: json_reader.py, csv_reader.py, arrow_reader.py, sniff.py (format detection), readers.py (rows -> chats).
"""

from collections.abc import Iterator

from corpus.arrow_reader import read_arrow, read_parquet
from corpus.csv_reader import read_csv
from corpus.input_files import READ_CHUNK_BYTES, InputFile
from corpus.json_reader import NumberedRows, read_json, read_jsonl
from corpus.markers import DOCUMENT_MARKER_BYTES, split_line, uses_markers
from corpus.stats import DataStats

_CUT_MARKERS = (b". ", *(mark.encode() for mark in "。！？"), *DOCUMENT_MARKER_BYTES)  # where a very long line is split


def read_txt(input_file: InputFile, report: DataStats) -> NumberedRows:
    """Yields (first line, document).

    Blank lines separate documents, or markers such as <|endoftext|> if the first bytes of the file contain one.
    A document above READ_CHUNK_BYTES is split at line or sentence ends.
    """
    if uses_markers(input_file.head()):
        yield from _read_marked_txt(input_file, report)
        return
    start, block = 1, bytearray()
    for number, line in _text_lines(input_file):
        blank = line.isspace()
        if block and (blank or len(block) + len(line) > READ_CHUNK_BYTES):
            if text := _block_text(block, input_file, start, report):
                yield start, text
            block = bytearray()
        if not block:
            start = number
        if not blank:
            block += line
    if text := _block_text(block, input_file, start, report):
        yield start, text


def _read_marked_txt(input_file: InputFile, report: DataStats) -> NumberedRows:
    """Yields (first line, document) between markers; keeps blank lines inside documents."""
    start, block = 1, bytearray()
    for number, line in _text_lines(input_file):
        pieces = split_line(line)
        for i, piece in enumerate(pieces):
            if i or len(block) + len(piece) > READ_CHUNK_BYTES:  # a document ends before every piece except the first
                if text := _block_text(block, input_file, start, report):
                    yield start, text
                block = bytearray()
            if not block:
                start = number
            if block or not piece.isspace():
                block += piece
    if text := _block_text(block, input_file, start, report):
        yield start, text


def _text_lines(input_file: InputFile) -> Iterator[tuple[int, bytes]]:
    """Yields (line number, line). A very long line is split after sentences, or at least between characters."""
    number, pending = 1, b""
    while line := input_file.readline(READ_CHUNK_BYTES - len(pending)):
        input_file.line = number
        line = pending + line
        pending = b""
        if not line.endswith(b"\n") and len(line) == READ_CHUNK_BYTES:
            ends = [line.rfind(mark) + len(mark) for mark in _CUT_MARKERS if mark in line]
            cut = max(end for end in [*ends, 0])
            if cut < READ_CHUNK_BYTES // 2:
                cut = next(
                    (i for i in range(READ_CHUNK_BYTES - 1, READ_CHUNK_BYTES - 5, -1) if line[i] & 0xC0 != 0x80),
                    READ_CHUNK_BYTES,
                )
                opening = line.rfind(b"<|", cut - 20)  # do not split a marker
                cut = opening if opening > 0 else cut
            line, pending = line[:cut], line[cut:]
        yield number, line
        number += line.endswith(b"\n")
    if pending:
        yield number, pending


def _block_text(block: bytearray, input_file: InputFile, line: int, report: DataStats) -> str:
    """The text of a document; "" if it is empty, or malformed (counted)."""
    try:
        return block.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        report.row_unreadable(input_file.malformed_reason, input_file.name, line)
        return ""


FORMAT_READERS = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "txt": read_txt,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
