"""Reading JSON as it is found: a value on each line, arrays, one object around the rows, the layouts of pandas.

    {"text": ...}                       jsonl: a row on each line, also with a comma at its end or [ and ] around all
    [{"role": ..., "content": ...}]     a list of messages is one chat; a list of other objects is a list of rows
    [{"text": ...}, {"text": ...}]      an array over any number of lines; also objects one after the other
    {"data": [{"text": ...}, ...]}      an object around a list of rows, under any name (pandas: orient="table")
    {"text": {"0": ..., "1": ...}}      pandas: orient="columns", "index" ({"0": {"text": ...}}), "split", and
    {"text": [..., ...]}                lists of equal length; these four are held in memory, up to MAX_LINE

Arrays of any size are streamed.

Read next: sniff.py (which of the two readers a file gets), readers.py (rows -> documents and chats).
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from corpus.input_files import Source
from corpus.json_stream import LOST, MAX_LINE, Broken, JsonStream, is_message
from corpus.stats import DataReport

NO_END = "a JSON array without its end: the file may be cut"
LONG_LINE = 1 << 20  # bytes of a broken line that counts as the rows it may have held
WHOLE = 1 << 20  # characters up to which one object is read as a whole before it is searched for a list of rows
CHAT_LISTS = frozenset(
    (
        "messages",
        "conversations",
        "conversation",
        "dialogue",
        "dialog",
        "dialogs",
        "chat",
        "turns",
        "chosen",
        "rejected",
        "history",
        "answers",
        "completions",
        "responses",
    )
)

Rows = Iterator[tuple[int, Any]]


def lines_of(source: Source, report: DataReport) -> Iterator[tuple[int, bytes]]:
    """(line number, line with its end); a line above MAX_LINE is a bad row, or as many as it may have held."""
    number = size = 0
    while line := source.readline(MAX_LINE):
        number += 1
        source.line = number
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            long = len(line)
            while rest := source.readline(1 << 20):
                long += len(rest)
                if rest.endswith(b"\n"):
                    break
            rows = report.rows_in(source.name, long, size + long)
            report.unreadable(f"a line longer than {MAX_LINE >> 20} MB", source.name, number, rows)
            continue
        size += len(line)
        yield number, line


# ---- a value on each line --------------------------------------------------------------------------------------------
def read_jsonl(source: Source, report: DataReport) -> Rows:
    """Rows of a file with a JSON value on each line."""
    size = 0
    for number, line in lines_of(source, report):
        size += len(line)
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            if is_array(line):
                yield from _rows_of_line(line, source, report)
            else:
                report.unreadable(source.malformed, source.name, number, _rows_of_broken(line, size, source, report))
            continue
        except (ValueError, RecursionError):
            text = line.decode().strip(" \t\r\n\v\f\ufeff")
            if text in ("", "[", "]", ",", "],"):
                continue
            try:
                row = loose_value(text)
            except (ValueError, RecursionError):
                if is_array(line):
                    yield from _rows_of_line(line, source, report)
                else:
                    rows = _rows_of_broken(line, size, source, report)
                    report.unreadable(_why_broken(text), source.name, number, rows)
                continue
        if isinstance(row, list):
            yield from ((number, item) for item in rows_of_list(row))
        else:
            yield number, row


def is_array(line: bytes) -> bool:
    """Whether a line that is broken is an array of several objects, whose other objects can be read."""
    line = line.strip(b" \t\r\n,")
    return line.startswith(b"[") and line.endswith(b"]") and re.search(rb"\}\s{0,9},\s{0,9}\{", line) is not None


def _rows_of_line(line: bytes, source: Source, report: DataReport) -> Rows:
    number, pieces = source.line, iter([line.strip()])
    for _, row in _array(JsonStream(lambda size: next(pieces, b""), source, report)):
        yield number, row


def _rows_of_broken(line: bytes, size: int, source: Source, report: DataReport) -> int:
    """How many rows a broken line stands for: one, or, where it is long enough to be a lost line end, an estimate."""
    return report.rows_in(source.name, len(line), size) if len(line) > LONG_LINE else 1


def loose_value(text: str) -> Any:
    """The JSON value of a line that may have been cut out of an array: [ before it, a comma or ] after it."""
    text = text.strip(" \t\r\n\ufeff").removesuffix(",").rstrip()
    if text.startswith("[") and not text.endswith("]"):
        text = text[1:]
    elif text.endswith("]") and not text.startswith("["):
        text = text[:-1].rstrip().removesuffix(",")
    return json.loads(text)


def rows_of_list(items: list[Any]) -> list[Any]:
    """The rows of a list on one line, or inside an array: a list of turns is one chat, other objects are rows."""
    if not items or not all(isinstance(item, dict) for item in items):
        return [items]  # not a row: the caller counts it as bad
    if all(is_message(item) or "human" in item or "assistant" in item for item in items):
        return [{"messages": items}]
    return items


def _why_broken(text: str) -> str:
    if "\0" in text:
        return "NUL character"
    return "Python notation (single quotes), not JSON" if text.startswith(("{'", "[{'")) else "broken JSON"


# ---- values over any number of lines ---------------------------------------------------------------------------------
def read_json(source: Source, report: DataReport) -> Rows:
    """Rows of arrays, of objects one after the other, and of one object around them, without holding the whole file."""
    stream = JsonStream(source.read, source, report)
    while start := stream.peek():
        line = source.line
        try:
            if start == "{" and not stream.rows:
                yield from _first_object(stream, report)
            elif start == "[":
                yield from _array(stream)
            elif start in "]}:" and stream.damaged:  # of what is damaged
                stream.skip(stream.start + 1)
            elif (value := stream.row()) is not LOST:
                yield line, value
        except Broken as reason:
            if reason.final:
                report.unreadable(str(reason), source.name, source.line)
                return
            stream.recover(reason)


def _array(stream: JsonStream, objects_only: bool = False) -> Rows:
    """The elements of an array as rows; if the first is a message, all together as one row, a list."""
    source = stream.source
    begin, line, chat, is_chat, whole = stream.consumed, source.line, [], None, True
    stream.take("[")
    while stream.peek() not in ("]", ""):
        at = source.line
        value = stream.row()
        if value is LOST:
            whole = False
            continue
        is_chat = is_message(value) if is_chat is None else is_chat
        if is_chat:
            chat.append(value)
            if stream.consumed - begin > MAX_LINE:
                raise Broken(f"a chat above {MAX_LINE >> 20} MB: the rest of the file is not read", 0, final=True)
        elif isinstance(value, list):
            lists = value if all(_is_chat_list(item) for item in value) and value else [value]
            yield from ((at, row) for items in lists for row in rows_of_list(items))
        elif isinstance(value, dict) and stream.rows == 1 and not stream.peek() and (rows := rows_inside(value)):
            yield from ((at, row) for row in rows)  # an object around the rows, behind a bracket too many
        elif isinstance(value, dict) or not objects_only:
            yield at, value
    if stream.peek():
        stream.take("]")
    elif not source.damages and not stream.damaged:
        stream.report.unreadable(NO_END, source.name, source.line)
    if chat and whole:  # of a chat with a damaged message the rest would be another one
        yield line, {"messages": chat}


def _is_chat_list(value: Any) -> bool:
    """Whether a value is a list of messages: a list of such is an array behind a bracket too many."""
    return isinstance(value, list) and bool(value) and is_message(value[0])


def _first_object(stream: JsonStream, report: DataReport) -> Rows:
    """The first object of a file: one row, or the object that contains the rows if nothing follows it."""
    line, begin = stream.source.line, stream.consumed
    try:
        value = stream.value(WHOLE)
    except Broken as reason:
        if _holds_rows(stream) and (reason.at >= len(stream.text) or not _begins_with(stream, stream.likely_key())):
            yield from _rows_of_long_object(stream, report)
        elif (value := stream.row()) is not LOST:
            yield line, value
        return
    after = stream.peek()
    rows = rows_inside(value) if after in ("", "]", "}") else None
    if rows is None:
        stream.count_row(value, begin)
        yield line, value
        return
    if len(lists := _row_lists(value)) > 1:
        _note_lists(stream, report, lists)
    yield from ((line, row) for row in rows)


def _begins_with(stream: JsonStream, key: str) -> bool:
    """Whether the object ahead begins with this key, as the rows do: then it is one of them."""
    match = _KEY.match(stream.text, stream.start + 1)
    return match is not None and match[1] == key


def _note_lists(stream: JsonStream, report: DataReport, names: list[str]) -> None:
    report.note(f"{stream.source.name}: the rows of all its lists are read: {', '.join(names)}")


def _row_lists(value: dict[str, Any]) -> list[str]:
    """The keys of an object under which there are lists of rows."""
    return [key for key, items in value.items() if key not in CHAT_LISTS and isinstance(items, list) and items
            and all(isinstance(item, (dict, list)) for item in items) and not is_message(items[0])]  # fmt: skip


def rows_inside(value: dict[str, Any]) -> list[Any] | None:
    """The rows of an object that stands alone in its file; None when it is a row itself."""
    columns = list(value.values())
    if {"columns", "data"} <= value.keys() and isinstance(value["columns"], list) and isinstance(value["data"], list):
        names = [str(name) for name in value["columns"]]
        fits = [isinstance(cells, list) and len(cells) == len(names) for cells in value["data"]]
        return [dict(zip(names, c, strict=True)) if fit else c for c, fit in zip(value["data"], fits, strict=True)]
    if lists := _row_lists(value):
        items = [item for key in lists for item in value[key]]
        return [row for item in items for row in (rows_of_list(item) if isinstance(item, list) else [item])]
    if all(isinstance(column, dict) and column for column in columns) and columns:
        if all(key.isdigit() for key in value):
            return columns  # orient="index"
        keys = list(columns[0])
        if all(key.isdigit() for key in keys) and all(list(column) == keys for column in columns):
            return [{name: column[key] for name, column in value.items()} for key in keys]
    if all(isinstance(column, list) and len(column) == len(columns[0]) > 0 for column in columns) and columns:
        scalars = not any(isinstance(cell, (dict, list)) for column in columns for cell in column)
        if scalars and not CHAT_LISTS & value.keys():
            return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return None


_KEY = re.compile(r'[\s,]*"((?:[^"\\]|\\.)*)"\s*:\s*')


def _holds_rows(stream: JsonStream) -> bool:
    """Whether the first list of objects in the object ahead, of which only the beginning is read, is one of rows."""
    text, at = stream.text, stream.start + 1
    while match := _KEY.match(text, at):
        at = match.end()
        try:
            if text[at : at + 1] == "[":
                item, _ = stream.parse(
                    text, at + 1 + len(text[at + 1 : at + 99]) - len(text[at + 1 : at + 99].lstrip())
                )
                if isinstance(item, dict):
                    return match[1] not in CHAT_LISTS and not is_message(item)
            _, at = stream.parse(text, at)
        except (ValueError, RecursionError):
            return False
    return False


def _rows_of_long_object(stream: JsonStream, report: DataReport) -> Rows:
    names = []
    stream.take("{")
    while stream.peek() == '"':
        name = stream.value()
        stream.take(":")
        if stream.peek() == "[" and name not in CHAT_LISTS:
            names.append(str(name))
            yield from _array(stream, objects_only=True)
        else:
            stream.value()
    stream.take("}")
    if len(names) > 1:
        _note_lists(stream, report, names)
