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
from corpus.job_state import inputs_of
from corpus.language import chinese_characters, language_of
from corpus.readers import read_rows
from corpus.row_text import READER, RowReader
from corpus.stats import BadRow, DataReport
from curation.ngrams import codes_of, ngram_hashes, skeleton
from curation.rule_stats import Mark, Verdict, rank_of
from curation.transform import Row, as_line
from evaluation.exam_data import files_of

NGRAM = {"zh": 13, "en": 50}
PHRASE = 3  # an n-gram in this many questions is a phrase
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
ARCHIVES = (".tar", ".tar.gz", ".tar.xz", ".tar.bz2", ".tgz", ".txz", ".tbz2", ".zip")
QUESTION_KEYS = ("question", "题目", "problem", "query", "prompt", "instruction", "q")
CHOICE_KEYS = ("a", "b", "c", "d", "e", "f")
_LOW = np.uint64(2**22 - 1)


class Index(NamedTuple):
    """The n-grams of the questions of one language, sorted by hash; an n-gram of two questions is in it twice."""

    hashes: np.ndarray  # uint64
    owners: np.ndarray  # number of the question
    places: np.ndarray  # where it begins in the skeleton of the question
    quick: np.ndarray  # a bit for the low bits of each hash: most n-grams of a text are out by this look


@dataclass
class Exam:
    """All questions and their n-grams."""

    names: list[str]
    files: list[str]
    questions: list[tuple[str, str]] = field(default_factory=list)  # (file:line, text)
    lengths: list[int] = field(default_factory=list)  # characters of each that its n-grams cover
    too_short: int = 0
    indexes: dict[str, Index] = field(default_factory=dict)

    def find(self, text: str, overlap: float) -> tuple[int, str, float]:
        """(question, the first n-gram shared, share of the question) of the most complete leak, or (-1, "", 0)."""
        letters = skeleton(text)
        codes = codes_of(letters)
        best = (-1, "", 0.0)
        for language, index in self.indexes.items():
            found = ngram_hashes(codes, NGRAM[language])
            places = np.flatnonzero(index.quick[found & _LOW])
            if not len(places):
                continue
            first = np.searchsorted(index.hashes, found[places], side="left")
            last = np.searchsorted(index.hashes, found[places], side="right")
            hits = [(i, int(places[k])) for k in np.flatnonzero(last > first) for i in range(first[k], last[k])]
            covered: dict[int, set[int]] = {}
            at: dict[int, int] = {}
            for i, place in hits:
                owner, start = int(index.owners[i]), int(index.places[i])
                covered.setdefault(owner, set()).update(range(start, start + NGRAM[language]))
                at.setdefault(owner, place)
            for owner, characters in covered.items():
                share = len(characters) / self.lengths[owner]
                if share >= overlap and share > best[2]:
                    best = owner, letters[at[owner] : at[owner] + NGRAM[language]], share
        return best


def read_exam(paths: list[str]) -> Exam:
    """All questions of these files and folders. Raises UserError when there is none to look for."""
    files = exam_files(paths)
    exam = Exam([Path(path).resolve().name for path in paths], files)
    report = DataReport(max_bad_share=1.0)
    collected: dict[str, list[_Grams]] = {language: [] for language in NGRAM}
    seen: set[str] = set()
    for file in files:
        for where, row in _rows(file, report):
            question, more = question_of(row)
            start, whole = skeleton(question), skeleton(question + more)
            if not start or whole in seen:  # the same question in another split
                continue
            seen.add(whole)
            language = language_of(question)
            if len(start) < NGRAM[language] and chinese_characters(question):
                language = "zh"  # short and full of formulas
            grams = ngram_hashes(codes_of(whole[: len(start) + NGRAM[language] - 1]), NGRAM[language])
            if not len(grams):
                exam.too_short += 1
                continue
            inner = max(0, len(start) - NGRAM[language] + 1)
            collected[language].append(_Grams(grams, inner, len(exam.questions)))
            exam.questions.append((where, question))
            exam.lengths.append(0)
    if not exam.questions:
        raise UserError(
            f"--against {' '.join(paths)}: no question found in {len(files)} files: a row needs one of the keys "
            f"{', '.join(QUESTION_KEYS)}, and a question at least {NGRAM['zh']} characters with its choices"
        )
    for language, lists in collected.items():
        if lists:
            exam.indexes[language] = _index(exam, language, lists)
    return exam


def _rows(file: str, report: DataReport) -> Iterator[tuple[str, Any]]:
    """(file:line, row) of a file, or of every csv file in an archive."""
    if not file.lower().endswith(ARCHIVES):
        yield from ((f"{file}:{line}", row) for line, row in read_rows(file, report))
        return
    for where, inside, data in files_of(Path(file)):
        if inside.lower().endswith(".csv"):
            rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig", "replace").replace("\0", ""), newline=""))
            yield from ((f"{where}:{rows.line_num}", row) for row in rows)


class _Grams(NamedTuple):
    hashes: np.ndarray  # of the n-grams that begin in a question, in their order
    inner: int  # so many of them end in it, too
    owner: int


def _index(exam: Exam, language: str, lists: list[_Grams]) -> Index:
    """Of each question the n-grams inside it that are no phrases; else those that go on into its choices."""
    n = NGRAM[language]
    unique, counts = np.unique(np.concatenate([np.unique(grams) for grams, *_ in lists]), return_counts=True)
    phrases = unique[counts >= PHRASE]
    hashes, owners, places = [], [], []
    for grams, inner, owner in lists:
        rare = np.flatnonzero(~np.isin(grams, phrases))
        rare = rare[rare < inner] if (rare < inner).any() else rare
        rare = rare if len(rare) else np.arange(len(grams))
        exam.lengths[owner] = n + int(np.minimum(np.diff(rare), n).sum())
        hashes.append(grams[rare])
        owners.append(np.full(len(rare), owner, np.int32))
        places.append(rare.astype(np.int32))
    together = np.concatenate(hashes)
    order = np.argsort(together, kind="stable")
    quick = np.zeros(int(_LOW) + 1, bool)
    quick[together & _LOW] = True
    return Index(together[order], np.concatenate(owners)[order], np.concatenate(places)[order], quick)


def exam_files(paths: list[str]) -> list[str]:
    """The files themselves, and those of every folder, at any depth. Raises UserError for a path without any."""
    found: list[str] = []
    for path in paths:
        place = Path(path)
        if not place.exists():
            raise UserError(f"--against {path}: no such file or folder")
        inside = sorted(p for p in place.rglob("*") if p.is_file() and _is_exam(p)) if place.is_dir() else [place]
        if not inside:
            raise UserError(f"--against {path}: no {', '.join(SUFFIXES)} file in it")
        found += [str(file) for file in inside]
    return found


def _is_exam(path: Path) -> bool:
    name = re.sub(r"\.(gz|xz|zst|bz2)$", "", path.name.lower())
    return name.endswith(SUFFIXES) and not name.startswith(("readme", "licen", "."))


def question_of(row: Any) -> tuple[str, str]:
    """(question, its choices as they would stand behind it); empty when the row has none."""
    if isinstance(row, str):
        return row, ""
    row = {str(key).strip().lower(): value for key, value in row.items()}
    key = next((key for key in QUESTION_KEYS if isinstance(row.get(key), str) and row[key].strip()), None)
    if key is None:
        try:
            return next((m["content"] for m in READER.chat(row).messages if m["role"] == "user"), ""), ""
        except BadRow:
            return str(row["text"]) if isinstance(row.get("text"), str) else "", ""
    choices = row.get("choices")
    texts = choices if isinstance(choices, list) else [row[key] for key in CHOICE_KEYS if key in row]
    return row[key], "".join(f"\n{name}. {text}" for name, text in zip("ABCDEF", texts, strict=False))


@dataclass
class Decontaminate:
    """The step: a row that shares an n-gram with a question is left out."""

    exam: Exam
    overlap: float = 0.5
    reader: RowReader = READER
    name: str = "decontaminate"

    def rule_names(self) -> list[str]:
        return ["exam question"]

    def job(self) -> dict[str, Any]:
        return {"against": inputs_of(list(self.exam.files)), "ngram": NGRAM, "overlap": self.overlap}

    def about(self) -> dict[str, Any]:
        about = {"against": self.exam.names, "questions": len(self.exam.questions)}
        return {
            **about,
            "ngram": f"{NGRAM['zh']}-grams of characters, {NGRAM['en']} in English",
            "overlap": self.overlap,
        }

    def pass_over(self, row: Row) -> None:
        pass

    def judge(self, rows: list[Row]) -> list[Verdict]:
        return [self._judge(row) for row in rows]

    def _judge(self, row: Row) -> Verdict:
        language, characters = language_of(row.text), len(row.text)
        number, shared, share = self.exam.find(row.text, self.overlap)
        if number < 0:
            return Verdict(as_line(row.row), language, characters)
        place, question = self.exam.questions[number]
        rank = rank_of("exam question", row.text)
        example = f"question: {question[:200]}\nshared:   {shared}\nthis:     {row.text[:200]}"
        mark = Mark("exam question", characters, f"{share:.0%} of {place}: {shared}", example, rank)
        return Verdict(None, language, characters, [mark])
