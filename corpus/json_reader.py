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
from collections.abc import Iterable
from typing import Any

from corpus.input_files import MAX_LINE, InputFile, NumberedRows
from corpus.json_stream import LOST_ROW, BrokenJson, JsonStream, has_message_keys, parse_json
from corpus.stats import DataStats

MISSING_END = "unterminated JSON array: the file may be truncated"
LONG_LINE_BYTES = 1 << 20  # a broken line above this size counts as an estimated number of rows
MAX_WHOLE_OBJECT = 1 << 20  # characters; a longer object is searched for a list of rows and streamed
CHAT_LIST_KEYS = frozenset(  # lists under these keys belong to one row
    ("messages", "conversations", "conversation", "dialogue", "dialog", "dialogs", "chat", "turns", "chosen",
     "rejected", "history", "answers", "completions", "responses")
)  # fmt: skip
_KEY = re.compile(r'[\s,]*"((?:[^"\\]|\\.)*)"\s*:\s*')
_OPEN_LIST = re.compile(r"\[\s*")


# ---- a value on each line --------------------------------------------------------------------------------------------
def read_jsonl(input_file: InputFile, report: DataStats) -> NumberedRows:
    """Yields (line, row) of a file with a JSON value on each line."""
    number = size = 0
    readline = input_file.stream.readline
    while line := readline(MAX_LINE):
        number += 1
        input_file.line = number
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            input_file.count_long_line(line, number, size, report)
            continue
        size += len(line)
        try:
            value = json.loads(line.decode())
            rows: Iterable[Any] = list_rows(value) if isinstance(value, list) else (value,)
        except (ValueError, RecursionError):
            rows = _rows_of_broken_line(line, size, input_file, report)
        for row in rows:
            yield number, row


def _rows_of_broken_line(line: bytes, size: int, input_file: InputFile, report: DataStats) -> Iterable[Any]:
    """Returns the rows of a line that is not JSON: a part of an array, or an array with damaged elements.

    Counts any other line as a bad row. `size`: bytes read, with this line.
    """
    try:
        text = line.decode().strip(" \t\r\n\v\f\ufeff")
        if text in ("", "[", "]", ",", "],"):
            return []
        row = parse_loose_json(text)
        return list_rows(row) if isinstance(row, list) else [row]
    except UnicodeDecodeError:
        reason = input_file.malformed_reason
    except (ValueError, RecursionError):
        reason = "broken JSON"
        if "\0" in text:
            reason = "NUL character"
        elif text.startswith(("{'", "[{'")):
            reason = "Python notation (single quotes), not JSON"
    line = line.strip()
    inner = line.strip(b" \t\r\n,")
    if inner.startswith(b"[") and inner.endswith(b"]") and re.search(rb"\}\s{0,9},\s{0,9}\{", inner):
        pieces = iter([line])
        return (row for _, row in _read_array(JsonStream(lambda size: next(pieces, b""), input_file, report)))
    # A broken line that is this long suggests lost line ends.
    rows = report.estimate_rows(input_file.name, len(line), size) if len(line) > LONG_LINE_BYTES else 1
    report.row_unreadable(reason, input_file.name, input_file.line, rows)
    return []


def parse_loose_json(text: str) -> Any:
    """Parses a line that may be a part of an array: [ before the value, a comma or ] after it are ignored."""
    text = text.strip(" \t\r\n\ufeff").removesuffix(",").rstrip()
    if text.startswith("[") and not text.endswith("]"):
        text = text[1:]
    elif text.endswith("]") and not text.startswith("["):
        text = text[:-1].rstrip().removesuffix(",")
    return json.loads(text)


# ---- values over any number of lines ---------------------------------------------------------------------------------
def read_json(input_file: InputFile, report: DataStats) -> NumberedRows:
    """Yields (line, row) of arrays, of concatenated objects or of one object that wraps the rows, streaming."""
    stream = JsonStream(input_file.stream.read1, input_file, report)
    while start := stream.peek():
        line = input_file.line
        try:
            if start == "{" and not stream.rows:
                yield from _read_first_object(stream)
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
        rows: Iterable[Any] = ()
        if is_chat:
            chat.append(value)
            if stream.consumed - begin > MAX_LINE:
                reason = f"a chat larger than {MAX_LINE >> 20} MB: the remaining file is not read"
                raise BrokenJson(reason, 0, is_final=True)
        elif isinstance(value, list):  # a list of lists of messages is an array after an extra bracket
            are_chats = value and all(isinstance(item, list) and item and has_message_keys(item[0]) for item in value)
            rows = [row for items in (value if are_chats else [value]) for row in list_rows(items)]
        elif isinstance(value, dict) and stream.rows == 1 and not stream.peek():
            rows = object_rows(value) or [value]  # perhaps an object that wraps the rows, after an extra bracket
        elif isinstance(value, dict) or not objects_only:
            rows = (value,)
        for row in rows:
            yield row_line, row
    if stream.peek():
        stream.expect("]")
    elif not input_file.damages and not stream.is_damaged:
        stream.report.row_unreadable(MISSING_END, input_file.name, input_file.line)
    if chat and is_whole:  # without its damaged message it would be a different chat
        yield line, {"messages": chat}


def _read_first_object(stream: JsonStream) -> NumberedRows:
    """Yields the first object of a file: one row or, if nothing follows it, perhaps an object that wraps the rows."""
    line, begin = stream.input_file.line, stream.consumed
    try:
        value = stream.read_value(MAX_WHOLE_OBJECT)
    except BrokenJson as reason:
        if _wraps_rows(stream, reason):
            yield from _read_long_object(stream)
        elif (value := stream.read_row()) is not LOST_ROW:
            yield line, value
        return
    rows = object_rows(value) if stream.peek() in ("", "]", "}") else None
    if rows is None:
        stream.count_row(value, begin)
        rows = [value]
    else:
        _note_row_lists(stream, _row_list_keys(value))
    for row in rows:
        yield line, row


def _wraps_rows(stream: JsonStream, reason: BrokenJson) -> bool:
    """True if the next object, which is long or broken, wraps the rows: its first list of objects is a list of rows."""
    text, at = stream.text, stream.start + 1
    first = _KEY.match(text, at)
    while match := _KEY.match(text, at):
        at = match.end()
        try:
            if opening := _OPEN_LIST.match(text, at):
                item, _ = parse_json(text, opening.end())
                if isinstance(item, dict):
                    is_list = match[1] not in CHAT_LIST_KEYS and not has_message_keys(item)
                    # A broken object is a row itself if it begins with the key that the rows begin with.
                    is_long = reason.offset >= len(text)
                    return is_list and (is_long or first is None or first[1] != stream.likely_key())
            _, at = parse_json(text, at)
        except (ValueError, RecursionError):
            return False
    return False


def _read_long_object(stream: JsonStream) -> NumberedRows:
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
    _note_row_lists(stream, names)


def _note_row_lists(stream: JsonStream, names: list[str]) -> None:
    if len(names) > 1:
        stream.report.add_note(f"{stream.input_file.name}: the rows of all its lists are read: {', '.join(names)}")


# ---- rows inside a value ---------------------------------------------------------------------------------------------
def list_rows(items: list[Any]) -> list[Any]:
    """Returns the rows of a list: a list of turns is one chat, other objects are one row each."""
    if not items or not all(isinstance(item, dict) for item in items):
        return [items]  # not a row: the caller counts it as bad
    if all(has_message_keys(item) or "human" in item or "assistant" in item for item in items):
        return [{"messages": items}]
    return items


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
