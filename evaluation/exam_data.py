"""Multiple-choice exams: C-Eval's and CMMLU's layouts and your own csv or jsonl files, plain or in an archive.

    C-Eval    {dev,val,test}/<subject>_<split>.csv    id, question, A, B, C, D, answer (none in test), explanation (dev)
    CMMLU     {dev,test}/<subject>.csv                (number), Question, A, B, C, D, Answer
    own       <subject>.csv or .jsonl                 one file is one subject; columns as exam_table.py finds them

Folders above `dev` may have any name. Archives (tar, .gz .xz .bz2 of it, zip) are read as they are, nothing is unpacked
to the disk. A folder or archive with dev, val or test folders is read from those alone. Own files outside of such
folders are the split `all`, or, where each of their names ends in _dev, _val or _test, the split that it names. An exam
is either read whole or not at all: a question left out in silence would change the score. A file that cannot be read
to the last line is an error with its line number.
Layouts: github.com/hkust-nlp/ceval and github.com/haonan-li/CMMLU.

The category of a subject is that of the exam's own subject_mapping.json, else that of SUBJECTS, which are facts from
the exams themselves: C-Eval's subject_mapping.json and CMMLU's src/categories.py. The subjects that both exams have are
in the same category in both. CMMLU's fifth group, "China specific", runs across the others and is left out.

Called by ../eval_ceval.py. Read next: exam_table.py (one file), exam_prompts.py (how questions are asked).
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

from common.errors import UserError, printable
from evaluation.exam_table import LARGEST, OPTION_LETTERS, Row, decode, letters_of, read_rows

LETTERS = "ABCD"  # of C-Eval and CMMLU; own files have two to ten options
SPLITS = ("dev", "val", "test")
OWN = "all"  # the split of files that name none
DEFAULTS = ("val", OWN, "test", "dev")  # the first one present is used
TABLES = (".csv", ".tsv", ".jsonl")
PACKED = (b"\x1f\x8b", b"\xfd7zXZ", b"BZh")  # how .gz, .xz and .bz2 begin
EXPECTED = (
    "expected a .csv, .tsv or .jsonl file of questions, a folder of them, or a tar or zip archive with val/*.csv or "
    "test/*.csv (C-Eval, CMMLU)"
)
SUBJECTS = {  # category: subjects
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
_CATEGORY = {subject: category for category, names in SUBJECTS.items() for subject in names.split()}

Named = tuple[str, str, bytes]  # (name for messages, path inside the folder or archive, content)


@dataclass(frozen=True)
class Item:
    """One question of an exam. `answer` is a letter, or "" where the file keeps it secret."""

    subject: str
    number: str  # as the file numbers it; what a submission is keyed by
    question: str
    options: tuple[str, ...]
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


def read_exam(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], split: str = "", subjects: Iterable[str] = ()
) -> Exam:
    """Read one split (default: the first of val, all, test, dev that is there) and dev; `subjects`: only these.

    `paths`: one folder, archive or file, or several. Raises UserError naming file and line where anything is missing,
    damaged or not an exam.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    name = ", ".join(map(str, paths))
    found: dict[str, dict[str, tuple[str, bytes]]] = {}  # split -> subject -> (where, content)
    mapping: dict[str, str] = {}
    for files in _groups([Path(path) for path in paths]):
        for where, inside, data in files:
            mapping |= _mapping(where, data) if _is_mapping(inside) else {}
        for of_split, subject, where, data in _placed([file for file in files if not _is_mapping(file[1])]):
            subject = printable(subject)  # it comes from a file name
            if subject in found.setdefault(of_split, {}):
                raise UserError(
                    f"{name} holds {subject} twice, {found[of_split][subject][0]} and {where}: name one exam"
                )
            found[of_split][subject] = (where, data)
    there = [one for one in DEFAULTS if one in found]
    if not there:
        raise UserError(f"{name} holds no exam: {EXPECTED}")
    if not split and OWN in there and len(there) > 1 + ("dev" in there):
        raise UserError(f"{name} has the splits {', '.join(there)}: choose one with --split")
    split = split or there[0]
    if split not in found:
        raise UserError(f"{name} has no split {split!r}: choose one of {', '.join(there)} with --split")
    wanted = list(subjects) or sorted(found[split])
    for subject in wanted:
        if subject not in found[split]:
            raise UserError(
                f"{name} has no subject {subject!r} in {split}; there are {', '.join(sorted(found[split]))}"
            )
    items = [item for subject in wanted for item in _items(subject, found[split])]
    dev = found.get("dev", {})
    examples = {subject: _items(subject, dev, needs_answer=True) for subject in wanted if subject in dev}
    return Exam(split, items, examples, {s: mapping.get(s) or category_of(s) for s in wanted})


def _items(subject: str, of_split: dict[str, tuple[str, bytes]], needs_answer: bool = False) -> list[Item]:
    where, data = of_split[subject]
    return read_items(subject, where, decode(where, data), needs_answer)


def read_items(subject: str, where: str, text: str, needs_answer: bool = False) -> list[Item]:
    """The questions of one file's text, or UserError. `where` is its name, which ends in .jsonl for jsonl.

    Answers may be missing altogether (C-Eval keeps those of `test` secret), but not here and there.
    """
    rows = read_rows(where, text, needs_answer)
    if not rows:
        raise UserError(f"{where}: no questions")
    options = [_options(row, f"{where}:{row.line}") for row in rows]
    numbers: set[str] = set()
    items: list[Item] = []
    for row, shown, answer in zip(rows, options, letters_of(where, rows, options), strict=True):
        here = f"{where}:{row.line}"
        if row.number in numbers:
            raise UserError(f"{here}: the number {row.number} occurs twice")
        numbers.add(row.number)
        items.append(Item(subject, row.number, row.question, shown, answer, here))
    secret = [item for item in items if not item.answer]
    if secret and (needs_answer or len(secret) < len(items)):
        letters = OPTION_LETTERS[: len(secret[0].options)]
        raise UserError(f"{secret[0].where}: the answer is empty: expected {', '.join(letters[:-1])} or {letters[-1]}")
    return items


def _options(row: Row, where: str) -> tuple[str, ...]:
    """The options of a row without empty ones at its end. Raises UserError where a part is empty."""
    if not row.question:
        raise UserError(f"{where}: question is empty")
    options = list(row.options)
    while len(options) > 2 and not options[-1]:
        options.pop()
    for letter, option in zip(OPTION_LETTERS, options, strict=False):
        if not option:
            raise UserError(f"{where}: {letter} is empty")
    return tuple(options)


def _mapping(where: str, data: bytes) -> dict[str, str]:
    """C-Eval's subject_mapping.json: {subject: [English name, Chinese name, category]}."""
    try:
        content = json.loads(decode(where, data))
        return {subject: str(names[2]) for subject, names in content.items()}
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
        raise UserError(f"{where}: expected {{subject: [English, Chinese, category]}}") from None


def category_of(subject: str) -> str:
    """STEM, Social Science, Humanities or Other; Other for a subject that neither exam has."""
    return _CATEGORY.get(subject, "Other")


def _is_mapping(inside: str) -> bool:
    return PurePosixPath(inside).name == "subject_mapping.json"


# ---- which file is which split ---------------------------------------------------------------------------------------
def _groups(paths: list[Path]) -> Iterator[list[Named]]:
    """The files of each folder or archive, and together those that are named one by one."""
    single: list[Named] = []
    for path in paths:
        if path.suffix.lower() in TABLES and path.is_file():
            single += files_of(path)
        else:
            yield list(files_of(path))
    if single:
        yield single


def _placed(files: list[Named]) -> list[tuple[str, str, str, bytes]]:
    """(split, subject, name for messages, content) of the tables of one --data."""
    in_splits = [file for file in files if PurePosixPath(file[1]).parent.name in SPLITS]
    if in_splits:
        return [(*_place(inside, PurePosixPath(inside).parent.name), where, data) for where, inside, data in in_splits]
    named = [_named_split(inside) for _, inside, _ in files]
    splits = named if all(named) else [OWN] * len(files)
    return [(*_place(inside, split), where, data) for split, (where, inside, data) in zip(splits, files, strict=True)]


def _named_split(inside: str) -> str:
    """val of law_val.csv."""
    return next((split for split in SPLITS if PurePosixPath(inside).stem.endswith(f"_{split}")), "")


def _place(inside: str, split: str) -> tuple[str, str]:
    """(split, subject) of a file."""
    return split, PurePosixPath(inside).stem.removesuffix(f"_{split}")


# ---- files -----------------------------------------------------------------------------------------------------------
def files_of(path: Path) -> Iterator[Named]:
    """(name for messages, path inside, content) of every table and the mapping in a folder or archive, or of the one
    file. Raises UserError."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if _is_wanted(file.name) and file.is_file():
                yield str(file), (path.absolute() / file.relative_to(path)).as_posix(), _content(file)
        return
    if not path.exists():
        raise UserError(f"{path}: no such file or folder: give the exam's folder, file or archive with --data")
    if path.suffix.lower() in TABLES:
        yield str(path), path.absolute().as_posix(), _content(path)
        return
    is_zip = zipfile.is_zipfile(path)
    try:
        with path.open("rb") as opened:
            is_tar = opened.read(6).startswith(PACKED) or tarfile.is_tarfile(path)
        if not (is_zip or is_tar) or path.suffix.lower() == ".xlsx":
            raise UserError(f"{path} is no exam: {EXPECTED}")
        yield from _zipped(path) if is_zip else _tarred(path)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0].rstrip(":")
        raise UserError(f"cannot read {path} as a tar or zip archive ({reason[:80]}): damaged, or {EXPECTED}") from None
    except (RuntimeError, NotImplementedError) as error:  # zip: a password, an unknown method
        raise UserError(f"cannot read {path}: {error}: unpack it and give the folder") from None


def _content(file: Path) -> bytes:
    try:
        if file.stat().st_size > LARGEST:
            raise UserError(f"{file}: larger than {LARGEST >> 20} MB: not an exam file: leave it out")
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


def _is_wanted(name: str) -> bool:
    """A table or the mapping. `._x.csv` holds the metadata that macOS keeps beside x.csv."""
    return (name.lower().endswith(TABLES) and not name.startswith("._")) or name == "subject_mapping.json"


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
        raise UserError(f"{path}/{name}: larger than {LARGEST >> 20} MB: not an exam file: leave it out")
