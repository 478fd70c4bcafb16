"""Reading JSON as it is found: a value on each line, arrays, one object around the rows, the layouts of pandas.

    {"text": ...}                       jsonl: a row on each line, also with a comma at its end or [ and ] around all
    [{"role": ..., "content": ...}]     a list of messages is one chat; a list of other objects is a list of rows
    [{"text": ...}, {"text": ...}]      an array over any number of lines; also objects one after the other
    {"data": [{"text": ...}, ...]}      an object around a list of rows, under any name (pandas: orient="table")
    {"text": {"0": ..., "1": ...}}      pandas: orient="columns", "index" ({"0": {"text": ...}}), "split", and
    {"text": [..., ...]}                lists of equal length; these four are held in memory, up to MAX_LINE

Arrays of any size are streamed.

Read next: sniff.py (which of the two readers a file gets), read.py (rows -> documents and chats).
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from corpus.report import DataReport
from corpus.sources import PIECE, Source

MAX_LINE = 64 << 20  # bytes of one line or value; longer ones are bad rows
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


# ---- a value on each line --------------------------------------------------------------------------------------------
def read_jsonl(source: Source, report: DataReport) -> Rows:
    """Rows of a file with a JSON value on each line."""
    for number, line in lines_of(source, report):
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            report.unreadable(source.malformed, source.name, number)
            continue
        except (ValueError, RecursionError):
            text = line.decode().strip(" \t\r\n\v\f\ufeff")
            if text in ("", "[", "]", ",", "],"):
                continue
            try:
                row = loose_value(text)
            except (ValueError, RecursionError):
                report.unreadable(_why_broken(text), source.name, number)
                continue
        if isinstance(row, list):
            yield from ((number, item) for item in rows_of_list(row))
        else:
            yield number, row


def loose_value(text: str) -> Any:
    """The JSON value of a line that may have been cut out of an array: [ before it, a comma or ] after it."""
    text = text.strip(" \t\r\n\ufeff").removesuffix(",").rstrip()
    if text.startswith("[") and not text.endswith("]"):
        text = text[1:]
    elif text.endswith("]") and not text.startswith("["):
        text = text[:-1].rstrip().removesuffix(",")
    return json.loads(text)


def is_message(value: Any) -> bool:
    """Whether an object is one message of a chat: {"role", "content"} or {"from", "value"}."""
    return isinstance(value, dict) and (
        ("role" in value and "content" in value) or ("from" in value and "value" in value)
    )


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
class _Broken(Exception):
    """The text from here on is no JSON. The message is the reason."""


class _Buffer:
    """The part of a file that is being parsed. `source.line` is the line of the next character."""

    def __init__(self, source: Source) -> None:
        self.source, self.text, self.start, self.more = source, "", 0, True
        self.consumed = 0  # characters before `start` in all
        self.decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode  # bad bytes stay
        self.parse = json.JSONDecoder(strict=False).raw_decode

    def grow(self, size: int = PIECE) -> None:
        piece = self.source.read(size)
        self.more = bool(piece)
        self.text = self.text[self.start :] + self.decode(piece, not piece)
        self.start = 0

    def skip(self, end: int) -> None:
        self.source.line += self.text.count("\n", self.start, end)
        self.consumed += end - self.start
        self.start = end

    def peek(self) -> str:
        """The next character that is neither white space nor a comma; "" at the end of the file."""
        while True:
            self.skip(_SPACE.match(self.text, self.start).end())  # type: ignore[union-attr]
            if self.start < len(self.text):
                return self.text[self.start]
            if not self.more:
                return ""
            self.grow()

    def take(self, expected: str) -> None:
        if self.peek() != expected:
            raise _Broken("broken JSON: the rest of the file is not read")
        self.skip(self.start + 1)

    def value(self, limit: int = 0) -> Any:
        """The next value, of at most `limit` characters, or MAX_LINE. Raises _Broken without one, and skips nothing."""
        size, limit = PIECE, limit or MAX_LINE
        while True:
            try:
                value, end = self.parse(self.text, self.start)
                # a number at the end of what is read may continue: 12 as 123
                if end < len(self.text) or isinstance(value, (dict, list, str)) or not self.more:
                    self.skip(end)
                    return value
            except (ValueError, RecursionError):
                pass
            if not self.more:
                raise _Broken("broken JSON: the rest of the file is not read")
            if len(self.text) - self.start >= limit:
                raise _Broken(f"broken JSON, or one value above {MAX_LINE >> 20} MB: write a row on each line "
                              "(pandas: orient='records', lines=True)")  # fmt: skip
            self.grow(size)
            size = min(2 * size, limit)


_SPACE = re.compile(r"[ \t\r\n,\ufeff]*")


def read_json(source: Source, report: DataReport) -> Rows:
    """Rows of arrays, of objects one after the other, and of one object around them, without holding the whole file."""
    buffer = _Buffer(source)
    try:
        if buffer.peek() == "{":
            yield from _first_object(buffer, report)
        while start := buffer.peek():
            if start == "[":
                yield from _array(buffer)
            else:
                line = source.line
                yield line, buffer.value()
    except _Broken as reason:
        if not source.damage:
            report.unreadable(str(reason), source.name, source.line)


def _array(buffer: _Buffer, objects_only: bool = False) -> Rows:
    """The elements of an array as rows; if the first is a message, all together as one row, a list."""
    begin, line, chat, is_chat = buffer.consumed, buffer.source.line, [], None
    buffer.take("[")
    while buffer.peek() != "]":
        at = buffer.source.line
        value = buffer.value()
        is_chat = is_message(value) if is_chat is None else is_chat
        if is_chat:
            chat.append(value)
            if buffer.consumed - begin > MAX_LINE:
                raise _Broken(f"a chat above {MAX_LINE >> 20} MB: the rest of the file is not read")
        elif isinstance(value, list):
            yield from ((at, row) for row in rows_of_list(value))
        elif isinstance(value, dict) or not objects_only:
            yield at, value
    buffer.take("]")
    if chat:
        yield line, {"messages": chat}


def _first_object(buffer: _Buffer, report: DataReport) -> Rows:
    """The first object of a file: one row, or the object that contains the rows if nothing follows it."""
    line = buffer.source.line
    try:
        value = buffer.value(WHOLE)
    except _Broken:
        if _holds_rows(buffer):
            yield from _rows_of_long_object(buffer, report)
            return
        value = buffer.value()
    rows = None if buffer.peek() else rows_inside(value)
    if rows is None:
        yield line, value
        return
    if len(lists := _row_lists(value)) > 1:
        _note_lists(buffer, report, lists)
    yield from ((line, row) for row in rows)


def _note_lists(buffer: _Buffer, report: DataReport, names: list[str]) -> None:
    report.note(f"{buffer.source.name}: the rows of all its lists are read: {', '.join(names)}")


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


def _holds_rows(buffer: _Buffer) -> bool:
    """Whether the first list of objects in the object ahead, of which only the beginning is read, is one of rows."""
    text, at = buffer.text, buffer.start + 1
    while match := _KEY.match(text, at):
        at = match.end()
        try:
            if text[at : at + 1] == "[":
                item, _ = buffer.parse(text, _SPACE.match(text, at + 1).end())  # type: ignore[union-attr]
                if isinstance(item, dict):
                    return match[1] not in CHAT_LISTS and not is_message(item)
            _, at = buffer.parse(text, at)
        except (ValueError, RecursionError):
            return False
    return False


def _rows_of_long_object(buffer: _Buffer, report: DataReport) -> Rows:
    names = []
    buffer.take("{")
    while buffer.peek() == '"':
        name = buffer.value()
        buffer.take(":")
        if buffer.peek() == "[" and name not in CHAT_LISTS:
            names.append(str(name))
            yield from _array(buffer, objects_only=True)
        else:
            buffer.value()
    buffer.take("}")
    if len(names) > 1:
        _note_lists(buffer, report, names)
