"""Files -> rows -> documents and chats, streaming: txt, jsonl, json, csv, parquet, arrow; also as .gz .xz .zst .bz2.

    read_rows(path, report)    -> (line, row): an object, or a piece of plain text (str)
    read_texts(paths, report)  -> Document(text, source_file, line)
    read_chats(paths, report)  -> Chat(messages, source_file, line)

The format is told from the content first and from the name second. What cannot be used (broken JSON, malformed UTF-8,
NUL, wrong types) is counted in the report with its line and skipped; the report raises UserError when too much is bad.
A damaged file (a compressed stream that breaks off, a disk that cannot be read) raises DamagedFile after its last
readable row, unless the report accepts it. Memory stays bounded: lines and paragraphs are read in pieces.

Read next: txt_reader.py (one reader a format), input_files.py (opening, telling the format), row_text.py (row -> text
or chat), stats.py (counts and limits), examples.py (duplicates, validation split).
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from corpus.chats import Message
from corpus.damage import DamagedFile, settle
from corpus.input_files import check_input, open_source
from corpus.layouts import KEYS
from corpus.markers import STRONG, has_marker, split_documents
from corpus.row_text import READER, Content, RowReader
from corpus.sniff import sniff
from corpus.stats import EMPTY_FILE, BadRow, DataReport, UnfitRow
from corpus.txt_reader import READERS, Rows

Path_ = str | os.PathLike[str]
_TEXT_KEYS = frozenset(KEYS["text"])


@dataclass(frozen=True)
class Document:
    text: str
    source_file: str
    line: int
    source: str = ""  # where it comes from, as its row says it


@dataclass(frozen=True)
class Chat:
    messages: list[Message]
    source_file: str
    line: int
    content: Content


# ---- the three readers -----------------------------------------------------------------------------------------------
def read_rows(path: Path_, report: DataReport) -> Rows:
    """Yields (line, row) of one file; a row is a dict, or a str for plain text. Bad rows are counted and skipped.

    A bare list of messages is a row, too; a text with separators such as <|endoftext|> is several rows.
    Raises UserError for a file that cannot be opened or is damaged, and when the report's cap of bad rows is exceeded.
    """
    file = os.fspath(path)
    before = report.position()
    with open_source(Path(file), skip_damage=bool(report.accept_damaged)) as source:
        report.position = lambda: before + source.position()
        if source.encoding.codec != "utf-8":
            report.note(f"{file}: read as {source.encoding.name}")
        form = sniff(source)
        for line, row in READERS[form](source, report):
            if not isinstance(row, str if form == "txt" else (dict, list)):
                report.unreadable("a row that is not an object", file, line)
                continue
            key = "" if form == "txt" else _document_key(row)
            if key or (form == "txt" and "<" in row):
                yield from ((line, part) for part in _without_markers(row, key, (file, line), report))
                continue
            report.saw_row(file, row)
            yield line, row
        settle(file, source.size, source.damages, source.line, report)
        report.position = lambda: before + source.size
    if file not in report.files:
        report.unreadable(EMPTY_FILE, file, 1)


def _document_key(row: Any) -> str:
    """The key of a document's text in which a separator may stand; "" for other rows."""
    if isinstance(row, dict):
        for key, value in row.items():
            if isinstance(value, str) and "<" in value and key in _TEXT_KEYS:
                return key if READER.document_key(row) == key else ""
    return ""


def _without_markers(row: Any, key: str, place: tuple[str, int], report: DataReport) -> Iterator[Any]:
    """The rows of a row whose text may hold document separators, each counted as read."""
    text = row[key] if key else row
    documents = split_documents(text)
    if not documents and text.strip():
        report.saw_row(place[0], row)
        report.drop("only a document separator", *place)
    for document in documents:
        part = {**row, key: document} if key else document
        report.saw_row(place[0], part)
        if has_marker(document):
            report.shorten(f"holds {' or '.join(m for m in STRONG if m in document)} as text", *place)
        yield part


def read_texts(
    paths: Iterable[Path_], report: DataReport, source_key: str = "", reader: RowReader = READER
) -> Iterator[Document]:
    """The documents of all files, in order. A chat counts as one document: its words, without markers.

    `source_key`: the key under which a row names its source.
    Raises UserError when a file has rows but none that can be used, or when too many rows are bad.
    """
    for file, line, row, content in taken_rows(paths, report, "text", reader.text):
        report.note_row(content.changes, [key for key in content.unused if key != source_key], file, line)
        yield Document(content.text, file, line, _source_of(row, source_key))


def read_chats(paths: Iterable[Path_], report: DataReport, reader: RowReader = READER) -> Iterator[Chat]:
    """The chats of all files, in order, as checked messages. Raises UserError as `read_texts` does."""
    for file, line, _, content in taken_rows(paths, report, "chat", reader.chat):
        yield Chat(content.messages, file, line, content)


def all_rows(paths: Iterable[Path_], report: DataReport, kind: str) -> Iterator[tuple[str, int, Any]]:
    """Rows of all files; after each file, and at the end, the report checks its limits. `kind`: see expected_keys."""
    files = [os.fspath(path) for path in paths]
    for file in files:
        check_input(file)
    report.input_total = sum(Path(file).stat().st_size for file in files)
    for file in files:
        try:
            for line, row in read_rows(file, report):
                yield file, line, row
        except DamagedFile:
            raise
        except UserError:
            report.check_file(file, kind)  # more specific than "too many bad rows"
            raise
        report.check_file(file, kind)
    report.check_cap()


def taken_rows(
    paths: Iterable[Path_], report: DataReport, kind: str, take: Callable[[Any], Content]
) -> Iterator[tuple[str, int, Any, Content]]:
    """(file, line, row, take(row)) of all rows.

    Rows for which `take` raises UnfitRow are dropped, those for which it raises BadRow are bad; both are counted.
    """
    for file, line, row in all_rows(paths, report, kind):
        try:
            content = take(row)
        except UnfitRow as reason:
            report.good_row(file)
            report.drop(str(reason), file, line)
        except BadRow as reason:
            report.bad_row(str(reason), file, line)
        else:
            report.good_row(file)
            yield file, line, row, content


def _source_of(row: Any, key: str) -> str:
    value = row.get(key) if isinstance(row, dict) else None
    return value if isinstance(value, str) else ""
