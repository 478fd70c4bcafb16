"""Reads csv as spreadsheets and pandas write it: `,` `;` `|` or tab, short rows, "sep=;", unclosed quotes.

    delimiter        the candidate that splits the header into the most cells and no early row into more cells
    short row        the missing last cells are empty
    long row         a bad row, unless the extra cells are empty
    unclosed quote   a bad row; reading continues at the line after the opening quote. A quote counts as unclosed if it
                     does not end within MAX_CELL_LINES lines or MAX_CELL characters, if broken quoting is followed by
                     a valid row, or if the lines inside the cell are valid rows

Quotes are doubled inside quotes, backslashes are literal, line ends inside quotes are kept.

Read next: readers.py (the caller).
"""

import csv
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from common.errors import UserError
from corpus.input_files import MAX_LINE, InputFile, NumberedRows
from corpus.stats import DataStats

MAX_CELL_LINES, MAX_CELL = 10_000, 4 << 20  # limits of a quoted cell: lines, characters
MAX_HEADER = 1 << 16  # characters used of a malformed header
MAX_COLUMNS = 1000  # short rows are padded to the number of columns, so it is limited
JOINED_LINES = 3  # if this many lines inside a quoted cell are all valid rows, its quote is unclosed
CSV_DELIMITERS = ",\t;|"
MAX_SNIFFED_ROWS = 20  # rows read to find the delimiter
OPEN_QUOTE_REASON = "unclosed csv quote"
JOINED_ROWS_REASON = "unclosed csv quote that spans several rows"


class _CsvLines:
    """Lines of text for csv.reader. Keeps the lines of the current row, which may have to be parsed again."""

    def __init__(self, input_file: InputFile, report: DataStats) -> None:
        self.input_file, self.report = input_file, report
        self.number = 0  # number of the line before the current row
        self.row_lines: list[str] = []
        self.reread: deque[str] = deque()  # lines to parse again before the next line of the file
        self.malformed: set[int] = set()  # numbers of malformed lines
        self.size = 0  # bytes read

    def start_row(self) -> None:
        self.number += len(self.row_lines)
        self.row_lines.clear()
        self.input_file.line = self.number + 1

    def __iter__(self) -> Iterator[str]:
        row, reread, readline = self.row_lines, self.reread, self.input_file.stream.readline
        while len(row) < MAX_CELL_LINES:  # at the limit csv.reader sees the end of the text inside a quote
            if reread:
                text = reread.popleft()
            else:
                line = readline(MAX_LINE)
                if not line:
                    return
                if len(line) == MAX_LINE and not line.endswith(b"\n"):
                    self.number += 1
                    self.input_file.count_long_line(line, self.number + len(row), self.size, self.report)
                    continue
                self.size += len(line)
                try:
                    text = line.decode()
                except UnicodeDecodeError:
                    text = line.decode("utf-8", "surrogateescape")
                    self.malformed.add(self.number + len(row) + 1)
            row.append(text)
            yield text

    def keep_first_line(self) -> None:
        """Ends the current row after its first line; its other lines are parsed again as rows."""
        self.reread.extendleft(reversed(self.row_lines[1:]))
        del self.row_lines[1:]

    def is_malformed(self) -> bool:
        return bool(self.malformed) and not self.malformed.isdisjoint(
            range(self.number + 1, self.number + len(self.row_lines) + 1)
        )


def read_csv(input_file: InputFile, report: DataStats) -> NumberedRows:
    """Yields (first line of the row, {column: text}), with column names in lower case."""
    csv.field_size_limit(MAX_CELL)
    head = input_file.head().decode("utf-8", "replace")
    lines = _CsvLines(input_file, report)
    mark = re.match(r"sep=(.)[ \t]*\r?\n", head)  # Excel
    if mark:
        input_file.stream.readline(len(mark[0]))
        head, lines.number = head[len(mark[0]) :], 1
    delimiter = mark[1] if mark else detect_delimiter(head)
    spaces = bool(re.match(r"[^\n]*" + re.escape(delimiter) + ' +"', head))  # in `a, "b"` the quote opens a cell

    def parse(text: Iterable[str], strict: bool = True) -> Iterator[list[str]]:
        return csv.reader(text, strict=strict, delimiter=delimiter, skipinitialspace=spaces)

    def parse_cells(text: str, strict: bool = False) -> list[str]:
        """The cells of one line, [] if it is not valid csv; `strict=False` accepts stray quotes."""
        try:
            return next(parse([text], strict), [])
        except csv.Error:
            return []

    rows = parse(lines)
    columns: list[str] = []
    while True:
        lines.start_row()
        line = input_file.line
        try:
            cells = next(rows, None)
        except csv.Error as error:
            rows = parse(lines)
            if not columns:  # the header may contain stray quotes
                lines.keep_first_line()
                names = lines.row_lines[0].replace("\r", " ").strip()[:MAX_HEADER]
                columns = _column_names(parse_cells(names)[:MAX_COLUMNS]) or [""]
                continue
            follows = [len(parse_cells(text, True)) == len(columns) for text in lines.row_lines[1:]]
            is_open = follows[:1] == [True] or "unexpected end" in str(error) or "field limit" in str(error)
            rows_lost = 1 if is_open else 1 + sum(follows) * (len(columns) > 1)
            report.row_unreadable(_bad_row_reason(lines.row_lines, is_open), input_file.name, line, rows_lost)
            if is_open:
                lines.keep_first_line()
            continue
        if cells is None:
            return
        if not columns:
            columns = _column_names(cells)
            if len(columns) > MAX_COLUMNS:
                raise UserError(f"{input_file.name}:{line}: a csv header of {len(columns):,} columns; the limit is "
                                f"{MAX_COLUMNS:,}: leave some out")  # fmt: skip
        elif len(lines.row_lines) > JOINED_LINES + 1 and _spans_several_rows(
            lines.row_lines, parse_cells, len(columns)
        ):
            report.row_unreadable(JOINED_ROWS_REASON, input_file.name, line)
            lines.keep_first_line()
        elif lines.malformed and lines.is_malformed():
            report.row_unreadable(input_file.malformed_reason, input_file.name, line)
        elif len(cells) > len(columns) and any(cell.strip() for cell in cells[len(columns) :]):
            report.row_unreadable("more csv cells than columns", input_file.name, line)
        elif cells:
            if len(cells) < len(columns):
                cells += [""] * (len(columns) - len(cells))
            yield line, dict(zip(columns, cells, strict=False))


def _spans_several_rows(row: list[str], parse_cells: Callable[[str, bool], list[str]], columns: int) -> bool:
    """True if the lines inside a row are valid rows, because a quote of a later row closed an unclosed one.

    With two columns more such lines are required: a few lines of ordinary text may each contain one comma.
    """
    inner = row[1:-1]
    min_lines = JOINED_LINES if columns > 2 else 3 * JOINED_LINES
    return columns > 1 and len(inner) >= min_lines and all(len(parse_cells(text, True)) == columns for text in inner)


def detect_delimiter(head: str) -> str:
    """Returns the delimiter of a csv file that begins with `head`; "," if it has one column."""
    best, most = ",", 0.0
    for delimiter in CSV_DELIMITERS:
        try:
            rows = [row for row in csv.reader([line + "\n" for line in head.split("\n")], delimiter=delimiter) if row]
        except csv.Error:
            continue
        rows = (
            rows[: MAX_SNIFFED_ROWS + 1] if len(rows) > MAX_SNIFFED_ROWS else rows[:-1] or rows
        )  # the last row may be incomplete
        columns = len(rows[0]) if rows else 0
        matching = sum(1 < len(row) <= columns for row in rows) / max(1, len(rows))
        if columns > 1 and matching * columns > most:
            best, most = delimiter, matching * columns
    return best


def _column_names(cells: list[str]) -> list[str]:
    """Names in lower case without outer spaces and quotes; a repeated name becomes name.1, as in pandas."""
    names: list[str] = []
    counts: dict[str, int] = {}
    for cell in cells:
        name = cell.strip().strip("\ufeff\"'").strip().lower()
        count = counts[name] = counts.get(name, 0) + 1
        names.append(name if count == 1 else f"{name}.{count - 1}")
    return names


def _bad_row_reason(row: list[str], is_open: bool) -> str:
    if any("\0" in text for text in row):
        return "NUL character"
    return OPEN_QUOTE_REASON if is_open else "broken csv quoting"
