"""Multiple-choice exams in the layouts of C-Eval and CMMLU, from a folder, a tar (.gz .xz .bz2) or a zip.

    C-Eval    {dev,val,test}/<subject>_<split>.csv    id, question, A, B, C, D, answer (none in test), explanation (dev)
    CMMLU     {dev,test}/<subject>.csv                (number), Question, A, B, C, D, Answer

Folders above `dev` may have any name. Archives are read as they are, nothing is unpacked to the disk. An exam is
either read whole or not at all: a question left out in silence would change the score. A file that cannot be read to
the last line is an error with its line number.
Layouts: github.com/hkust-nlp/ceval and github.com/haonan-li/CMMLU.

Called by ../eval_ceval.py. Read next: exam_subjects.py (which subject belongs where), ../evaluation/exam.py (who asks).
"""

import csv
import io
import json
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from corpus.errors import UserError
from corpus.exam_subjects import category_of

LETTERS = "ABCD"
SPLITS = ("dev", "val", "test")
LARGEST = 64 << 20  # bytes of one csv file; real ones have less than one
csv.field_size_limit(LARGEST)


@dataclass(frozen=True)
class Item:
    """One question of an exam. `answer` is a letter, or "" where the file keeps it secret."""

    subject: str
    number: str  # as the file numbers it; what a submission is keyed by
    question: str
    options: tuple[str, str, str, str]
    answer: str
    where: str  # file:line


@dataclass(frozen=True)
class Exam:
    """The questions of one split, and the examples of `dev` for each subject."""

    split: str
    items: list[Item]
    examples: dict[str, list[Item]]
    categories: dict[str, str]  # subject -> category

    @property
    def subjects(self) -> list[str]:
        return list(dict.fromkeys(item.subject for item in self.items))


def read_exam(path: str | os.PathLike[str], split: str = "", subjects: Iterable[str] = ()) -> Exam:
    """Read one split (default: val, or test where there is no val) and dev; `subjects` leaves out all others.

    Raises UserError naming file and line where anything is missing, damaged or not an exam.
    """
    found: dict[str, dict[str, tuple[str, str]]] = {name: {} for name in SPLITS}  # split -> subject -> (where, text)
    mapping: dict[str, str] = {}
    for where, inside, data in files_of(Path(path)):
        if PurePosixPath(inside).name == "subject_mapping.json":
            mapping = _mapping(where, data)
            continue
        place = _place(inside)
        if place is None:
            continue
        of_split, subject = place
        if subject in found[of_split]:
            raise UserError(f"{path} holds {subject} twice, {found[of_split][subject][0]} and {where}: name one exam")
        found[of_split][subject] = (where, _decode(where, data))
    there = [name for name in SPLITS if found[name]]
    if not there:
        raise UserError(f"{path} holds no exam: expected val/<subject>_val.csv (C-Eval) or test/<subject>.csv (CMMLU)")
    split = split or ("val" if found["val"] else "test")
    if not found.get(split):
        raise UserError(f"{path} has no split {split!r}: choose one of {', '.join(there)} with --split")
    wanted = list(subjects) or sorted(found[split])
    for subject in wanted:
        if subject not in found[split]:
            raise UserError(
                f"{path} has no subject {subject!r} in {split}; there are {', '.join(sorted(found[split]))}"
            )
    items = [item for subject in wanted for item in read_items(subject, *found[split][subject])]
    examples = {s: read_items(s, *found["dev"][s], needs_answer=True) for s in wanted if s in found["dev"]}
    return Exam(split, items, examples, {s: mapping.get(s) or category_of(s) for s in wanted})


def read_items(subject: str, where: str, text: str, needs_answer: bool = False) -> list[Item]:
    """The questions of one csv text, or UserError. Columns are found by their names, in either case.

    Answers may be missing altogether (C-Eval keeps those of `test` secret), but not here and there.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    items: list[Item] = []
    numbers: set[str] = set()
    try:
        head = [name.strip().lower() for name in next(reader, [])]
        columns = {name: head.index(name) for name in ("question", *LETTERS.lower(), "answer") if name in head}
        missing = [name for name in ("question", *LETTERS.lower()) if name not in columns]
        if needs_answer and "answer" not in columns:
            missing.append("answer")
        if missing:
            raise UserError(f"{where}: no column {', '.join(missing)} in its first line: {','.join(head)[:100]!r}")
        number_column = next((i for i, name in enumerate(head) if name in ("id", "")), None)
        line = reader.line_num + 1
        for count, cells in enumerate(reader):
            here, line = f"{where}:{line}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(head):
                raise UserError(f"{here}: {len(cells)} cells, {len(head)} in the first line: quote texts with commas")
            cell = {name: cells[i].strip() for name, i in columns.items()}
            number = (cells[number_column].strip() if number_column is not None else "") or str(count)
            item = _item(subject, number, cell, here)
            if number in numbers:
                raise UserError(f"{here}: the number {number} occurs twice")
            numbers.add(number)
            items.append(item)
    except csv.Error as error:
        raise UserError(f"{where}:{reader.line_num}: not valid csv: {error}") from None
    if not items:
        raise UserError(f"{where}: no questions")
    secret = [item for item in items if not item.answer]
    if secret and (needs_answer or len(secret) < len(items)):
        raise UserError(f"{secret[0].where}: the answer is empty: expected A, B, C or D")
    return items


def _item(subject: str, number: str, cell: dict[str, str], where: str) -> Item:
    for name in ("question", *LETTERS.lower()):
        if not cell[name]:
            raise UserError(f"{where}: {name if name == 'question' else name.upper()} is empty")
    answer = cell.get("answer", "").upper()
    if answer not in ("", *LETTERS):
        raise UserError(f"{where}: the answer must be A, B, C or D, not {cell['answer'][:20]!r}")
    a, b, c, d = (cell[letter] for letter in LETTERS.lower())
    return Item(subject, number, cell["question"], (a, b, c, d), answer, where)


def _place(inside: str) -> tuple[str, str] | None:
    """(split, subject) of a file's path, None where it is no exam file. `._x.csv` is a Macintosh's shadow of x.csv."""
    file = PurePosixPath(inside)
    split = file.parent.name
    if file.suffix.lower() != ".csv" or split not in SPLITS or file.name.startswith("._"):
        return None
    return split, file.stem.removesuffix(f"_{split}")


def _decode(where: str, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{where}:{line}: not UTF-8 text: save it as UTF-8") from None
    if "\0" in text:
        raise UserError(f"{where}:{text[: text.index(chr(0))].count(chr(10)) + 1}: a NUL character: damaged")
    return text


def _mapping(where: str, data: bytes) -> dict[str, str]:
    """C-Eval's subject_mapping.json: {subject: [English name, Chinese name, category]}."""
    try:
        content = json.loads(_decode(where, data))
        return {subject: str(names[2]) for subject, names in content.items()}
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
        raise UserError(f"{where}: expected {{subject: [English, Chinese, category]}}") from None


def files_of(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """(what to call it, path inside, content) of every .csv and the mapping in a folder or archive, or UserError."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if _is_wanted(file.name) and file.is_file():
                if file.stat().st_size > LARGEST:
                    raise UserError(f"{file}: larger than {LARGEST >> 20} MB: not an exam file")
                try:
                    yield str(file), (path.absolute() / file.relative_to(path)).as_posix(), file.read_bytes()
                except OSError as error:
                    raise UserError(f"cannot read {file}: {error.strerror}") from None
        return
    if not path.exists():
        raise UserError(f"{path}: no such file or folder: give the exam's folder or archive with --data")
    try:
        yield from _zipped(path) if zipfile.is_zipfile(path) else _tarred(path)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0].rstrip(":")
        raise UserError(f"cannot read {path} as a tar or zip archive ({reason[:80]}): damaged or no archive") from None
    except (RuntimeError, NotImplementedError) as error:  # zip: a password, an unknown method
        raise UserError(f"cannot read {path}: {error}: unpack it and give the folder") from None


def _is_wanted(name: str) -> bool:
    return name.lower().endswith(".csv") or name == "subject_mapping.json"


def _tarred(path: Path) -> Iterator[tuple[str, str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and _is_wanted(PurePosixPath(member.name).name):
                _check_size(path, member.name, member.size)
                file = archive.extractfile(member)
                assert file is not None  # a regular file
                yield f"{path}/{member.name}", member.name, file.read()


def _zipped(path: Path) -> Iterator[tuple[str, str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.is_dir() and _is_wanted(PurePosixPath(member.filename).name):
                _check_size(path, member.filename, member.file_size)
                yield f"{path}/{member.filename}", member.filename, archive.read(member)


def _check_size(path: Path, name: str, size: int) -> None:
    if size > LARGEST:
        raise UserError(f"{path}/{name}: larger than {LARGEST >> 20} MB: not an exam file")
