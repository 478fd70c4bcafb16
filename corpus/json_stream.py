"""JSON text that is read value by value in bounded memory, and that continues behind a damaged value.

    stream = JsonStream(source.read, source, report)
    stream.peek()       the next character that is neither white space nor a comma
    stream.value()      the next value; raises Broken where there is none
    stream.row()        the same; a damaged value is counted in the report and skipped: LOST

After damage the next row is looked for: an object that begins with a key with which rows of this file begin, and that
has at least half of its keys in common with them. Before the first sound row, these are the objects ahead that take up
most of the text. How many rows are lost is the number of such beginnings that are skipped; where much more text is
skipped, it is estimated from the mean size of the rows before. Each character is parsed a bounded number of times.

Read next: json_reader.py (which values are rows).
"""

import codecs
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from corpus.report import DataReport
from corpus.sources import PIECE, Source

MAX_LINE = 64 << 20  # bytes of one line or value; longer ones are bad rows
WINDOW = 1 << 20  # characters in which the shape of rows is looked for, and after which read text is dropped
MARGIN = 16  # characters at the end of what is read: an error there may be a value that is read only in part
BROKEN = "broken JSON"
LOST: Any = object()  # what `row` returns for a damaged value

_SPACE = re.compile(r"[ \t\r\n,\ufeff]*")
_WHITE = re.compile(r"[ \t\r\n]*")
_OPENING = re.compile(r'(\[\s{0,99})?\{\s{0,99}"((?:[^"\\]|\\.){0,199})"\s{0,99}:')
_BRACKET, LEVELS = re.compile(r"[\[{]"), 400  # Python's parser gives up at 900 levels or more
_LONG_NUMBER = re.compile(r"\d{4301}")  # Python converts no longer ones
OPENING_LENGTH = 700  # characters of the longest _OPENING


class Broken(Exception):
    """The text from here on is no JSON. `at` is the place of the error in the stream's text."""

    def __init__(self, reason: str, at: int, final: bool = False) -> None:
        super().__init__(reason)
        self.at, self.final = at, final  # final: reading cannot continue


class JsonStream:
    """The part of a file that is being parsed. `source.line` is the line of the next character."""

    def __init__(self, read: Callable[[int], bytes], source: Source, report: DataReport) -> None:
        self.read, self.source, self.report = read, source, report
        self.text, self.start, self.more = "", 0, True
        self.consumed = 0  # characters before `start` in all
        self.decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode  # bad bytes stay
        self.parse = json.JSONDecoder(strict=False).raw_decode
        self.rows, self.row_characters = 0, 0  # sound rows so far
        self.first_keys: set[str] = set()  # of sound rows
        self.keys: set[str] = set()
        self.lists = False  # rows may be lists of objects
        self.damaged = False

    # ---- text ----
    def grow(self, size: int = PIECE) -> None:
        piece = self.read(size)
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
            raise Broken(BROKEN, self.start)
        self.skip(self.start + 1)

    # ---- values ----
    def value(self, limit: int = 0) -> Any:
        """The next value, of at most `limit` characters, or MAX_LINE. Raises Broken without one, and skips nothing."""
        size, limit = PIECE, limit or MAX_LINE
        while True:
            at = self.start
            try:
                value, end = self.parse(self.text, self.start)
                # a number at the end of what is read may continue: 12 as 123
                if end < len(self.text) or isinstance(value, (dict, list, str)) or not self.more:
                    self.skip(end)
                    return value
                certain = False
            except json.JSONDecodeError as error:
                at = error.pos
                certain = at < len(self.text) - MARGIN and not error.msg.startswith("Unterminated string")
            except (ValueError, RecursionError) as error:
                at, certain = _place_of(error, self.text, self.start), True
            if certain or not self.more:
                raise Broken(BROKEN, at)
            if len(self.text) - self.start >= limit:
                raise Broken(f"broken JSON, or one value above {MAX_LINE >> 20} MB: write a row on each line "
                             "(pandas: orient='records', lines=True)", len(self.text))  # fmt: skip
            self.grow(size)
            size = min(2 * size, limit)

    def row(self) -> Any:
        """The next value, or LOST for a damaged one, which is counted and skipped."""
        begin = self.consumed
        try:
            value = self.value()
            if not isinstance(value, (dict, list)) and not self._ends():
                raise Broken(BROKEN, self.start)
        except Broken as reason:
            self.recover(reason, begin)
            return LOST
        self.rows += 1
        self.row_characters += self.consumed - begin
        if self.rows < 1000 and value:
            self.learn_from(value)
        return value

    def _ends(self) -> bool:
        """Whether a comma, a closing bracket or the end of the file is next, as behind an element."""
        while True:
            at = _WHITE.match(self.text, self.start).end()  # type: ignore[union-attr]
            if at < len(self.text) or not self.more:
                return self.text[at : at + 1] in ("", ",", "]")
            self.grow()

    def learn_from(self, value: Any) -> None:
        if isinstance(value, dict):
            self.first_keys.add(next(iter(value)))
            self.keys.update(value)
        elif isinstance(value, list) and isinstance(value[0], dict) and value[0]:
            self.lists = True
            self.first_keys.add(next(iter(value[0])))
            self.keys.update(value[0])

    # ---- damage ----
    def recover(self, reason: Broken, begin: int | None = None) -> None:
        """Counts a damaged value and skips to the next row, or to the end. `begin`: `consumed` where it began."""
        line, self.damaged = self.source.line, True
        begin = self.consumed if begin is None else begin
        if not self.first_keys:
            self.first_keys = {self.likely_key()} - {""}
        # A quote that is missing hides the beginning of the next row, which is then the last { before the error.
        behind = self.text.rfind("{", self.start + 1, reason.at + 1)
        openings = len(self._openings(self.start, behind if behind > 0 else reason.at))
        self.skip(min(behind if behind > 0 else max(reason.at, self.start + 1), len(self.text)))
        openings += self._skip_to_row()
        lost = self.consumed - begin
        mean, rows = self.row_characters / max(1, self.rows), max(1, openings)
        if self.rows and lost > 10 * rows * mean:
            rows = round(lost / mean)
        self.report.unreadable(str(reason), self.source.name, line, rows)

    def _skip_to_row(self) -> int:
        """Skips to the next row that can be read, or to the end; returns how many beginnings of rows are skipped."""
        openings = 0
        while True:
            if self.start > WINDOW:
                self.text, self.start = self.text[self.start :], 0
            found = _OPENING.search(self.text, self.start)
            if not found:
                if not self.more:
                    self.skip(len(self.text))
                    return openings
                self.skip(max(self.start, len(self.text) - OPENING_LENGTH))
                self.grow()
                continue
            is_list = self.lists and bool(found[1])
            if self.first_keys and found[2] not in self.first_keys:
                self.skip(found.end())
                continue
            self.skip(found.start() if is_list else found.start() + len(found[1] or ""))
            if self._row_follows():
                return openings
            openings += 1

    def _row_follows(self) -> bool:
        """Whether the value here is a sound row; if not, what cannot be one is skipped."""
        consumed, line, start = self.consumed, self.source.line, self.start
        try:
            value = self.value()
        except Broken as reason:
            behind = self.text.rfind("{", self.start + 1, reason.at + 1)
            self.skip(min(behind if behind > 0 else max(reason.at, self.start + 1), len(self.text)))
            return False
        if not self._fits(value):
            return False
        # `value` reads on only where the text did not hold the whole value: the beginning is at 0 then.
        self.start = start if self.consumed - consumed == self.start - start else 0
        self.consumed, self.source.line = consumed, line
        return True

    def _fits(self, value: Any) -> bool:
        item = value[0] if isinstance(value, list) and value else value
        if not isinstance(item, dict):
            return False
        return not self.keys or 2 * sum(key in self.keys for key in item) >= len(item)

    def _openings(self, start: int, end: int) -> list[str]:
        found = _OPENING.finditer(self.text, start, max(start, end))
        return [match[2] for match in found if match[2] in self.first_keys]

    def likely_key(self) -> str:
        """The first key of the objects ahead that take up most of the text; "" without one."""
        while self.more and len(self.text) - self.start < WINDOW:
            self.grow()
        text, sizes = self.text[self.start : self.start + WINDOW], dict[str, int]()
        for key, size in _objects(text, self.parse):
            sizes[key] = sizes.get(key, 0) + size
        return max(sizes, key=lambda key: sizes[key], default="")


def _objects(text: str, parse: Callable[[str, int], tuple[Any, int]]) -> Iterator[tuple[str, int]]:
    """(first key, length) of the objects in a text that can be parsed, without those inside others."""
    at = 0
    while found := _OPENING.search(text, at):
        at = found.start() + len(found[1] or "")
        try:
            _, end = parse(text, at)
            yield found[2], end - at
            at = end
        except json.JSONDecodeError as error:
            behind = text.rfind("{", at + 1, error.pos + 1)
            at = behind if behind > 0 else max(at + 1, error.pos)
        except (ValueError, RecursionError) as error:
            at = _place_of(error, text, at) + 1


def _place_of(error: Exception, text: str, start: int) -> int:
    """Where a value at `start` is wrong that has too many levels, or a number of too many digits."""
    if isinstance(error, RecursionError):  # the first LEVELS brackets are all inside it
        bracket = next(itertools.islice(_BRACKET.finditer(text, start), LEVELS, None), None)
        return bracket.start() if bracket else start
    number = _LONG_NUMBER.search(text, start)
    return number.start() if number else start
