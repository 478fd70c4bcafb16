"""Read multiple-choice exams: C-Eval, CMMLU, and your own csv or jsonl files, from folders or archives.

    C-Eval    {dev,val,test}/<subject>_<split>.csv    id, question, A, B, C, D, answer (none in test), explanation (dev)
    CMMLU     {dev,test}/<subject>.csv                (number), Question, A, B, C, D, Answer
    own       <subject>.csv or .jsonl                 one file is one subject; columns: see exam_table.py

Folders above `dev` may have any name. Archives (tar, tar.gz, tar.xz, tar.bz2, zip) are read in memory. A folder or
archive with dev, val or test folders is read from those folders only. Files outside of such folders form the split
`all`, unless every file name ends in _dev, _val or _test, which then names the split. Reading is all or nothing,
because skipped questions would change the score: an invalid line raises UserError with its line number.
Layouts: github.com/hkust-nlp/ceval and github.com/haonan-li/CMMLU.

The category of a subject comes from the exam's subject_mapping.json, else from CATEGORY_SUBJECTS, which combines
C-Eval's subject_mapping.json and CMMLU's src/categories.py. The two agree on their common subjects. CMMLU's fifth
group, "China specific", overlaps the other four and is left out.

Called by ../eval_ceval.py. Read next: exam_table.py (one file), exam_prompts.py (the prompts).
"""

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
from evaluation.exam_table import (
    MAX_EXAM_FILE_BYTES,
    OPTION_LETTERS,
    ExamRow,
    decode_exam_text,
    parse_answers,
    parse_exam_rows,
)

CEVAL_LETTERS = "ABCD"  # of C-Eval and CMMLU; own files have two to ten options
SPLITS = ("dev", "val", "test")
UNSPLIT = "all"  # the split of files outside of dev, val and test
DEFAULT_SPLITS = ("val", UNSPLIT, "test", "dev")  # the first one present is used
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
COMPRESSED_MAGIC = (b"\x1f\x8b", b"\xfd7zXZ", b"BZh")  # of .gz, .xz and .bz2
EXPECTED_INPUT = (
    "expected a .csv, .tsv or .jsonl file of questions, a folder of them, or a tar or zip archive with val/*.csv or "
    "test/*.csv (C-Eval, CMMLU)"
)
CATEGORY_SUBJECTS = {  # category: subjects
    "STEM": """
        computer_network operating_system computer_architecture college_programming college_physics college_chemistry
        advanced_mathematics probability_and_statistics discrete_mathematics electrical_engineer metrology_engineer
        high_school_mathematics high_school_physics high_school_chemistry high_school_biology middle_school_mathematics
        middle_school_biology middle_school_physics middle_school_chemistry veterinary_medicine
        anatomy astronomy college_actuarial_science college_engineering_hydrology college_mathematics
        college_medical_statistics computer_science conceptual_physics electrical_engineering elementary_mathematics
        genetics machine_learning virology
    """,
    "Social Science": """
        college_economics business_administration marxism mao_zedong_thought education_science teacher_qualification
        high_school_politics high_school_geography middle_school_politics middle_school_geography
        ancient_chinese business_ethics chinese_civil_service_exam chinese_food_culture chinese_foreign_policy
        chinese_teacher_qualification college_education economics education elementary_chinese ethnology journalism
        management marketing modern_chinese professional_accounting professional_psychology public_relations
        security_study sociology
    """,
    "Humanities": """
        modern_chinese_history ideological_and_moral_cultivation logic law chinese_language_and_literature art_studies
        professional_tour_guide legal_professional high_school_chinese high_school_history middle_school_history
        arts chinese_history chinese_literature college_law global_facts international_law jurisprudence logical
        marxist_theory philosophy professional_law world_history world_religions
    """,
    "Other": """
        civil_servant sports_science plant_protection basic_medicine clinical_medicine urban_and_rural_planner
        accountant fire_engineer environmental_impact_assessment_engineer tax_accountant physician
        agronomy chinese_driving_rule clinical_knowledge college_medicine computer_security
        construction_project_management elementary_commonsense elementary_information_and_technology food_science
        human_sexuality legal_and_moral_basis nutrition professional_medicine traditional_chinese_medicine
    """,
}
_SUBJECT_CATEGORY = {subject: category for category, names in CATEGORY_SUBJECTS.items() for subject in names.split()}

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
    files_by_split: dict[str, dict[str, tuple[str, bytes]]] = {}  # split -> subject -> (where, content)
    mapping: dict[str, str] = {}
    for files in _file_groups([Path(path) for path in paths]):
        for where, inner, data in files:
            mapping |= _parse_subject_mapping(where, data) if _is_subject_mapping(inner) else {}
        for file_split, subject, where, data in _assign_splits(
            [file for file in files if not _is_subject_mapping(file[1])]
        ):
            subject = escape_controls(subject)  # file names may contain control characters
            if subject in files_by_split.setdefault(file_split, {}):
                raise UserError(
                    f"{name} holds {subject} twice, {files_by_split[file_split][subject][0]} and {where}: name one exam"
                )
            files_by_split[file_split][subject] = (where, data)
    available = [known for known in DEFAULT_SPLITS if known in files_by_split]
    if not available:
        raise UserError(f"{name} holds no exam: {EXPECTED_INPUT}")
    if not split and UNSPLIT in available and len(available) > 1 + ("dev" in available):
        raise UserError(f"{name} has the splits {', '.join(available)}: choose one with --split")
    split = split or available[0]
    if split not in files_by_split:
        raise UserError(f"{name} has no split {split!r}: choose one of {', '.join(available)} with --split")
    selected = list(subjects) or sorted(files_by_split[split])
    for subject in selected:
        if subject not in files_by_split[split]:
            raise UserError(
                f"{name} has no subject {subject!r} in {split}; choose from {', '.join(sorted(files_by_split[split]))}"
            )
    items = [item for subject in selected for item in _parse_subject(subject, files_by_split[split])]
    dev = files_by_split.get("dev", {})
    examples = {subject: _parse_subject(subject, dev, needs_answer=True) for subject in selected if subject in dev}
    return ExamSplit(split, items, examples, {s: mapping.get(s) or subject_category(s) for s in selected})


def _parse_subject(subject: str, files: dict[str, tuple[str, bytes]], needs_answer: bool = False) -> list[ExamItem]:
    where, data = files[subject]
    return parse_exam_items(subject, where, decode_exam_text(where, data), needs_answer)


def parse_exam_items(subject: str, where: str, text: str, needs_answer: bool = False) -> list[ExamItem]:
    """The questions of one file's text. `where` is the file name, which ends in .jsonl for jsonl.

    Either all questions have answers or none has (C-Eval's `test`). Raises UserError with file and line.
    """
    rows = parse_exam_rows(where, text, needs_answer)
    if not rows:
        raise UserError(f"{where}: no questions")
    options = [_parse_options(row, f"{where}:{row.line}") for row in rows]
    numbers: set[str] = set()
    items: list[ExamItem] = []
    for row, options_of_row, answer in zip(rows, options, parse_answers(where, rows, options), strict=True):
        location = f"{where}:{row.line}"
        if row.number in numbers:
            raise UserError(f"{location}: the number {row.number} occurs twice")
        numbers.add(row.number)
        items.append(ExamItem(subject, row.number, row.question, options_of_row, answer, location))
    secret = [item for item in items if not item.answer]
    if secret and (needs_answer or len(secret) < len(items)):
        letters = OPTION_LETTERS[: len(secret[0].options)]
        raise UserError(
            f"{secret[0].location}: the answer is empty: expected {', '.join(letters[:-1])} or {letters[-1]}"
        )
    return items


def _parse_options(row: ExamRow, where: str) -> tuple[str, ...]:
    """The options of a row without trailing empty ones. Raises UserError for an empty question or option."""
    if not row.question:
        raise UserError(f"{where}: question is empty")
    options = list(row.options)
    while len(options) > 2 and not options[-1]:
        options.pop()
    for letter, option in zip(OPTION_LETTERS, options, strict=False):
        if not option:
            raise UserError(f"{where}: {letter} is empty")
    return tuple(options)


def _parse_subject_mapping(where: str, data: bytes) -> dict[str, str]:
    """C-Eval's subject_mapping.json: {subject: [English name, Chinese name, category]}."""
    try:
        content = json.loads(decode_exam_text(where, data))
        return {subject: str(names[2]) for subject, names in content.items()}
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
        raise UserError(f"{where}: expected {{subject: [English, Chinese, category]}}") from None


def subject_category(subject: str) -> str:
    """STEM, Social Science, Humanities or Other; Other for an unknown subject."""
    return _SUBJECT_CATEGORY.get(subject, "Other")


def _is_subject_mapping(inner: str) -> bool:
    return PurePosixPath(inner).name == "subject_mapping.json"


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
    in_split = [file for file in files if PurePosixPath(file[1]).parent.name in SPLITS]
    if in_split:
        return [(*_locate(inner, PurePosixPath(inner).parent.name), where, data) for where, inner, data in in_split]
    name_splits = [_split_from_name(inner) for _, inner, _ in files]
    splits = name_splits if all(name_splits) else [UNSPLIT] * len(files)
    return [(*_locate(inner, split), where, data) for split, (where, inner, data) in zip(splits, files, strict=True)]


def _split_from_name(inner: str) -> str:
    """val of law_val.csv."""
    return next((split for split in SPLITS if PurePosixPath(inner).stem.endswith(f"_{split}")), "")


def _locate(inner: str, split: str) -> tuple[str, str]:
    """(split, subject) of a file."""
    return split, PurePosixPath(inner).stem.removesuffix(f"_{split}")


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


def _read_file(file: Path) -> bytes:
    try:
        if file.stat().st_size > MAX_EXAM_FILE_BYTES:
            raise UserError(f"{file}: larger than {MAX_EXAM_FILE_BYTES >> 20} MB, not an exam file: remove it")
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


def _is_exam_file(name: str) -> bool:
    """A table or the mapping. Skips `._x.csv`, macOS metadata of x.csv."""
    return (name.lower().endswith(TABLE_SUFFIXES) and not name.startswith("._")) or name == "subject_mapping.json"


def _read_tar(path: Path) -> Iterator[tuple[str, str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and _is_exam_file(PurePosixPath(member.name).name):
                _check_size(path, member.name, member.size)
                file = archive.extractfile(member)
                assert file is not None  # a regular file
                yield f"{path}/{member.name}", member.name, file.read()


def _read_zip(path: Path) -> Iterator[tuple[str, str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.is_dir() and _is_exam_file(PurePosixPath(member.filename).name):
                _check_size(path, member.filename, member.file_size)
                yield f"{path}/{member.filename}", member.filename, archive.read(member)


def _check_size(path: Path, name: str, size: int) -> None:
    if size > MAX_EXAM_FILE_BYTES:
        raise UserError(f"{path}/{name}: larger than {MAX_EXAM_FILE_BYTES >> 20} MB, not an exam file: remove it")
