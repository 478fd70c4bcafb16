"""What the answers of an exam are worth: shares, their intervals, and whether guessing would do as well.

    interval  Wilson (1927): (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.96       p: share right of n
    p-value   P(X >= right), X ~ Binomial(n, 1/4): how often pure guessing is at least as good (exact, one-sided)

With several orders of the options a question counts as the share of orders in which it was answered right; interval
and p-value still count questions, which makes them wider than need be, never narrower.
Two baselines need no model: the best constant letter (seen in hindsight), and the longest option.

Read next: exam.py (where the log-probabilities come from), exam_pages.py (how it is shown).
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from corpus.exams import LETTERS, Exam, Item
from evaluation.exam import Asked

CHANCE = 0.25
Z = 1.959964  # 95 % of a normal distribution lie within
LEVEL = 0.05


@dataclass(frozen=True)
class Marked:
    """One question and what the model made of it."""

    item: Item
    prediction: str  # the letter of the option that is the likeliest on average over the orders
    correct: float  # share of the orders in which the right option was the likeliest; NaN where the answer is secret
    scores: tuple[float, ...]  # mean log-probability of each option, as the file letters them
    said: tuple[str, ...]  # the letter under which the chosen option stood, in each order


@dataclass(frozen=True)
class Score:
    """The result on a group of questions."""

    name: str
    category: str
    questions: int
    correct: float
    always: float  # share right of the best constant letter
    always_letter: str
    longest: float  # share right of choosing the longest option; ties count in part

    @property
    def accuracy(self) -> float:
        return self.correct / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.correct, self.questions)

    @property
    def p_value(self) -> float:
        return guessing_reaches(self.correct, self.questions)

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval
        return {
            "name": self.name,
            "category": self.category,
            "questions": self.questions,
            "correct": round(self.correct, 4),
            "accuracy": round(self.accuracy, 6),
            "low": round(low, 6),
            "high": round(high, 6),
            "p_value": float(f"{self.p_value:.3g}"),
            "chance": CHANCE,
            "always_letter": self.always_letter,
            "always": round(self.always, 6),
            "longest": round(self.longest, 6),
        }


def wilson(correct: float, questions: int) -> tuple[float, float]:
    """Bounds of the 95 % interval of a share, formula on the door plate."""
    share, square = correct / questions, Z * Z / questions
    middle, spread = share + square / 2, Z * math.sqrt(share * (1 - share) / questions + square / (4 * questions))
    low, high = (middle - spread) / (1 + square), (middle + spread) / (1 + square)
    return max(0.0, min(share, low)), min(1.0, max(share, high))  # at 0 and 1 rounding may step over the share


def guessing_reaches(correct: float, questions: int, chance: float = CHANCE) -> float:
    """Probability that guessing gets at least so many right; parts of a question are not counted."""
    least = math.floor(correct + 1e-9)
    logs = [
        math.lgamma(questions + 1)
        - math.lgamma(k + 1)
        - math.lgamma(questions - k + 1)
        + k * math.log(chance)
        + (questions - k) * math.log1p(-chance)
        for k in range(least, questions + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, logs)))


def mark(asked: Iterable[Asked]) -> list[Marked]:
    """One entry for each question, its orders put together; in the order in which they were asked."""
    together: dict[Item, list[Asked]] = {}
    for one in asked:
        together.setdefault(one.item, []).append(one)
    marked = []
    for item, ones in together.items():
        chosen = [max(range(4), key=one.log_probs.__getitem__) for one in ones]
        shares = [_shares(one.log_probs) for one in ones]
        likely = [sum(share[i] for share in shares) for i in range(4)]
        answer = LETTERS.index(item.answer) if item.answer else -1
        marked.append(
            Marked(
                item,
                LETTERS[max(range(4), key=likely.__getitem__)],
                sum(i == answer for i in chosen) / len(ones) if item.answer else math.nan,
                tuple(sum(one.log_probs[i] for one in ones) / len(ones) for i in range(4)),
                tuple(LETTERS[one.order.index(i)] for one, i in zip(ones, chosen, strict=True)),
            )
        )
    return marked


def _shares(log_probs: tuple[float, ...]) -> list[float]:
    """Softmax over the four options."""
    top = max(log_probs)
    weights = [math.exp(value - top) for value in log_probs]
    return [weight / sum(weights) for weight in weights]


def score(name: str, category: str, marked: list[Marked]) -> Score:
    """The result on questions whose answers are known, at least one."""
    answers = Counter(one.item.answer for one in marked)
    letter = max(LETTERS, key=lambda letter: answers[letter])
    longest = 0.0
    for one in marked:
        lengths = [len(option) for option in one.item.options]
        winners = [LETTERS[i] for i in range(4) if lengths[i] == max(lengths)]
        longest += (one.item.answer in winners) / len(winners)
    n = len(marked)
    return Score(name, category, n, sum(one.correct for one in marked), answers[letter] / n, letter, longest / n)


@dataclass(frozen=True)
class Result:
    """An exam's result: each subject, each category, all."""

    marked: list[Marked]
    subjects: list[Score]
    categories: list[Score]
    total: Score

    @property
    def mean_of_subjects(self) -> float:
        """Every subject counts alike, whatever its number of questions: how leaderboards average."""
        return sum(subject.accuracy for subject in self.subjects) / len(self.subjects)

    @property
    def said(self) -> dict[str, float]:
        """How often each letter was chosen, as it stood on the page."""
        counts = Counter(letter for one in self.marked for letter in one.said)
        return {letter: counts[letter] / counts.total() for letter in LETTERS}


def result_of(exam: Exam, marked: list[Marked]) -> Result:
    """Subjects by category, categories by name."""
    by_subject: dict[str, list[Marked]] = {subject: [] for subject in exam.subjects}
    for one in marked:
        by_subject[one.item.subject].append(one)
    categories = sorted({exam.categories[subject] for subject in by_subject})
    subjects = [
        score(subject, category, by_subject[subject])
        for category in categories
        for subject in by_subject
        if exam.categories[subject] == category
    ]
    of_category = [
        score(category, category, [one for one in marked if exam.categories[one.item.subject] == category])
        for category in categories
    ]
    return Result(marked, subjects, of_category, score("all", "", marked))


def sentence(result: Result) -> str:
    """What the score means, in words."""
    total, (low, high) = result.total, result.total.interval
    p = total.p_value
    odds = "less than one time in a million" if p < 1e-6 else f"with probability {p:.2g}"
    text = "Above chance" if p < LEVEL else "Not above chance"
    text += f": {total.accuracy:.1%} of {total.questions:,} questions right, 95 % interval {low:.1%} to {high:.1%}. "
    text += f"Guessing gives {CHANCE:.0%} and does at least as well {odds}."
    if p < LEVEL and low <= total.always:
        text += f" But always saying {total.always_letter} gives {total.always:.1%}, which is within the interval."
    elif p < LEVEL and low <= total.longest:
        text += f" But always choosing the longest option gives {total.longest:.1%}, which is within the interval."
    lucky = [subject.name for subject in result.subjects if subject.p_value < LEVEL]
    if len(result.subjects) >= 10:
        text += f" Above chance by themselves (p < {LEVEL}): {len(lucky)} of {len(result.subjects)} subjects"
        text += f"; luck alone would make it about {LEVEL * len(result.subjects):.1f}."
    return text
