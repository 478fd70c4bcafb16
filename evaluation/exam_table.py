"""Parse one file of multiple-choice questions: bytes -> text -> rows of question, options and answer.

    csv        question, A, B, C, D, answer    any order and case; also 题目/问题, 选项A, 答案; separator , ; or tab
    csv        what is 1+1?,1,2,3,4,B          without a header, as MMLU: the last cell of the first row is a letter;
                                               an integer before the question is the row's number
    jsonl      {"question": …, "A": …, "B": …, "answer": "B"}  or {"question": …, "choices": ["…", "…"], "answer": 1}

A question has two to ten options; trailing empty options of a row are dropped. An answer is a letter (b, (B), Ｂ) or
a number. Numbers start at 0 if the file has a 0, and at 1 if one of them equals the number of options; a file with
neither is an error, because its numbering is unknown. Other columns (explanation, …) are ignored.
Encodings: ../corpus/text_encoding.py. MMLU's layout: github.com/hendrycks/test.

Read next: exam_data.py (which file is which subject and split).
"""

import contextlib
import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from corpus.text_encoding import SAMPLE_BYTES, detect_encoding

OPTION_LETTERS = "ABCDEFGHIJ"
MAX_EXAM_FILE_BYTES = 64 << 20  # bytes; real exam files are below 1 MiB
_DELIMITERS = ",;\t"
QUESTION_NAMES = ("question", "questions", "query", "prompt", "题目", "问题", "题干")
ANSWER_NAMES = ("answer", "answers", "label", "target", "correct", "correctanswer", "correctoption", "answerkey",
                "答案", "正确答案", "正确选项", "标准答案", "参考答案")  # fmt: skip
NUMBER_NAMES = ("id", "number", "index", "", "序号", "编号", "题号")
LIST_NAMES = ("choices", "options", "选项")
_OPTION = re.compile(r"(?:option|choice|opt|op|选项)?([a-j])(?:选项)?")
_LETTER = re.compile(r"[(\[]?([A-J])[)\].,:、。]?")
csv.field_size_limit(MAX_EXAM_FILE_BYTES)


@dataclass(frozen=True)
class ExamRow:
    """One question of a file: stripped cells, two to ten options, the answer unparsed ("" where it is missing)."""

    line: int
    number: str
    question: str
    options: tuple[str, ...]
    answer: str


# ---- text ------------------------------------------------------------------------------------------------------------
def decode_exam_text(where: str, data: bytes) -> str:
    """The text of a file in any encoding of ../corpus/text_encoding.py, without a byte order mark. Raises UserError."""
    text = _try_encodings(data)
    if text is None:
        raise UserError(f"{where}: neither UTF-8 nor UTF-16 nor GB18030 text: save it as UTF-8")
    if "\0" in text:
        line = text.partition("\0")[0].count("\n") + 1
        raise UserError(f"{where}:{line}: a NUL character: the file is damaged")
    return text.removeprefix("\ufeff")


def _try_encodings(data: bytes) -> str | None:
    for codec in (detect_encoding(data[:SAMPLE_BYTES]).codec, "gb18030"):
        with contextlib.suppress(UnicodeDecodeError):
            text = data.decode(codec)
            if codec != "gb18030" or _is_chinese(text):
                return text
    return None


def _is_chinese(text: str) -> bool:
    """Whether at least 90 % of the non-ASCII characters are in GB 2312; those of misread Latin text ("Müller") are not.

    detect_encoding needs more text than a file with a few Chinese characters has.
    """
    non_ascii = [character for character in text if character > "\x7f"]
    return sum(len(character.encode("gb2312", "ignore")) > 0 for character in non_ascii) >= 0.9 * len(non_ascii)


def normalize_column_name(name: str) -> str:
    """A column name in the form used for comparison: "Option_A", "选项Ａ" -> "optiona", "选项a"."""
    return re.sub(r"[\s_.:-]", "", unicodedata.normalize("NFKC", name)).lower()


# ---- columns ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ExamColumns:
    """The column index of each field; `options` in the order of their letters; -1: no such column."""

    question: int
    options: tuple[int, ...]
    answer: int
    number: int
    count: int  # cells in a row


def parse_header(cells: list[str]) -> tuple[ExamColumns, list[str]]:
    """(the columns of a header, the names of required columns that are missing)."""
    names = [normalize_column_name(cell) for cell in cells]

    def first_index(column_names: Iterable[str]) -> int:
        return next((names.index(name) for name in column_names if name in names), -1)

    indices = {
        found[1].upper(): i for i, name in reversed(list(enumerate(names))) if (found := _OPTION.fullmatch(name))
    }
    last = max(indices, default="B")
    letters = OPTION_LETTERS[: max(OPTION_LETTERS.index(last), 1) + 1]
    question = first_index(QUESTION_NAMES)
    missing = ["question"] * (question < 0) + [letter for letter in letters if letter not in indices]
    options = tuple(indices.get(letter, -1) for letter in letters)
    return ExamColumns(question, options, first_index(ANSWER_NAMES), first_index(NUMBER_NAMES), len(cells)), missing


def infer_columns(cells: list[str]) -> ExamColumns | None:
    """The columns of a file without a header, from its first row: question, options, letter. None if they do not match.

    An integer before the question is the row number (C-Eval's files).
    """
    if len(cells) > 4 and cells[0].strip().isdecimal() and (rest := infer_columns(cells[1:])) and rest.number < 0:
        return ExamColumns(1, tuple(range(2, len(cells) - 1)), len(cells) - 1, 0, len(cells))
    options = len(cells) - 2
    if not 2 <= options <= len(OPTION_LETTERS) or not all(cell.strip() for cell in cells[:3]):
        return None
    names = [normalize_column_name(cell).upper() for cell in cells]
    column_names = {name.upper() for name in (*QUESTION_NAMES, *ANSWER_NAMES, *NUMBER_NAMES)}
    if column_names.intersection(names[:2]) or names[1:] == list(OPTION_LETTERS[: options + 1]):
        return None  # a header with a missing column
    if parse_letter(cells[-1]) not in tuple(OPTION_LETTERS[:options]):
        return None
    return ExamColumns(0, tuple(range(1, options + 1)), options + 1, -1, len(cells))


def parse_letter(answer: str) -> str:
    """B of "b", "(B)", "Ｂ." and "B、"; "" for anything else."""
    found = _LETTER.fullmatch(unicodedata.normalize("NFKC", answer).strip().upper())
    return found[1] if found else ""


# ---- rows ------------------------------------------------------------------------------------------------------------
def parse_exam_rows(where: str, text: str, needs_answer: bool = False) -> list[ExamRow]:
    """The rows of one file; `where` ends in .jsonl for jsonl. Raises UserError naming file, line and field."""
    return _parse_jsonl(where, text) if where.lower().endswith(".jsonl") else _parse_csv(where, text, needs_answer)


def _make_row(where: str, line: int, columns: ExamColumns, cells: list[str], number: str) -> ExamRow:
    """A row without trailing empty options. `number`: for rows without one. Raises UserError for empty cells."""
    cell = lambda index: cells[index].strip() if index >= 0 else ""
    question, options = cell(columns.question), [cell(index) for index in columns.options]
    if not question:
        raise UserError(f"{where}:{line}: question is empty")
    while len(options) > 2 and not options[-1]:
        options.pop()
    if "" in options:
        raise UserError(f"{where}:{line}: {OPTION_LETTERS[options.index('')]} is empty")
    return ExamRow(line, cell(columns.number) or number, question, tuple(options), cell(columns.answer))


def _parse_csv(where: str, text: str, needs_answer: bool) -> list[ExamRow]:
    columns, has_header, delimiter = _detect_layout(where, text, needs_answer)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[ExamRow] = []
    try:
        if has_header:
            next(reader)
        line = reader.line_num + 1
        for count, cells in enumerate(reader):
            first_line, line = line, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != columns.count:
                raise UserError(
                    f"{where}:{first_line}: {len(cells)} cells, {columns.count} in the first line: "
                    f"quote texts that contain {delimiter!r}"
                )
            rows.append(_make_row(where, first_line, columns, cells, str(count)))
    except csv.Error as error:
        raise UserError(f"{where}:{reader.line_num}: not valid csv: {error}") from None
    return rows


def _detect_layout(where: str, text: str, needs_answer: bool) -> tuple[ExamColumns, bool, str]:
    """(columns, has_header, delimiter): the first delimiter with which the first line is valid. Raises UserError."""
    problems: list[tuple[int, str]] = []
    for delimiter in _DELIMITERS:
        try:
            cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), [])
        except csv.Error as error:
            problems.append((0, f"{where}:1: not valid csv: {error}"))
            continue
        columns, missing = parse_header(cells)
        if columns.answer < 0 and needs_answer:
            missing.append("answer")
        if not missing:
            return columns, True, delimiter
        if bare := infer_columns(cells):
            return bare, False, delimiter
        found = len(cells) - len(missing)
        shown = delimiter.join(cells)[:100]
        problems.append((found, f"{where}: no column {', '.join(missing)} in the first line: {shown!r}"))
    raise UserError(max(problems, key=lambda problem: problem[0])[1])


def _parse_jsonl(where: str, text: str) -> list[ExamRow]:
    rows: list[ExamRow] = []
    for line, raw_text in enumerate(text.split("\n"), 1):
        if not raw_text.strip():
            continue
        try:
            row = json.loads(raw_text)
        except (ValueError, RecursionError):
            raise UserError(f"{where}:{line}: not JSON: write a JSON object on each line") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}:{line}: not a JSON object: write one on each line")
        cells = {normalize_column_name(str(name)): value for name, value in _expand_options(row).items()}
        columns, missing = parse_header(list(cells))
        if missing:
            raise UserError(f"{where}:{line}: no key {', '.join(missing)}; keys: {', '.join(map(str, row))[:100]}")
        texts = ["" if value is None or isinstance(value, (list, dict)) else str(value) for value in cells.values()]
        rows.append(_make_row(where, line, columns, texts, str(len(rows))))
    return rows


def _expand_options(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its options ("choices": ["x", "y"], {"A": "x"} or {"text": […]}) as keys A, B, …"""
    for name, value in row.items():
        if normalize_column_name(str(name)) in LIST_NAMES and isinstance(value, (list, dict)):
            if isinstance(value, dict) and isinstance(value.get("text"), list):
                value = value["text"]
            if isinstance(value, list):
                value = dict(zip(OPTION_LETTERS, value, strict=False)) if len(value) <= len(OPTION_LETTERS) else {}
            return {key: item_value for key, item_value in row.items() if key != name} | value
    return row


# ---- answers ---------------------------------------------------------------------------------------------------------
def parse_answers(where: str, rows: list[ExamRow]) -> list[str]:
    """The letter of each row's answer, "" where it is missing. Raises UserError for an answer that is no option."""
    base = _first_option_number(where, rows)
    letters = []
    for row in rows:
        text, allowed = unicodedata.normalize("NFKC", row.answer), OPTION_LETTERS[: len(row.options)]
        letter = parse_letter(text)
        if text.isdecimal() and base is not None:
            index = int(text[:9]) - base
            letter = allowed[index] if 0 <= index < len(allowed) else ""
        if row.answer and letter not in tuple(allowed):
            expected = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
            raise UserError(f"{where}:{row.line}: the answer must be {expected}, not {row.answer[:20]!r}")
        letters.append(letter)
    return letters


def _first_option_number(where: str, rows: list[ExamRow]) -> int | None:
    """0 or 1: the number of the first option if answers are numbers; None if they are letters. Raises UserError."""
    found: list[tuple[ExamRow, int]] = []
    for row in rows:
        text = unicodedata.normalize("NFKC", row.answer)
        if text.isdecimal():
            found.append((row, int(text[:9])))
        elif row.answer and found:
            raise UserError(f"{where}:{row.line}: the answer is {row.answer[:20]!r}, others are numbers: use letters")
    if not found:
        return None
    zero = next((row for row, value in found if value == 0), None)
    last = next((row for row, value in found if value == len(row.options)), None)
    unclear = "unclear whether options count from 0 or 1: use letters"
    if zero and last:
        raise UserError(
            f"{where}:{last.line}: the answer is {last.answer}, that of line {zero.line} is 0: it is {unclear}"
        )
    if not zero and not last:
        raise UserError(
            f"{where}:{found[0][0].line}: the answers are numbers, but none is 0 or the number of options: "
            f"it is {unclear}"
        )
    base = 0 if zero else 1
    for row, value in found:
        if str(value) in row.options and row.options.index(str(value)) != value - base:
            raise UserError(
                f"{where}:{row.line}: the answer {value} is the number of one option and the text of another: "
                "use letters"
            )
    return base
