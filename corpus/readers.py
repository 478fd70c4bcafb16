"""Reads documents and chats from txt, jsonl, json, csv, parquet and arrow files, also as .gz .xz .zst .bz2; streaming.

    read_rows(path, report)      -> (line, row): an object, or a plain-text document (str)
    read_texts(paths, report)    -> Document(text, source_file, line, source)
    read_chats(paths, report)    -> ParsedChat(messages, source_file, line, content)

The content determines the format; the file name decides only if it is ambiguous. Unusable rows (broken JSON, malformed
UTF-8, NUL, wrong types) are counted in the report with their line and skipped; the report raises UserError if there are
too many. A damaged file (a truncated stream, a read error) raises DamagedFile after its last readable row, unless the
report accepts damaged files. Memory is bounded: lines and paragraphs are read in chunks.

Read next: json_reader.py, txt_reader.py, csv_reader.py, arrow_reader.py (formats), input_files.py (opens files),
sniff.py (format detection), row_text.py (row -> text or chat), stats.py (counts and limits).
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import PathLike
from corpus.arrow_reader import read_arrow, read_parquet
from corpus.chats import Message
from corpus.csv_reader import read_csv
from corpus.damage import DamagedFile, count_damages
from corpus.input_files import InputFile, NumberedRows, require_readable
from corpus.json_reader import read_json, read_jsonl
from corpus.layouts import FIELD_KEYS
from corpus.row_text import DEFAULT_READER, RowContent, RowReader
from corpus.sniff import sniff_format
from corpus.stats import EMPTY_FILE, BadRow, DataStats, DroppedRow
from corpus.txt_reader import DOCUMENT_MARKERS, has_marker, read_txt, split_documents

FORMAT_READERS: dict[str, Callable[[InputFile, DataStats], NumberedRows]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "txt": read_txt,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
_TEXT_KEYS = frozenset(FIELD_KEYS["text"])


@dataclass(frozen=True)
class Document:
    text: str
    source_file: str
    line: int
    source: str = ""  # the row's value under `source_key` of read_texts


@dataclass(frozen=True)
class ParsedChat:
    messages: list[Message]
    source_file: str
    line: int
    content: RowContent


# ---- rows ------------------------------------------------------------------------------------------------------------
def read_rows(path: PathLike, report: DataStats, kind: str = "") -> NumberedRows:
    """Yields (line, row) of one file; a row is a dict, a list of messages, or a str for plain text.

    Bad rows are counted and skipped. A text with separators such as <|endoftext|> is several rows.
    Raises UserError if the file cannot be opened or is damaged, or if too many rows are bad; if none is usable and
    `kind` is given, with the keys that such rows need (explain_expected_keys).
    """
    file = os.fspath(path)
    before = report.bytes_read()
    try:
        with InputFile(Path(file), skip_damage=bool(report.accept_damaged)) as source:
            report.bytes_read = lambda: before + source.raw.tell()
            if source.encoding.codec != "utf-8":
                report.add_note(f"{file}: read as {source.encoding.name}")
            file_format = sniff_format(source)
            row_types = str if file_format == "txt" else (dict, list)
            for line, row in FORMAT_READERS[file_format](source, report):
                if not isinstance(row, row_types):
                    report.row_unreadable("a row that is not an object", file, line)
                elif (key := _document_key(row)) is not None:
                    for part in _split_at_markers(row, key, (file, line), report):
                        report.row_read(file, part)
                        yield line, part
                else:
                    report.row_read(file, row)
                    yield line, row
            count_damages(file, source.size, source.damages, source.line, report)
            report.bytes_read = lambda: before + source.size
    except DamagedFile:
        raise
    except UserError:
        if kind:
            report.check_file(file, kind)  # raises a more specific error than "too many bad rows"
        raise
    if file not in report.files:
        report.row_unreadable(EMPTY_FILE, file, 1)


def _document_key(row: Any) -> str | None:
    """The key of a document whose text may contain separators, "" for plain text; None for other rows."""
    if isinstance(row, str):
        return "" if "<" in row else None
    if isinstance(row, dict):
        for key, value in row.items():
            if isinstance(value, str) and "<" in value and key in _TEXT_KEYS:
                return key if DEFAULT_READER.document_key(row) == key else None
    return None


def _split_at_markers(row: Any, key: str, location: tuple[str, int], report: DataStats) -> list[Any]:
    """Splits a row at document separators. A row of separators only counts as dropped."""
    text = row[key] if key else row
    documents = split_documents(text)
    if not documents and text.strip():
        report.row_read(location[0], row)
        report.row_dropped("only a document separator", *location)
    for document in documents:
        if has_marker(document):
            markers = " or ".join(marker for marker in DOCUMENT_MARKERS if marker in document)
            report.row_truncated(f"contains {markers} as text", *location)
    return [{**row, key: document} for document in documents] if key else documents


# ---- documents and chats ---------------------------------------------------------------------------------------------
def read_texts(
    paths: Iterable[PathLike], report: DataStats, source_key: str = "", reader: RowReader = DEFAULT_READER
) -> Iterator[Document]:
    """Yields the documents of all files, in order. A chat is one document: its text without role markers.

    `source_key`: the row key whose value becomes `Document.source`.
    Raises UserError if a file has rows but no usable one, or if too many rows are bad.
    """
    for file, line, row, content in read_contents(paths, report, "text", reader.read_text):
        report.row_changed(content.changes, [key for key in content.unused if key != source_key], file, line)
        source = row.get(source_key) if isinstance(row, dict) else None
        yield Document(content.text, file, line, source if isinstance(source, str) else "")


def read_chats(
    paths: Iterable[PathLike], report: DataStats, reader: RowReader = DEFAULT_READER
) -> Iterator[ParsedChat]:
    """Yields the chats of all files, in order, as validated messages. Raises UserError as `read_texts` does."""
    for file, line, _, content in read_contents(paths, report, "chat", reader.read_chat):
        yield ParsedChat(content.messages, file, line, content)


def read_contents(
    paths: Iterable[PathLike], report: DataStats, kind: str, parse: Callable[[Any], RowContent]
) -> Iterator[tuple[str, int, Any, RowContent]]:
    """Yields (file, line, row, parse(row)) of all rows; checks the limits of the report after each file.

    A row for which `parse` raises DroppedRow counts as dropped, one for which it raises BadRow counts as bad.
    `kind`: see explain_expected_keys.
    """
    files = [os.fspath(path) for path in paths]
    for file in files:
        require_readable(file)
    report.input_bytes = sum(Path(file).stat().st_size for file in files)
    for file in files:
        for line, row in read_rows(file, report, kind):
            try:
                content = parse(row)
            except DroppedRow as reason:
                report.row_ok(file)
                report.row_dropped(str(reason), file, line)
            except BadRow as reason:
                report.row_bad(str(reason), file, line)
            else:
                report.row_ok(file)
                yield file, line, row, content
        report.check_file(file, kind)
    report.check_cap()
