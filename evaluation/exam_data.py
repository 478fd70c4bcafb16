"""Read multiple-choice exams: C-Eval, CMMLU, and your own csv or jsonl files, from folders or archives.

    C-Eval    {dev,val,test}/<subject>_<split>.csv    id, question, A, B, C, D, answer (none in test), explanation (dev)
    CMMLU     {dev,test}/<subject>.csv                (number), Question, A, B, C, D, Answer
    own       <subject>.csv or .jsonl                 one file is one subject; columns: see exam_table.py

Folders above `dev` may have any name. Archives (tar, tar.gz, tar.xz, tar.bz2, zip) are read in memory. A folder or
archive with dev, val or test folders is read from those folders only. Files outside of such folders form the split
`all`, unless every file name ends in _dev, _val or _test, which then names the split. Reading is all or nothing,
because skipped questions would change the score: an invalid line raises UserError with its line number.
Layouts: github.com/hkust-nlp/ceval and github.com/haonan-li/CMMLU.

The category of a subject comes from the exam's subject_mapping.json, else from data/exam_categories.json, which
combines C-Eval's subject_mapping.json and CMMLU's src/categories.py. The two agree on their common subjects. CMMLU's
fifth group, "China specific", overlaps the other four and is left out.

Called by ../eval_ceval.py. Read next: exam_table.py (one file), exam_prompts.py (the prompts).
"""

import functools
import itertools
import json
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from common.errors import UserError, escape_controls
from evaluation.exam_table import MAX_EXAM_FILE_BYTES, OPTION_LETTERS, decode_exam_text, parse_answers, parse_exam_rows

CEVAL_LETTERS = "ABCD"  # of C-Eval and CMMLU; own files have two to ten options
SPLITS = ("dev", "val", "test")
UNSPLIT = "all"  # the split of files outside of dev, val and test
DEFAULT_SPLITS = ("val", UNSPLIT, "test", "dev")  # the first one present is used
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
MAPPING_NAME = "subject_mapping.json"
COMPRESSED_MAGIC = (b"\x1f\x8b", b"\xfd7zXZ", b"BZh")  # of .gz, .xz and .bz2
EXPECTED_INPUT = (
    "expected a .csv, .tsv or .jsonl file of questions, a folder of them, or a tar or zip archive with val/*.csv or "
    "test/*.csv (C-Eval, CMMLU)"
)

ExamFile = tuple[str, str, bytes]  # (name for messages, path inside the folder or archive, content)


@dataclass(frozen=True)
class ExamItem:
    """One question of an exam. `answer` is a letter, or "" where the file has no answer."""

    subject: str
    number: str  # the number in the file; the key in a submission
    question: str
    options: tuple[str, ...]
    answer: str
    location: str  # file:line


@dataclass(frozen=True)
class ExamSplit:
    """The questions of one split, and the examples of `dev` for each subject."""

    split: str
    items: list[ExamItem]
    examples: dict[str, list[ExamItem]]
    categories: dict[str, str]  # subject -> category

    @property
    def subjects(self) -> list[str]:
        return list(dict.fromkeys(item.subject for item in self.items))


def read_exam_split(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], split: str = "", subjects: Iterable[str] = ()
) -> ExamSplit:
    """Read one split (default: the first of val, all, test, dev that exists) and dev; `subjects`: only these.

    `paths`: one or several folders, archives or files. Raises UserError with file and line for missing, damaged or
    invalid input.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    name = ", ".join(map(str, paths))
    files_by_split: dict[str, dict[str, tuple[str, bytes]]] = {}  # split -> subject -> (name for messages, content)
    categories: dict[str, str] = {}
    for group in _file_groups([Path(path) for path in paths]):
        is_mapping = [PurePosixPath(inner).name == MAPPING_NAME for _, inner, _ in group]
        for where, _, data in itertools.compress(group, is_mapping):
            categories |= _parse_subject_mapping(where, data)
        tables = [file for file, mapping in zip(group, is_mapping, strict=True) if not mapping]
        for file_split, subject, where, data in _assign_splits(tables):
            known = files_by_split.setdefault(file_split, {})
            if subject in known:
                raise UserError(f"{name} holds {subject} twice, {known[subject][0]} and {where}: name one exam")
            known[subject] = (where, data)
    available = [known_split for known_split in DEFAULT_SPLITS if known_split in files_by_split]
    if not available:
        raise UserError(f"{name} holds no exam: {EXPECTED_INPUT}")
    if not split and UNSPLIT in available and len(available) > 1 + ("dev" in available):
        raise UserError(f"{name} has the splits {', '.join(available)}: choose one with --split")
    split = split or available[0]
    if split not in files_by_split:
        raise UserError(f"{name} has no split {split!r}: choose one of {', '.join(available)} with --split")
    files, dev = files_by_split[split], files_by_split.get("dev", {})
    selected = list(subjects) or sorted(files)
    for subject in selected:
        if subject not in files:
            raise UserError(f"{name} has no subject {subject!r} in {split}; choose from {', '.join(sorted(files))}")
    items = [item for subject in selected for item in _parse_file(subject, *files[subject])]
    examples = {
        subject: _parse_file(subject, *dev[subject], needs_answer=True) for subject in selected if subject in dev
    }
    return ExamSplit(split, items, examples, {s: categories.get(s) or subject_category(s) for s in selected})


def _parse_file(subject: str, where: str, data: bytes, needs_answer: bool = False) -> list[ExamItem]:
    return parse_exam_items(subject, where, decode_exam_text(where, data), needs_answer)


def parse_exam_items(subject: str, where: str, text: str, needs_answer: bool = False) -> list[ExamItem]:
    """The questions of one file's text. `where` is the file name, which ends in .jsonl for jsonl.

    Either all questions have answers or none has (C-Eval's `test`). Raises UserError with file and line.
    """
    rows = parse_exam_rows(where, text, needs_answer)
    if not rows:
        raise UserError(f"{where}: no questions")
    items: dict[str, ExamItem] = {}
    for row, answer in zip(rows, parse_answers(where, rows), strict=True):
        location = f"{where}:{row.line}"
        if row.number in items:
            raise UserError(f"{location}: the number {row.number} occurs twice")
        items[row.number] = ExamItem(subject, row.number, row.question, row.options, answer, location)
    without_answer = [item for item in items.values() if not item.answer]
    if without_answer and (needs_answer or len(without_answer) < len(items)):
        letters = OPTION_LETTERS[: len(without_answer[0].options)]
        raise UserError(
            f"{without_answer[0].location}: the answer is empty: expected {', '.join(letters[:-1])} or {letters[-1]}"
        )
    return list(items.values())


def _parse_subject_mapping(where: str, data: bytes) -> dict[str, str]:
    """C-Eval's subject_mapping.json: {subject: [English name, Chinese name, category]}."""
    try:
        content = json.loads(decode_exam_text(where, data))
        return {subject: str(names[2]) for subject, names in content.items()}
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
        raise UserError(f"{where}: expected {{subject: [English, Chinese, category]}}") from None


@functools.cache
def _known_categories() -> dict[str, str]:
    subjects = json.loads((Path(__file__).parent / "data" / "exam_categories.json").read_text(encoding="utf-8"))
    return {subject: category for category, names in subjects.items() for subject in names}


def subject_category(subject: str) -> str:
    """STEM, Social Science, Humanities or Other; Other for an unknown subject."""
    return _known_categories().get(subject, "Other")


# ---- which file is which split ---------------------------------------------------------------------------------------
def _file_groups(paths: list[Path]) -> Iterator[list[ExamFile]]:
    """One group for each folder or archive, and one group of all files that are given directly."""
    single: list[ExamFile] = []
    for path in paths:
        if path.suffix.lower() in TABLE_SUFFIXES and path.is_file():
            single += read_exam_files(path)
        else:
            yield list(read_exam_files(path))
    if single:
        yield single


def _assign_splits(files: list[ExamFile]) -> list[tuple[str, str, str, bytes]]:
    """(split, subject, name for messages, content) of the tables of one group."""
    paths = [PurePosixPath(inner) for _, inner, _ in files]
    splits = [path.parent.name if path.parent.name in SPLITS else "" for path in paths]
    if not any(splits):  # val/law.csv is absent: law_val.csv is of the split val if all names end so
        splits = [next((split for split in SPLITS if path.stem.endswith(f"_{split}")), "") for path in paths]
        splits = splits if all(splits) else [UNSPLIT] * len(files)
    return [
        (split, escape_controls(path.stem.removesuffix(f"_{split}")), where, data)  # names may have control characters
        for split, path, (where, _, data) in zip(splits, paths, files, strict=True)
        if split
    ]


# ---- files -----------------------------------------------------------------------------------------------------------
def read_exam_files(path: Path) -> Iterator[ExamFile]:
    """(name for messages, path inside, content) of the tables and the mapping in a folder or archive, or of one file.

    Raises UserError.
    """
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if _is_exam_file(file.name) and file.is_file():
                yield str(file), (path.absolute() / file.relative_to(path)).as_posix(), _read_file(file)
        return
    if not path.exists():
        raise UserError(f"{path}: no such file or folder: give the exam's folder, file or archive with --data")
    if path.suffix.lower() in TABLE_SUFFIXES:
        yield str(path), path.absolute().as_posix(), _read_file(path)
        return
    is_zip = zipfile.is_zipfile(path)
    try:
        with path.open("rb") as opened:
            is_tar = opened.read(6).startswith(COMPRESSED_MAGIC) or tarfile.is_tarfile(path)
        if not (is_zip or is_tar) or path.suffix.lower() == ".xlsx":
            raise UserError(f"{path} is no exam: {EXPECTED_INPUT}")
        yield from _read_zip(path) if is_zip else _read_tar(path)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0].rstrip(":")
        raise UserError(
            f"cannot read {path} as a tar or zip archive ({reason[:80]}): damaged, or {EXPECTED_INPUT}"
        ) from None
    except (RuntimeError, NotImplementedError) as error:  # zip: a password or an unknown compression method
        raise UserError(f"cannot read {path}: {error}: unpack it and give the folder") from None


def _is_exam_file(name: str) -> bool:
    """A table or the mapping. Skips `._x.csv`, macOS metadata of x.csv."""
    return (name.lower().endswith(TABLE_SUFFIXES) and not name.startswith("._")) or name == MAPPING_NAME


def _read_file(file: Path) -> bytes:
    try:
        _check_size(str(file), file.stat().st_size)
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


def _read_tar(path: Path) -> Iterator[ExamFile]:
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and _is_exam_file(PurePosixPath(member.name).name):
                _check_size(f"{path}/{member.name}", member.size)
                file = archive.extractfile(member)
                assert file is not None  # a regular file
                yield f"{path}/{member.name}", member.name, file.read()


def _read_zip(path: Path) -> Iterator[ExamFile]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.is_dir() and _is_exam_file(PurePosixPath(member.filename).name):
                _check_size(f"{path}/{member.filename}", member.file_size)
                yield f"{path}/{member.filename}", member.filename, archive.read(member)


def _check_size(where: str, size: int) -> None:
    if size > MAX_EXAM_FILE_BYTES:
        raise UserError(f"{where}: larger than {MAX_EXAM_FILE_BYTES >> 20} MB, not an exam file: remove it")
