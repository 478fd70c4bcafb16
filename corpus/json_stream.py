"""Streaming JSON parser: reads value by value in bounded memory and continues after damaged values.

    stream = JsonStream(input_file.stream.read1, input_file, report)
    stream.peek()          the next character that is neither white space nor a comma
    stream.read_value()    the next value; raises BrokenJson if there is none
    stream.read_row()      the same, but counts and skips a damaged value and returns LOST_ROW

After damage the parser searches for the next row: an object whose first key is a first key of the rows before, and at
least half of whose keys occur in them. Before FEW_ROWS valid rows, the first key of the objects that take up most of
the following text counts as well. The number of lost rows is the number of skipped row beginnings, or an estimate from
the mean row size if much more text is skipped. The time is linear in the text: see MAX_REPARSE.

Read next: json_reader.py (which values are rows).
"""

import codecs
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from corpus.input_files import MAX_LINE, READ_CHUNK_BYTES, InputFile
from corpus.stats import DataStats

SHAPE_WINDOW = 1 << 20  # characters that are searched for the first key of the rows
DROP_AFTER = 8 << 10  # consumed characters; then the buffer is trimmed: Python counts the lines before each error
ERROR_MARGIN = 16  # characters at the buffer end, where an error may only mean an incomplete value
BROKEN_JSON = "broken JSON"
MAX_REPARSE = 4  # how often the text may be parsed again to find rows after damage
FEW_ROWS = 3  # with fewer valid rows, the following text is inspected as well
LOST_ROW: Any = object()  # returned by read_row for a damaged value

parse_json = json.JSONDecoder(strict=False).raw_decode  # (text, start) -> (value, end)

_SPACE = re.compile(r"[ \t\r\n,\ufeff]*")
_WHITE = re.compile(r"[ \t\r\n]*")
_OPENING = re.compile(r'(\[\s{0,99})?\{\s{0,99}"((?:[^"\\]|\\.){0,199})"\s{0,99}:')
_BRACKET, MAX_NESTING = re.compile(r"[\[{]"), 400  # Python's parser fails at 900 levels or more
_LONG_NUMBER = re.compile(r"\d{4301}")  # longer than the limit of int()
MAX_OPENING_CHARACTERS = 700  # longest match of _OPENING


class BrokenJson(Exception):
    """The text is not valid JSON. `offset` is the index of the error in the text of the stream."""

    def __init__(self, reason: str, offset: int, is_final: bool = False) -> None:
        super().__init__(reason)
        self.offset, self.is_final = offset, is_final  # is_final: reading cannot continue


class JsonStream:
    """The parse buffer of a file. `input_file.line` is the line of the next character."""

    def __init__(self, read: Callable[[int], bytes], input_file: InputFile, report: DataStats) -> None:
        self.read, self.input_file, self.report = read, input_file, report
        self.text, self.start, self.has_more = "", 0, True
        self.consumed = 0  # characters of the file before `start`
        self.decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode  # keeps malformed bytes
        self.rows, self.row_characters = 0, 0  # valid rows so far
        self.first_keys: set[str] = set()  # of valid rows
        self.keys: set[str] = set()
        self.has_list_rows = False  # rows may be lists of objects
        self.is_damaged = False
        self.next_look = 0  # value of `consumed` from which the following text is inspected again
        self.reparsed = 0  # characters of broken values that were parsed

    # ---- text ----
    def read_more(self, size: int = READ_CHUNK_BYTES) -> None:
        chunk = self.read(size)
        self.has_more = bool(chunk)
        self.text = self.text[self.start :] + self.decode(chunk, not chunk)
        self.start = 0

    def skip(self, end: int) -> None:
        self.input_file.line += self.text.count("\n", self.start, end)
        self.consumed += end - self.start
        self.start = end

    def peek(self) -> str:
        """The next character that is neither white space nor a comma; "" at the end of the file."""
        while True:
            self.skip(_SPACE.match(self.text, self.start).end())  # type: ignore[union-attr]
            if self.start < len(self.text):
                return self.text[self.start]
            if not self.has_more:
                return ""
            self.read_more()

    def expect(self, expected: str) -> None:
        if self.peek() != expected:
            raise BrokenJson(BROKEN_JSON, self.start)
        self.skip(self.start + 1)

    # ---- values ----
    def read_value(self, limit: int = 0) -> Any:
        """Returns the next value, of at most `limit` (0: MAX_LINE) characters. A BrokenJson error does not advance."""
        value, end = self._parse_value(limit)
        self.skip(end)
        return value

    def _parse_value(self, limit: int = 0) -> tuple[Any, int]:
        """Returns the next value and the index of its end in `text`. Does not advance."""
        size, limit = READ_CHUNK_BYTES, limit or MAX_LINE
        while True:
            offset = self.start
            try:
                value, end = parse_json(self.text, self.start)
                # a number at the end of the buffer may continue: 12 as 123
                if end < len(self.text) or isinstance(value, (dict, list, str)) or not self.has_more:
                    return value, end
                certain = False
            except json.JSONDecodeError as error:
                offset = error.pos
                certain = offset < len(self.text) - ERROR_MARGIN and not error.msg.startswith("Unterminated string")
            except (ValueError, RecursionError) as error:
                offset, certain = _error_offset(error, self.text, self.start), True
            if certain or not self.has_more:
                raise BrokenJson(BROKEN_JSON, offset)
            if len(self.text) - self.start >= limit:
                raise BrokenJson(f"broken JSON, or one value above {MAX_LINE >> 20} MB: write one row per line "
                             "(pandas: orient='records', lines=True)", len(self.text))  # fmt: skip
            self.read_more(size)
            size = min(2 * size, limit)

    def read_row(self) -> Any:
        """Returns the next value; counts and skips a damaged one and returns LOST_ROW."""
        begin = self.consumed
        try:
            value = self.read_value()
            if not isinstance(value, (dict, list)) and not self._is_value_end():
                raise BrokenJson(BROKEN_JSON, self.start)
        except BrokenJson as reason:
            self.recover(reason, begin)
            return LOST_ROW
        self.count_row(value, begin)
        return value

    def count_row(self, value: Any, begin: int) -> None:
        """Records the keys and the length of a valid row that began at `consumed` = `begin`."""
        self.rows += 1
        self.row_characters += self.consumed - begin
        is_list = isinstance(value, list) and bool(value)
        item = value[0] if is_list else value
        if self.rows < 1000 and isinstance(item, dict) and item:
            self.has_list_rows |= is_list
            self.first_keys.add(next(iter(item)))
            self.keys.update(item)

    def _is_value_end(self) -> bool:
        """True before a comma, a closing bracket or the end of the file, as after an array element."""
        while True:
            offset = _WHITE.match(self.text, self.start).end()  # type: ignore[union-attr]
            if offset < len(self.text) or not self.has_more:
                return self.text[offset : offset + 1] in ("", ",", "]")
            self.read_more()

    # ---- damage ----
    def recover(self, reason: BrokenJson, begin: int | None = None) -> None:
        """Counts a damaged value, which began at `consumed` = `begin`, and skips to the next row or to the end."""
        line, self.is_damaged = self.input_file.line, True
        begin = self.consumed if begin is None else begin
        if self.rows < FEW_ROWS and self.consumed >= self.next_look:
            self.next_look = self.consumed + SHAPE_WINDOW
            self.first_keys |= {self.likely_key()} - {""}
        found = _OPENING.match(self.text, self.start)
        openings = int(found is not None and found[2] in self.first_keys)
        self._skip_broken(reason)
        openings += self._skip_to_row()
        lost = self.consumed - begin
        mean, rows = self.row_characters / max(1, self.rows), max(1, openings)
        if self.rows >= FEW_ROWS and lost > 10 * rows * mean:
            rows = round(lost / mean)
        self.report.row_unreadable(str(reason), self.input_file.name, line, rows)

    def _skip_to_row(self) -> int:
        """Skips to the next readable row or to the end; returns the number of skipped row beginnings."""
        openings = 0
        while True:
            if self.start > max(DROP_AFTER, len(self.text) // 64):
                self.text, self.start = self.text[self.start :], 0
            found = _OPENING.search(self.text, self.start)
            if not found:
                if not self.has_more:
                    self.skip(len(self.text))
                    return openings
                self.skip(max(self.start, len(self.text) - MAX_OPENING_CHARACTERS))
                self.read_more()
                continue
            is_list = self.has_list_rows and bool(found[1])
            if self.first_keys and found[2] not in self.first_keys:
                self.skip(found.end())
                continue
            self.skip(found.start() if is_list else found.start() + len(found[1] or ""))
            if self._row_follows():
                return openings
            openings += 1

    def _row_follows(self) -> bool:
        """True if the next value is a valid row; otherwise skips the value, or broken text that cannot be one."""
        try:
            value, end = self._parse_value()
        except BrokenJson as reason:
            self._skip_broken(reason)
            return False
        item = value[0] if isinstance(value, list) and value else value
        is_row = isinstance(item, dict) and not (has_message_keys(item) and not self.rows and item is value)
        if is_row and (self.rows < FEW_ROWS or 2 * sum(key in self.keys for key in item) >= len(item)):
            return True
        self.skip(end)
        return False

    def _skip_broken(self, reason: BrokenJson) -> None:
        """Skips the first character of a broken value; beyond MAX_REPARSE, all of its text that was parsed."""
        self.reparsed += (reason.offset if self.has_more else len(self.text)) - self.start
        if self.reparsed > MAX_REPARSE * (self.consumed + SHAPE_WINDOW):
            self.skip(min(_next_object_start(self.text, self.start, reason.offset), len(self.text)))
        else:
            self.skip(min(self.start + 1, len(self.text)))

    def likely_key(self) -> str:
        """Returns the first key of the objects, or lists of messages, that take up most of the next SHAPE_WINDOW.

        "" if there are none. Sets `has_list_rows`.
        """
        while self.has_more and len(self.text) - self.start < SHAPE_WINDOW:
            self.read_more()
        text, sizes = self.text[self.start : self.start + SHAPE_WINDOW], dict[tuple[str, bool], int]()
        for shape, size in _parse_objects(text):
            sizes[shape] = sizes.get(shape, 0) + size
        key, self.has_list_rows = max(sizes, key=lambda shape: sizes[shape], default=("", self.has_list_rows))
        return key


def has_message_keys(value: Any) -> bool:
    """True for one message of a chat: an object with role and content, or from and value."""
    return isinstance(value, dict) and (
        ("role" in value and "content" in value) or ("from" in value and "value" in value)
    )


def _parse_objects(text: str) -> Iterator[tuple[tuple[str, bool], int]]:
    """Yields ((first key, False), length) of the outermost valid objects in a text.

    A message counts only as the first of a list: ((first key, True), length of the list).
    """
    offset = reparsed = 0
    while found := _OPENING.search(text, offset):
        if found.start() > DROP_AFTER:
            text, offset = text[found.start() :], 0
            continue
        offset = found.start() + len(found[1] or "")
        try:
            value, end = parse_json(text, offset)
            is_list = has_message_keys(value)
            if is_list and found[1]:
                value, end = parse_json(text, found.start())
            if not is_list or isinstance(value, list):
                yield (found[2], is_list), end - offset
            offset = end
        except json.JSONDecodeError as error:
            reparsed += error.pos - offset
            is_slow = reparsed >= MAX_REPARSE * SHAPE_WINDOW
            offset = _next_object_start(text, offset, error.pos) if is_slow else offset + 1
        except (ValueError, RecursionError) as error:
            offset = _error_offset(error, text, offset) + 1


def _next_object_start(text: str, start: int, error: int) -> int:
    """Index where the next object may begin; a missing quote hides the last `{` before the error."""
    bracket = text.rfind("{", start + 1, error + 1)
    return bracket if bracket > 0 else max(start + 1, error)


def _error_offset(error: Exception, text: str, start: int) -> int:
    """Index of the error in a value at `start` that is nested too deeply or has a number of too many digits."""
    if isinstance(error, RecursionError):  # the first MAX_NESTING brackets belong to it
        bracket = next(itertools.islice(_BRACKET.finditer(text, start), MAX_NESTING, None), None)
        return bracket.start() if bracket else start
    number = _LONG_NUMBER.search(text, start)
    return number.start() if number else start
