"""Significance tests for the strong and weak subjects of an exam, corrected for multiple testing.

    strong         more accurate than on all other subjects together, and above the random baseline
    weak           less accurate than on all other subjects together
    above guessing above the random baseline

A subject is compared with the others by Fisher's exact test (two-sided), and with random guessing by the exact p-value
of exam_stats.py (one-sided). Holm's method corrects each of the two families of tests (Holm 1979, Scandinavian Journal
of Statistics 6): if a model is equally good in all subjects, the probability of any strong or weak subject is at most
5 %. Without the correction, about one subject in twenty would be reported by chance.

With several orders of the options, the number of correct answers is rounded to an integer.
Called by exam_report.py. Read next: exam_stats.py (scores and intervals).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.exam_stats import SIGNIFICANCE_LEVEL, ExamResult, GroupScore, log_ways


@dataclass(frozen=True)
class SubjectStrengths:
    """The significant subjects: `weak` has the lowest accuracy first, the others the highest."""

    strong: list[GroupScore]
    weak: list[GroupScore]
    above_guessing: list[GroupScore]
    subjects: int

    def to_dict(self) -> dict[str, Any]:
        names = {"strong": self.strong, "weak": self.weak, "above_guessing": self.above_guessing}
        return {**{key: [score.name for score in scores] for key, scores in names.items()}, "level": SIGNIFICANCE_LEVEL,
                "correction": "Holm", "subjects": self.subjects}  # fmt: skip


def find_strengths(result: ExamResult) -> SubjectStrengths:
    """Test every subject against the others and against random guessing."""
    subjects = sorted(result.subjects, key=lambda score: score.accuracy, reverse=True)
    questions, all_right = result.total.questions, sum(round(subject.correct) for subject in subjects)
    p_values = []
    for subject in subjects:
        right, others = round(subject.correct), questions - subject.questions
        p_values.append(fisher_p_value(right, subject.questions, all_right - right, others) if others else 1.0)
    above = list(itertools.compress(subjects, holm_rejections([subject.p_value for subject in subjects])))
    different = list(itertools.compress(subjects, holm_rejections(p_values)))
    weak = [s for s in different if round(s.correct) * questions < all_right * s.questions]
    strong = [subject for subject in different if subject not in weak and subject in above]
    return SubjectStrengths(strong, weak[::-1], above, len(subjects))


def holm_rejections(p_values: Sequence[float], level: float = SIGNIFICANCE_LEVEL) -> list[bool]:
    """For each p-value, whether Holm's step-down method rejects it at a family-wise error rate of `level`."""
    rejected = [False] * len(p_values)
    for step, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[i] > level / (len(p_values) - step):
            break
        rejected[i] = True
    return rejected


def fisher_p_value(right: int, questions: int, other_right: int, other_questions: int) -> float:
    """Two-sided p-value of Fisher's exact test: total probability of the tables that are at most as probable."""
    total, all_right = questions + other_questions, right + other_right

    def log_p(k: int) -> float:
        return log_ways(questions, k) + log_ways(other_questions, all_right - k) - log_ways(total, all_right)

    tables = map(log_p, range(max(0, all_right - other_questions), min(questions, all_right) + 1))
    seen = log_p(right) + 1e-7
    return min(1.0, math.fsum(math.exp(value) for value in tables if value <= seen))


def strengths_interpretation(found: SubjectStrengths) -> str:
    """A text with strong and weak subjects and their 95 % confidence intervals; "" for an exam of one subject."""
    if found.subjects < 2:
        return ""
    tested = f"({found.subjects} subjects, exact tests, Holm's correction, significance level {SIGNIFICANCE_LEVEL:.0%})"
    above = f"{len(found.above_guessing)} of {found.subjects} subjects are above the random baseline"
    if not found.strong and not found.weak:
        return f"No subject differs significantly from the others; {above} {tested}."
    subjects = f"Strong subjects: {_format_scores(found.strong)}. Weak subjects: {_format_scores(found.weak)}."
    return f"{subjects} They differ significantly from the other subjects; {above} {tested}."


def _format_scores(scores: list[GroupScore]) -> str:
    """law 95.0% (76.4% to 99.1%)."""
    shown = ("{} {:.1%} ({:.1%} to {:.1%})".format(score.name, score.accuracy, *score.interval) for score in scores)
    return ", ".join(shown) or "none"
