"""Documents that hold exam questions are found and left out: the step behind `data_process.py decontaminate`.

    n-gram    13 letters and digits of a Chinese question, 50 of an English one (about 13 words, without the spaces);
              a short question of formulas is Chinese if a word of it is
    leak      the n-grams that document and question share cover half of the question (--overlap 0.5)

Thirteen words are what GPT-3 took (Brown et al. 2020, arXiv 2005.14165, appendix C). There one n-gram was enough
(--overlap 0), save for those in many places, which are phrases. Measured on laws and textbooks: names of authorities
and formulas of thirteen characters take ten times as many documents as questions do, so by default half of the
question has to be there, much as Llama 2 judges by the share of the sample (Touvron et al. 2023, arXiv 2307.09288,
A.6). An n-gram of three or more questions ("which of the following is right") is a phrase as well. A question
shorter than an n-gram, or made of phrases, is continued by its choices, as it would be in a leak; what is too short
even so is counted, and said.

Exams are folders or files in any format that ../corpus/readers.py reads, with a row for each question: C-Eval's and
CMMLU's csv files (question, A, B, C, D; also as one tar or zip), chats (the first message of the user), or plain text
(a question a block).

Read next: ngrams.py (the hashes), transform.py (how rows come and go).
"""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from corpus.job_state import input_fingerprints
from corpus.language import count_chinese, detect_language
from corpus.readers import read_rows
from corpus.row_text import DEFAULT_READER, RowReader
from corpus.stats import BadRow, DataStats
from curation.ngrams import alphanumeric, code_points, ngram_hashes
from curation.rule_stats import Decision, RuleHit, compute_sample_key
from curation.transform import NumberedRow, to_json_line
from evaluation.exam_data import read_exam_files

NGRAM_LENGTH = {"zh": 13, "en": 50}
COMMON_NGRAM_MIN_QUESTIONS = 3  # an n-gram in this many questions is a phrase
EXAM_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tar.xz", ".tar.bz2", ".tgz", ".txz", ".tbz2", ".zip")
QUESTION_KEYS = ("question", "题目", "problem", "query", "prompt", "instruction", "q")
CHOICE_KEYS = ("a", "b", "c", "d", "e", "f")
_BLOOM_MASK = np.uint64(2**22 - 1)


class NgramIndex(NamedTuple):
    """The n-grams of the questions of one language, sorted by hash; an n-gram of two questions is in it twice."""

    hashes: np.ndarray  # uint64
    question_ids: np.ndarray  # number of the question
    positions: np.ndarray  # where it begins in the letters of the question
    bloom: np.ndarray  # a bit for the low bits of each hash: most n-grams of a text are out by this look


@dataclass
class ExamIndex:
    """All questions and their n-grams."""

    names: list[str]
    files: list[str]
    questions: list[tuple[str, str]] = field(default_factory=list)  # (file:line, text)
    covered_lengths: list[int] = field(default_factory=list)  # characters of each that its n-grams cover
    too_short: int = 0
    ngram_indexes: dict[str, NgramIndex] = field(default_factory=dict)

    def find_leak(self, text: str, overlap: float) -> tuple[int, str, float]:
        """(question, the first n-gram shared, share of the question) of the most complete leak, or (-1, "", 0)."""
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
            for question_id, characters in covered_characters.items():
                fraction = len(characters) / self.covered_lengths[question_id]
                if fraction >= overlap and fraction > best_leak[2]:
                    best_leak = (
                        question_id,
                        letters[first_position[question_id] : first_position[question_id] + NGRAM_LENGTH[language]],
                        fraction,
                    )
        return best_leak


def build_exam_index(paths: list[str]) -> ExamIndex:
    """All questions of these files and folders. Raises UserError when there is none to look for."""
    files = find_exam_files(paths)
    exam = ExamIndex([Path(path).resolve().name for path in paths], files)
    report = DataStats(max_bad_share=1.0)
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
                language = "zh"  # short and full of formulas
            ngrams = ngram_hashes(
                code_points(question_with_choices[: len(start) + NGRAM_LENGTH[language] - 1]), NGRAM_LENGTH[language]
            )
            if not len(ngrams):
                exam.too_short += 1
                continue
            num_inner = max(0, len(start) - NGRAM_LENGTH[language] + 1)
            ngrams_by_language[language].append(_QuestionNgrams(ngrams, num_inner, len(exam.questions)))
            exam.questions.append((where, question))
            exam.covered_lengths.append(0)
    if not exam.questions:
        raise UserError(
            f"--against {' '.join(paths)}: no question found in {len(files)} files: a row needs one of the keys "
            f"{', '.join(QUESTION_KEYS)}, and a question at least {NGRAM_LENGTH['zh']} characters with its choices"
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
    hashes: np.ndarray  # of the n-grams that begin in a question, in their order
    num_inner: int  # so many of them end in it, too
    question_id: int


def _build_ngram_index(exam: ExamIndex, language: str, lists: list[_QuestionNgrams]) -> NgramIndex:
    """Of each question the n-grams inside it that are no phrases; else those that go on into its choices."""
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


def find_exam_files(paths: list[str]) -> list[str]:
    """The files themselves, and those of every folder, at any depth. Raises UserError for a path without any."""
    found: list[str] = []
    for path in paths:
        location = Path(path)
        if not location.exists():
            raise UserError(f"--against {path}: no such file or folder")
        members = (
            sorted(p for p in location.rglob("*") if p.is_file() and _is_exam_file(p))
            if location.is_dir()
            else [location]
        )
        if not members:
            raise UserError(f"--against {path}: no {', '.join(EXAM_SUFFIXES)} file in it")
        found += [str(file) for file in members]
    return found


def _is_exam_file(path: Path) -> bool:
    name = re.sub(r"\.(gz|xz|zst|bz2)$", "", path.name.lower())
    return name.endswith(EXAM_SUFFIXES) and not name.startswith(("readme", "licen", "."))


def question_and_choices(row: Any) -> tuple[str, str]:
    """(question, its choices as they would stand behind it); empty when the row has none."""
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


@dataclass
class DecontaminationTransform:
    """The step: a row that shares an n-gram with a question is left out."""

    exam: ExamIndex
    overlap: float = 0.5
    reader: RowReader = DEFAULT_READER
    name: str = "decontaminate"

    def rule_names(self) -> list[str]:
        return ["exam question"]

    def fingerprint_fields(self) -> dict[str, Any]:
        return {"against": input_fingerprints(list(self.exam.files)), "ngram": NGRAM_LENGTH, "overlap": self.overlap}

    def provenance(self) -> dict[str, Any]:
        fields = {"against": self.exam.names, "questions": len(self.exam.questions)}
        return {
            **fields,
            "ngram": f"{NGRAM_LENGTH['zh']}-grams of characters, {NGRAM_LENGTH['en']} in English",
            "overlap": self.overlap,
        }

    def skip_row(self, row: NumberedRow) -> None:
        pass

    def apply(self, rows: list[NumberedRow]) -> list[Decision]:
        return [self._apply_to_row(row) for row in rows]

    def _apply_to_row(self, row: NumberedRow) -> Decision:
        language, characters = detect_language(row.text), len(row.text)
        question_id, shared_ngram, fraction = self.exam.find_leak(row.text, self.overlap)
        if question_id < 0:
            return Decision(to_json_line(row.raw), language, characters)
        location, question = self.exam.questions[question_id]
        sample_key = compute_sample_key("exam question", row.text)
        example = f"question: {question[:200]}\nshared:   {shared_ngram}\nthis:     {row.text[:200]}"
        hit = RuleHit("exam question", characters, f"{fraction:.0%} of {location}: {shared_ngram}", example, sample_key)
        return Decision(None, language, characters, [hit])
