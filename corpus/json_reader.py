"""Reads JSON files: JSON Lines, arrays, objects that wrap a list of rows, and the layouts of pandas.

    {"text": ...}                       JSON Lines: a row on each line; trailing commas and outer brackets are ignored
    [{"role": ..., "content": ...}]     a list of messages is one chat; a list of other objects is a list of rows
    [{"text": ...}, {"text": ...}]      an array over any number of lines; also concatenated objects
    {"data": [{"text": ...}, ...]}      an object that wraps a list of rows under any key (pandas: orient="table")
    {"text": {"0": ..., "1": ...}}      pandas: orient="columns", "index" ({"0": {"text": ...}}), "split", and
    {"text": [..., ...]}                lists of equal length; these four are read into memory, up to MAX_LINE bytes

Arrays of any size are streamed.

Read next: json_stream.py (parser), sniff.py (format detection), readers.py (rows -> documents and chats).
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from corpus.input_files import InputFile
from corpus.json_stream import LOST_ROW, MAX_LINE, BrokenJson, JsonStream, has_message_keys
from corpus.stats import DataStats

MISSING_END = "unterminated JSON array: the file may be truncated"
LONG_LINE_BYTES = 1 << 20  # a broken line above this size counts as an estimated number of rows
MAX_WHOLE_OBJECT = 1 << 20  # characters; a longer object is searched for a list of rows and streamed
CHAT_LIST_KEYS = frozenset(
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

NumberedRows = Iterator[tuple[int, Any]]


def read_numbered_lines(input_file: InputFile, report: DataStats) -> Iterator[tuple[int, bytes]]:
    """Yields (line number, line with its end). A line above MAX_LINE counts as an estimated number of bad rows."""
    number = size = 0
    while line := input_file.readline(MAX_LINE):
        number += 1
        input_file.line = number
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            line_bytes = len(line)
            while chunk := input_file.readline(1 << 20):
                line_bytes += len(chunk)
                if chunk.endswith(b"\n"):
                    break
            rows = report.estimate_rows(input_file.name, line_bytes, size + line_bytes)
            report.row_unreadable(f"a line longer than {MAX_LINE >> 20} MB", input_file.name, number, rows)
            continue
        size += len(line)
        yield number, line


# ---- a value on each line --------------------------------------------------------------------------------------------
def read_jsonl(input_file: InputFile, report: DataStats) -> NumberedRows:
    """Yields (line, row) of a file with a JSON value on each line."""
    size = 0
    for number, line in read_numbered_lines(input_file, report):
        size += len(line)
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            if is_object_array(line):
                yield from _read_array_line(line, input_file, report)
            else:
                report.row_unreadable(
                    input_file.malformed_reason,
                    input_file.name,
                    number,
                    _estimate_broken_rows(line, size, input_file, report),
                )
            continue
        except (ValueError, RecursionError):
            text = line.decode().strip(" \t\r\n\v\f\ufeff")
            if text in ("", "[", "]", ",", "],"):
                continue
            try:
                row = parse_loose_json(text)
            except (ValueError, RecursionError):
                if is_object_array(line):
                    yield from _read_array_line(line, input_file, report)
                else:
                    rows = _estimate_broken_rows(line, size, input_file, report)
                    report.row_unreadable(_broken_json_reason(text), input_file.name, number, rows)
                continue
        if isinstance(row, list):
            yield from ((number, item) for item in list_rows(row))
        else:
            yield number, row


def is_object_array(line: bytes) -> bool:
    """True if a broken line is an array of several objects, of which the intact ones can be read."""
    line = line.strip(b" \t\r\n,")
    return line.startswith(b"[") and line.endswith(b"]") and re.search(rb"\}\s{0,9},\s{0,9}\{", line) is not None


def _read_array_line(line: bytes, input_file: InputFile, report: DataStats) -> NumberedRows:
    number, pieces = input_file.line, iter([line.strip()])
    for _, row in _read_array(JsonStream(lambda size: next(pieces, b""), input_file, report)):
        yield number, row


def _estimate_broken_rows(line: bytes, size: int, input_file: InputFile, report: DataStats) -> int:
    """The number of rows lost in a broken line: one, or an estimate if a long line suggests lost line ends."""
    return report.estimate_rows(input_file.name, len(line), size) if len(line) > LONG_LINE_BYTES else 1


def parse_loose_json(text: str) -> Any:
    """Parses a line that may be a part of an array: [ before the value, a comma or ] after it are ignored."""
    text = text.strip(" \t\r\n\ufeff").removesuffix(",").rstrip()
    if text.startswith("[") and not text.endswith("]"):
        text = text[1:]
    elif text.endswith("]") and not text.startswith("["):
        text = text[:-1].rstrip().removesuffix(",")
    return json.loads(text)


def list_rows(items: list[Any]) -> list[Any]:
    """Returns the rows of a list: a list of turns is one chat, other objects are one row each."""
    if not items or not all(isinstance(item, dict) for item in items):
        return [items]  # not a row: the caller counts it as bad
    if all(has_message_keys(item) or "human" in item or "assistant" in item for item in items):
        return [{"messages": items}]
    return items


def _broken_json_reason(text: str) -> str:
    if "\0" in text:
        return "NUL character"
    return "Python notation (single quotes), not JSON" if text.startswith(("{'", "[{'")) else "broken JSON"


# ---- values over any number of lines ---------------------------------------------------------------------------------
def read_json(input_file: InputFile, report: DataStats) -> NumberedRows:
    """Yields (line, row) of arrays, of concatenated objects or of one object that wraps the rows, streaming."""
    stream = JsonStream(input_file.read, input_file, report)
    while start := stream.peek():
        line = input_file.line
        try:
            if start == "{" and not stream.rows:
                yield from _read_first_object(stream, report)
            elif start == "[":
                yield from _read_array(stream)
            elif start in "]}:" and stream.is_damaged:  # left over from a damaged value
                stream.skip(stream.start + 1)
            elif (value := stream.read_row()) is not LOST_ROW:
                yield line, value
        except BrokenJson as reason:
            if reason.is_final:
                report.row_unreadable(str(reason), input_file.name, input_file.line)
                return
            stream.recover(reason)


def _read_array(stream: JsonStream, objects_only: bool = False) -> NumberedRows:
    """Yields the elements of an array as rows; if the first is a message, the whole array is one chat."""
    input_file = stream.input_file
    begin, line, chat, is_chat, is_whole = stream.consumed, input_file.line, [], None, True
    stream.expect("[")
    while stream.peek() not in ("]", ""):
        row_line = input_file.line
        value = stream.read_row()
        if value is LOST_ROW:
            is_whole = False
            continue
        is_chat = has_message_keys(value) if is_chat is None else is_chat
        if is_chat:
            chat.append(value)
            if stream.consumed - begin > MAX_LINE:
                raise BrokenJson(
                    f"a chat larger than {MAX_LINE >> 20} MB: the remaining file is not read", 0, is_final=True
                )
        elif isinstance(value, list):
            lists = value if all(_is_chat_list(item) for item in value) and value else [value]
            yield from ((row_line, row) for items in lists for row in list_rows(items))
        elif isinstance(value, dict) and stream.rows == 1 and not stream.peek() and (rows := object_rows(value)):
            yield from ((row_line, row) for row in rows)  # an object that wraps the rows, after an extra bracket
        elif isinstance(value, dict) or not objects_only:
            yield row_line, value
    if stream.peek():
        stream.expect("]")
    elif not input_file.damages and not stream.is_damaged:
        stream.report.row_unreadable(MISSING_END, input_file.name, input_file.line)
    if chat and is_whole:  # without its damaged message it would be a different chat
        yield line, {"messages": chat}


def _is_chat_list(value: Any) -> bool:
    """True for a list of messages; a list of such lists is an array after an extra bracket."""
    return isinstance(value, list) and bool(value) and has_message_keys(value[0])


def _read_first_object(stream: JsonStream, report: DataStats) -> NumberedRows:
    """Reads the first object of a file: one row or, if nothing follows it, possibly an object that wraps the rows."""
    line, begin = stream.input_file.line, stream.consumed
    try:
        value = stream.read_value(MAX_WHOLE_OBJECT)
    except BrokenJson as reason:
        if _contains_rows(stream) and (
            reason.offset >= len(stream.text) or not _starts_with_key(stream, stream.likely_key())
        ):
            yield from _read_long_object(stream, report)
        elif (value := stream.read_row()) is not LOST_ROW:
            yield line, value
        return
    after = stream.peek()
    rows = object_rows(value) if after in ("", "]", "}") else None
    if rows is None:
        stream.count_row(value, begin)
        yield line, value
        return
    if len(lists := _row_list_keys(value)) > 1:
        _note_row_lists(stream, report, lists)
    yield from ((line, row) for row in rows)


def _starts_with_key(stream: JsonStream, key: str) -> bool:
    """True if the next object begins with this key, the first key of the rows: then it is a row itself."""
    match = _KEY.match(stream.text, stream.start + 1)
    return match is not None and match[1] == key


def _note_row_lists(stream: JsonStream, report: DataStats, names: list[str]) -> None:
    report.add_note(f"{stream.input_file.name}: the rows of all its lists are read: {', '.join(names)}")


def _row_list_keys(value: dict[str, Any]) -> list[str]:
    """The keys of an object whose values are lists of rows."""
    return [key for key, items in value.items() if key not in CHAT_LIST_KEYS and isinstance(items, list) and items
            and all(isinstance(item, (dict, list)) for item in items) and not has_message_keys(items[0])]  # fmt: skip


def object_rows(value: dict[str, Any]) -> list[Any] | None:
    """Returns the rows of an object that is the only value of its file; None if it is a row itself."""
    columns = list(value.values())
    if {"columns", "data"} <= value.keys() and isinstance(value["columns"], list) and isinstance(value["data"], list):
        names = [str(name) for name in value["columns"]]
        fits = [isinstance(cells, list) and len(cells) == len(names) for cells in value["data"]]
        return [dict(zip(names, c, strict=True)) if fit else c for c, fit in zip(value["data"], fits, strict=True)]
    if lists := _row_list_keys(value):
        items = [item for key in lists for item in value[key]]
        return [row for item in items for row in (list_rows(item) if isinstance(item, list) else [item])]
    if all(isinstance(column, dict) and column for column in columns) and columns:
        if all(key.isdigit() for key in value):
            return columns  # orient="index"
        keys = list(columns[0])
        if all(key.isdigit() for key in keys) and all(list(column) == keys for column in columns):
            return [{name: column[key] for name, column in value.items()} for key in keys]
    if all(isinstance(column, list) and len(column) == len(columns[0]) > 0 for column in columns) and columns:
        scalars = not any(isinstance(cell, (dict, list)) for column in columns for cell in column)
        if scalars and not CHAT_LIST_KEYS & value.keys():
            return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return None


_KEY = re.compile(r'[\s,]*"((?:[^"\\]|\\.)*)"\s*:\s*')


def _contains_rows(stream: JsonStream) -> bool:
    """True if the first list of objects in the next object, which is read only in part, is a list of rows."""
    text, at = stream.text, stream.start + 1
    while match := _KEY.match(text, at):
        at = match.end()
        try:
            if text[at : at + 1] == "[":
                item, _ = stream.parse(
                    text, at + 1 + len(text[at + 1 : at + 99]) - len(text[at + 1 : at + 99].lstrip())
                )
                if isinstance(item, dict):
                    return match[1] not in CHAT_LIST_KEYS and not has_message_keys(item)
            _, at = stream.parse(text, at)
        except (ValueError, RecursionError):
            return False
    return False


def _read_long_object(stream: JsonStream, report: DataStats) -> NumberedRows:
    names = []
    stream.expect("{")
    while stream.peek() == '"':
        name = stream.read_value()
        stream.expect(":")
        if stream.peek() == "[" and name not in CHAT_LIST_KEYS:
            names.append(str(name))
            yield from _read_array(stream, objects_only=True)
        else:
            stream.read_value()
    stream.expect("}")
    if len(names) > 1:
        _note_row_lists(stream, report, names)
