"""JSON text that is read value by value in bounded memory, and that continues behind a damaged value.

    stream = JsonStream(source.read, source, report)
    stream.peek()       the next character that is neither white space nor a comma
    stream.value()      the next value; raises Broken where there is none
    stream.row()        the same; a damaged value is counted in the report and skipped: LOST

After damage the next row is looked for: an object that begins with a key with which rows of this file begin, and that
has at least half of its keys in common with them. Before the first sound row, these are the objects ahead that take up
most of the text. How many rows are lost is the number of such beginnings that are skipped; where much more text is
skipped, it is estimated from the mean size of the rows before. The time is linear in the text: see IN_VAIN.

Read next: json_reader.py (which values are rows).
"""

import codecs
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from corpus.input_files import PIECE, Source
from corpus.stats import DataReport

MAX_LINE = 64 << 20  # bytes of one line or value; longer ones are bad rows
WINDOW = 1 << 20  # characters in which the shape of rows is looked for
DROP = 8 << 10  # characters after which read text is dropped: Python counts the lines before every error
MARGIN = 16  # characters at the end of what is read: an error there may be a value that is read only in part
BROKEN = "broken JSON"
IN_VAIN = 4  # times that the text may be parsed to find rows behind damage
FEW = 3  # rows; before them the rows ahead tell as much
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
        self.look_again = 0  # `consumed` from which on the rows ahead are looked at again
        self.in_vain = 0  # characters of broken values that were parsed

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
        self.count_row(value, begin)
        return value

    def count_row(self, value: Any, begin: int) -> None:
        """Notes a sound row that began where `consumed` was `begin`: what it looks like, and how long it is."""
        self.rows += 1
        self.row_characters += self.consumed - begin
        if self.rows < 1000 and value:
            self._learn_from(value)

    def _ends(self) -> bool:
        """Whether a comma, a closing bracket or the end of the file is next, as behind an element."""
        while True:
            at = _WHITE.match(self.text, self.start).end()  # type: ignore[union-attr]
            if at < len(self.text) or not self.more:
                return self.text[at : at + 1] in ("", ",", "]")
            self.grow()

    def _learn_from(self, value: Any) -> None:
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
        if self.rows < FEW and self.consumed >= self.look_again:
            self.look_again = self.consumed + WINDOW
            self.first_keys |= {self.likely_key()} - {""}
        found = _OPENING.match(self.text, self.start)
        openings = int(found is not None and found[2] in self.first_keys)
        self._skip_broken(reason)
        openings += self._skip_to_row()
        lost = self.consumed - begin
        mean, rows = self.row_characters / max(1, self.rows), max(1, openings)
        if self.rows >= FEW and lost > 10 * rows * mean:
            rows = round(lost / mean)
        self.report.unreadable(str(reason), self.source.name, line, rows)

    def _skip_to_row(self) -> int:
        """Skips to the next row that can be read, or to the end; returns how many beginnings of rows are skipped."""
        openings = 0
        while True:
            if self.start > max(DROP, len(self.text) // 64):
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
            self._skip_broken(reason)
            return False
        if not self._fits(value):
            return False
        # `value` reads on only where the text did not hold the whole value: the beginning is at 0 then.
        self.start = start if self.consumed - consumed == self.start - start else 0
        self.consumed, self.source.line = consumed, line
        return True

    def _fits(self, value: Any) -> bool:
        item = value[0] if isinstance(value, list) and value else value
        if not isinstance(item, dict) or (is_message(item) and not self.rows and item is value):
            return False
        return self.rows < FEW or 2 * sum(key in self.keys for key in item) >= len(item)

    def _skip_broken(self, reason: Broken) -> None:
        """Skips the first character of a broken value, or, once too much was parsed in vain, what was parsed of it."""
        self.in_vain += (reason.at if self.more else len(self.text)) - self.start
        if self.in_vain > IN_VAIN * (self.consumed + WINDOW):
            self.skip(min(_behind(self.text, self.start, reason.at), len(self.text)))
        else:
            self.skip(min(self.start + 1, len(self.text)))

    def likely_key(self) -> str:
        """The first key of the rows ahead: that of the objects, or lists of messages, that take up most of the text.

        "" without one. Notes whether rows are lists.
        """
        while self.more and len(self.text) - self.start < WINDOW:
            self.grow()
        text, sizes = self.text[self.start : self.start + WINDOW], dict[tuple[str, bool], int]()
        for *kind, size in _objects(text, self.parse):
            shape = (str(kind[0]), bool(kind[1]))
            sizes[shape] = sizes.get(shape, 0) + size
        key, self.lists = max(sizes, key=lambda shape: sizes[shape], default=("", self.lists))
        return key


def is_message(value: Any) -> bool:
    """Whether an object is one message of a chat: {"role", "content"} or {"from", "value"}."""
    return isinstance(value, dict) and (
        ("role" in value and "content" in value) or ("from" in value and "value" in value)
    )


def _objects(text: str, parse: Callable[[str, int], tuple[Any, int]]) -> Iterator[tuple[str, bool, int]]:
    """(first key, False, length) of the objects in a text that can be parsed, without those inside others.

    Messages count where a list begins with them: (first key, True, length of the list).
    """
    at = in_vain = 0
    while found := _OPENING.search(text, at):
        if found.start() > DROP:
            text, at = text[found.start() :], 0
            continue
        at = found.start() + len(found[1] or "")
        try:
            value, end = parse(text, at)
            is_list = is_message(value)
            if is_list and found[1]:
                value, end = parse(text, found.start())
            if not is_list or isinstance(value, list):
                yield found[2], is_list, end - at
            at = end
        except json.JSONDecodeError as error:
            in_vain += error.pos - at
            at = at + 1 if in_vain < IN_VAIN * WINDOW else _behind(text, at, error.pos)
        except (ValueError, RecursionError) as error:
            at = _place_of(error, text, at) + 1


def _behind(text: str, start: int, error: int) -> int:
    """Where the next object may begin: a missing quote hides the beginning of the one before the error."""
    bracket = text.rfind("{", start + 1, error + 1)
    return bracket if bracket > 0 else max(start + 1, error)


def _place_of(error: Exception, text: str, start: int) -> int:
    """Where a value at `start` is wrong that has too many levels, or a number of too many digits."""
    if isinstance(error, RecursionError):  # the first LEVELS brackets are all inside it
        bracket = next(itertools.islice(_BRACKET.finditer(text, start), LEVELS, None), None)
        return bracket.start() if bracket else start
    number = _LONG_NUMBER.search(text, start)
    return number.start() if number else start
