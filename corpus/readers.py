"""Reads documents and chats from txt, jsonl, json, csv, parquet and arrow files, also as .gz .xz .zst .bz2; streaming.

    read_rows(path, report)      -> (line, row): an object, or a plain-text document (str)
    read_texts(paths, report)    -> Document(text, source_file, line, source)
    read_chats(paths, report)    -> ParsedChat(messages, source_file, line, content)

The content determines the format; the file name decides only if it is ambiguous. Unusable rows (broken JSON, malformed
UTF-8, NUL, wrong types) are counted in the report with their line and skipped; the report raises UserError if there are
too many. A damaged file (a truncated stream, a read error) raises DamagedFile after its last readable row, unless the
report accepts damaged files. Memory is bounded: lines and paragraphs are read in chunks.

Read next: txt_reader.py (readers by format), input_files.py (opens files), sniff.py (format detection), row_text.py
(row -> text or chat), stats.py (counts and limits), examples.py (duplicates, validation split).
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import PathLike
from corpus.chats import Message
from corpus.damage import DamagedFile, count_damages
from corpus.input_files import open_input, require_readable
from corpus.layouts import FIELD_KEYS
from corpus.markers import DOCUMENT_MARKERS, has_marker, split_documents
from corpus.row_text import DEFAULT_READER, RowContent, RowReader
from corpus.sniff import sniff_format
from corpus.stats import EMPTY_FILE, BadRow, DataStats, DroppedRow
from corpus.txt_reader import FORMAT_READERS, NumberedRows

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


# ---- readers ---------------------------------------------------------------------------------------------------------
def read_rows(path: PathLike, report: DataStats) -> NumberedRows:
    """Yields (line, row) of one file; a row is a dict, a list of messages, or a str for plain text.

    Bad rows are counted and skipped. A text with separators such as <|endoftext|> is several rows.
    Raises UserError if the file cannot be opened or is damaged, or if too many rows are bad.
    """
    file = os.fspath(path)
    before = report.bytes_read()
    with open_input(Path(file), skip_damage=bool(report.accept_damaged)) as source:
        report.bytes_read = lambda: before + source.bytes_read()
        if source.encoding.codec != "utf-8":
            report.add_note(f"{file}: read as {source.encoding.name}")
        file_format = sniff_format(source)
        for line, row in FORMAT_READERS[file_format](source, report):
            if not isinstance(row, str if file_format == "txt" else (dict, list)):
                report.row_unreadable("a row that is not an object", file, line)
                continue
            key = "" if file_format == "txt" else _document_key(row)
            if key or (file_format == "txt" and "<" in row):
                yield from ((line, part) for part in _split_at_markers(row, key, (file, line), report))
                continue
            report.row_read(file, row)
            yield line, row
        count_damages(file, source.size, source.damages, source.line, report)
        report.bytes_read = lambda: before + source.size
    if file not in report.files:
        report.row_unreadable(EMPTY_FILE, file, 1)


def _document_key(row: Any) -> str:
    """The key of a document whose text may contain separators; "" for other rows."""
    if isinstance(row, dict):
        for key, value in row.items():
            if isinstance(value, str) and "<" in value and key in _TEXT_KEYS:
                return key if DEFAULT_READER.document_key(row) == key else ""
    return ""


def _split_at_markers(row: Any, key: str, location: tuple[str, int], report: DataStats) -> Iterator[Any]:
    """Splits a row at document separators and yields the parts as rows, each counted as read."""
    text = row[key] if key else row
    documents = split_documents(text)
    if not documents and text.strip():
        report.row_read(location[0], row)
        report.row_dropped("only a document separator", *location)
    for document in documents:
        part = {**row, key: document} if key else document
        report.row_read(location[0], part)
        if has_marker(document):
            report.row_truncated(
                f"contains {' or '.join(m for m in DOCUMENT_MARKERS if m in document)} as text", *location
            )
        yield part


def read_texts(
    paths: Iterable[PathLike], report: DataStats, source_key: str = "", reader: RowReader = DEFAULT_READER
) -> Iterator[Document]:
    """Yields the documents of all files, in order. A chat is one document: its text without role markers.

    `source_key`: the row key whose value becomes `Document.source`.
    Raises UserError if a file has rows but no usable one, or if too many rows are bad.
    """
    for file, line, row, content in read_contents(paths, report, "text", reader.read_text):
        report.row_changed(content.changes, [key for key in content.unused if key != source_key], file, line)
        yield Document(content.text, file, line, _row_source(row, source_key))


def read_chats(
    paths: Iterable[PathLike], report: DataStats, reader: RowReader = DEFAULT_READER
) -> Iterator[ParsedChat]:
    """Yields the chats of all files, in order, as validated messages. Raises UserError as `read_texts` does."""
    for file, line, _, content in read_contents(paths, report, "chat", reader.read_chat):
        yield ParsedChat(content.messages, file, line, content)


def read_all_rows(paths: Iterable[PathLike], report: DataStats, kind: str) -> Iterator[tuple[str, int, Any]]:
    """Yields (file, line, row) of all files; checks the limits of the report after each file and at the end.

    `kind`: see explain_expected_keys.
    """
    files = [os.fspath(path) for path in paths]
    for file in files:
        require_readable(file)
    report.input_bytes = sum(Path(file).stat().st_size for file in files)
    for file in files:
        try:
            for line, row in read_rows(file, report):
                yield file, line, row
        except DamagedFile:
            raise
        except UserError:
            report.check_file(file, kind)  # raises a more specific error than "too many bad rows"
            raise
        report.check_file(file, kind)
    report.check_cap()


def read_contents(
    paths: Iterable[PathLike], report: DataStats, kind: str, parse: Callable[[Any], RowContent]
) -> Iterator[tuple[str, int, Any, RowContent]]:
    """Yields (file, line, row, parse(row)) of all rows.

    A row for which `parse` raises DroppedRow counts as dropped, one for which it raises BadRow counts as bad.
    """
    for file, line, row in read_all_rows(paths, report, kind):
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


def _row_source(row: Any, key: str) -> str:
    value = row.get(key) if isinstance(row, dict) else None
    return value if isinstance(value, str) else ""
