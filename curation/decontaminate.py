"""Drops documents that contain exam questions: the transform of `data_process.py decontaminate`.

    n-gram    13 letters and digits of a Chinese question, 50 of an English one (about 13 words without spaces);
              a short question of formulas counts as Chinese if it contains a Chinese character
    leak      the n-grams that document and question have in common cover half of the question (--overlap 0.5)

GPT-3 uses n-grams of 13 words (Brown et al. 2020, arXiv 2005.14165, appendix C); one common n-gram is a leak
(--overlap 0), except for n-grams that occur in many documents. On laws and textbooks that criterion drops ten times as
many documents for names of authorities and formulas of 13 characters as for questions. The default therefore requires
half of the question, similar to Llama 2, which uses the fraction of contaminated tokens (Touvron et al. 2023, arXiv
2307.09288, A.6). N-grams of three or more questions ("which of the following is right") are ignored. A question that is
shorter than an n-gram, or has only such n-grams, is extended by its choices. Questions that are still too short are
counted and reported.

Exams are folders or files in any format of ../corpus/readers.py with one question per row: csv files of C-Eval and
CMMLU (question, A, B, C, D; also inside a tar or zip), chats (the first user message), or plain text (one question per
paragraph).

Read next: ngrams.py (the hashes), transform.py (reading and writing rows).
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.cli import flag
from common.errors import UserError
from common.flag_types import fraction, path_string
from corpus.job_state import input_fingerprints
from corpus.language import count_chinese, detect_language
from corpus.readers import read_rows
from corpus.row_text import DEFAULT_READER, RowReader
from corpus.stats import BadRow, DataStats
from curation.ngrams import alphanumeric, code_points, ngram_hashes
from curation.rule_stats import Decision, RuleHit, compute_sample_key
from curation.transform import CurationConfig, NumberedRow, Transform, to_json_line
from evaluation.exam_data import read_exam_files

NGRAM_LENGTH = {"zh": 13, "en": 50}
COMMON_NGRAM_MIN_QUESTIONS = 3  # an n-gram of this many questions is ignored
EXAM_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tar.xz", ".tar.bz2", ".tgz", ".txz", ".tbz2", ".zip")
QUESTION_KEYS = ("question", "题目", "problem", "query", "prompt", "instruction", "q")
CHOICE_KEYS = ("a", "b", "c", "d", "e", "f")
_BLOOM_MASK = np.uint64(2**22 - 1)


@dataclass(frozen=True, kw_only=True)
class DecontaminateConfig(CurationConfig):
    """drop documents that contain questions of an exam"""

    out_dir: str = "dataset/decontaminate"
    against: tuple[str, ...] = flag(MISSING, "folders, archives or files with exam questions",
                                    nargs="+", type=path_string, metavar="EXAM")  # fmt: skip
    overlap: float = flag(0.5, "fraction of a question in a dropped row; 0: one n-gram", type=fraction)


class NgramIndex(NamedTuple):
    """The n-grams of the questions of one language, sorted by hash; an n-gram of two questions has two entries."""

    hashes: np.ndarray  # (n-grams,), uint64
    question_ids: np.ndarray  # (n-grams,), index into ExamIndex.questions
    positions: np.ndarray  # (n-grams,), start of the n-gram in the alphanumeric text of the question
    bloom: np.ndarray  # (2^22,), bool, indexed by the low bits of a hash: rejects most n-grams without a search


@dataclass
class ExamIndex:
    """All exam questions and the index of their n-grams."""

    names: list[str]
    files: list[str]
    questions: list[tuple[str, str]] = field(default_factory=list)  # (file:line, text)
    covered_lengths: list[int] = field(default_factory=list)  # per question: characters that its n-grams cover
    too_short: int = 0
    ngram_indexes: dict[str, NgramIndex] = field(default_factory=dict)

    def find_leak(self, text: str, overlap: float) -> tuple[int, str, float]:
        """(question index, first common n-gram, fraction of the question) of the largest leak, or (-1, "", 0)."""
        letters = alphanumeric(text)
        codes = code_points(letters)
        best_leak = (-1, "", 0.0)
        for language, index in self.ngram_indexes.items():
            found = ngram_hashes(codes, NGRAM_LENGTH[language])
            positions = np.flatnonzero(index.bloom[found & _BLOOM_MASK])
            if not len(positions):
                continue
            first = np.searchsorted(index.hashes, found[positions], side="left")
            last = np.searchsorted(index.hashes, found[positions], side="right")
            matches = [(i, int(positions[k])) for k in np.flatnonzero(last > first) for i in range(first[k], last[k])]
            covered_characters: dict[int, set[int]] = {}
            first_position: dict[int, int] = {}
            for i, position in matches:
                question_id, start = int(index.question_ids[i]), int(index.positions[i])
                covered_characters.setdefault(question_id, set()).update(range(start, start + NGRAM_LENGTH[language]))
                first_position.setdefault(question_id, position)
            for question_id, covered in covered_characters.items():
                share = len(covered) / self.covered_lengths[question_id]
                if share >= overlap and share > best_leak[2]:
                    start = first_position[question_id]
                    best_leak = (question_id, letters[start : start + NGRAM_LENGTH[language]], share)
        return best_leak


def build_exam_index(paths: Sequence[str]) -> ExamIndex:
    """Index the questions of these files and folders. Raises UserError if they contain no question."""
    files = find_exam_files(paths)
    exam = ExamIndex([Path(path).resolve().name for path in paths], files)
    report = DataStats(max_bad_fraction=1.0)
    ngrams_by_language: dict[str, list[_QuestionNgrams]] = {language: [] for language in NGRAM_LENGTH}
    seen: set[str] = set()
    for file in files:
        for where, row in _exam_rows(file, report):
            question, choices = question_and_choices(row)
            start, question_with_choices = alphanumeric(question), alphanumeric(question + choices)
            if not start or question_with_choices in seen:  # the same question in another split
                continue
            seen.add(question_with_choices)
            language = detect_language(question)
            if len(start) < NGRAM_LENGTH[language] and count_chinese(question):
                language = "zh"  # a short question that is mostly formulas
            n = NGRAM_LENGTH[language]
            ngrams = ngram_hashes(code_points(question_with_choices[: len(start) + n - 1]), n)
            if not len(ngrams):
                exam.too_short += 1
                continue
            num_inner = max(0, len(start) - n + 1)
            ngrams_by_language[language].append(_QuestionNgrams(ngrams, num_inner, len(exam.questions)))
            exam.questions.append((where, question))
            exam.covered_lengths.append(0)
    if not exam.questions:
        raise UserError(
            f"--against {' '.join(paths)}: no question found in {len(files)} files: a row needs one of the keys "
            f"{', '.join(QUESTION_KEYS)}, and question plus choices at least {NGRAM_LENGTH['zh']} characters"
        )
    for language, lists in ngrams_by_language.items():
        if lists:
            exam.ngram_indexes[language] = _build_ngram_index(exam, language, lists)
    return exam


def _exam_rows(file: str, report: DataStats) -> Iterator[tuple[str, Any]]:
    """(file:line, row) of a file, or of every csv file in an archive."""
    if not file.lower().endswith(ARCHIVE_SUFFIXES):
        yield from ((f"{file}:{line}", row) for line, row in read_rows(file, report))
        return
    for where, member, data in read_exam_files(Path(file)):
        if member.lower().endswith(".csv"):
            rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig", "replace").replace("\0", ""), newline=""))
            yield from ((f"{where}:{rows.line_num}", row) for row in rows)


class _QuestionNgrams(NamedTuple):
    hashes: np.ndarray  # of the n-grams that begin in the question, in order
    num_inner: int  # number of n-grams that also end in the question; the others extend into its choices
    question_id: int


def _build_ngram_index(exam: ExamIndex, language: str, lists: list[_QuestionNgrams]) -> NgramIndex:
    """Index the rare n-grams inside each question; if it has none, those that extend into its choices, or all."""
    n = NGRAM_LENGTH[language]
    unique, counts = np.unique(np.concatenate([np.unique(ngrams) for ngrams, *_ in lists]), return_counts=True)
    common_ngrams = unique[counts >= COMMON_NGRAM_MIN_QUESTIONS]
    hashes, question_ids, positions = [], [], []
    for ngrams, num_inner, question_id in lists:
        rare = np.flatnonzero(~np.isin(ngrams, common_ngrams))
        rare = rare[rare < num_inner] if (rare < num_inner).any() else rare
        rare = rare if len(rare) else np.arange(len(ngrams))
        exam.covered_lengths[question_id] = n + int(np.minimum(np.diff(rare), n).sum())
        hashes.append(ngrams[rare])
        question_ids.append(np.full(len(rare), question_id, np.int32))
        positions.append(rare.astype(np.int32))
    all_hashes = np.concatenate(hashes)
    order = np.argsort(all_hashes, kind="stable")
    bloom = np.zeros(int(_BLOOM_MASK) + 1, bool)
    bloom[all_hashes & _BLOOM_MASK] = True
    return NgramIndex(all_hashes[order], np.concatenate(question_ids)[order], np.concatenate(positions)[order], bloom)


def find_exam_files(paths: Sequence[str]) -> list[str]:
    """Files as given, folders expanded recursively. Raises UserError for a path without exam files."""
    found: list[str] = []
    for path in paths:
        location = Path(path)
        if not location.exists():
            raise UserError(f"--against {path}: no such file or folder")
        members = [location]
        if location.is_dir():
            members = sorted(p for p in location.rglob("*") if p.is_file() and _is_exam_file(p))
        if not members:
            raise UserError(f"--against {path}: no {', '.join(EXAM_SUFFIXES)} file in it")
        found += [str(file) for file in members]
    return found


def _is_exam_file(path: Path) -> bool:
    name = re.sub(r"\.(gz|xz|zst|bz2)$", "", path.name.lower())
    return name.endswith(EXAM_SUFFIXES) and not name.startswith(("readme", "licen", "."))


def question_and_choices(row: Any) -> tuple[str, str]:
    """(question, choices with their letters, one per line) of a row; empty strings if it has no question."""
    if isinstance(row, str):
        return row, ""
    row = {str(key).strip().lower(): value for key, value in row.items()}
    key = next((key for key in QUESTION_KEYS if isinstance(row.get(key), str) and row[key].strip()), None)
    if key is None:
        try:
            return next((m["content"] for m in DEFAULT_READER.read_chat(row).messages if m["role"] == "user"), ""), ""
        except BadRow:
            return str(row["text"]) if isinstance(row.get("text"), str) else "", ""
    choices = row.get("choices")
    texts = choices if isinstance(choices, list) else [row[key] for key in CHOICE_KEYS if key in row]
    return row[key], "".join(f"\n{name}. {text}" for name, text in zip("ABCDEF", texts, strict=False))


class DecontaminationTransform(Transform):
    """Drops rows that contain at least the fraction `overlap` of an exam question."""

    name = "decontaminate"

    def __init__(self, exam: ExamIndex, overlap: float = 0.5, reader: RowReader = DEFAULT_READER) -> None:
        self.exam, self.overlap, self.reader = exam, overlap, reader

    def rule_names(self) -> list[str]:
        return ["exam question"]

    def fingerprint_fields(self) -> dict[str, Any]:
        return {"against": input_fingerprints(list(self.exam.files)), "ngram": NGRAM_LENGTH, "overlap": self.overlap}

    def provenance(self) -> dict[str, Any]:
        ngram = f"{NGRAM_LENGTH['zh']}-grams of characters, {NGRAM_LENGTH['en']} in English"
        fields = {"against": self.exam.names, "questions": len(self.exam.questions)}
        return {**fields, "ngram": ngram, "overlap": self.overlap}

    def apply_to_row(self, row: NumberedRow) -> Decision:
        language, characters = detect_language(row.text), len(row.text)
        question_id, shared_ngram, fraction = self.exam.find_leak(row.text, self.overlap)
        if question_id < 0:
            return Decision(to_json_line(row.raw), language, characters)
        location, question = self.exam.questions[question_id]
        sample_key = compute_sample_key("exam question", row.text)
        example = f"question: {question[:200]}\nshared:   {shared_ngram}\nthis:     {row.text[:200]}"
        hit = RuleHit("exam question", characters, f"{fraction:.0%} of {location}: {shared_ngram}", example, sample_key)
        return Decision(None, language, characters, [hit])
