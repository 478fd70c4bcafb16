"""What the answers of an exam are worth: shares, their intervals, and whether guessing would do as well.

    interval  Wilson (1927): (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.96       p: share right of n
    p-value   P(X >= right), X ~ Binomial(n, 1/4): how often pure guessing is at least as good (exact, one-sided);
              with other numbers of options, X is the sum of a binomial for each number k of them, with chance 1/k

With several orders of the options a question counts as the share of orders in which it was answered right; interval
and p-value still count questions, which makes them wider than need be, never narrower.
Two baselines need no model: the best constant letter (seen in hindsight), and the longest option.

Read next: exam_prompts.py (where the log-probabilities come from), exam_report.py (how it is shown).
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.exam_data import ExamItem, ExamSplit
from evaluation.exam_prompts import ExamPrompt
from evaluation.exam_table import OPTION_LETTERS

Z_95 = 1.959964  # 95 % of a normal distribution lie within
SIGNIFICANCE_LEVEL = 0.05


@dataclass(frozen=True)
class QuestionResult:
    """One question and what the model made of it."""

    item: ExamItem
    prediction: str  # the letter of the option that is the likeliest on average over the orders
    correct: float  # share of the orders in which the right option was the likeliest; NaN where the answer is secret
    mean_log_probs: tuple[float, ...]  # mean log-probability of each option, as the file letters them
    predicted_letters: tuple[str, ...]  # the letter under which the chosen option stood, in each order


@dataclass(frozen=True)
class GroupScore:
    """The result on a group of questions."""

    name: str
    category: str
    questions: int
    correct: float
    constant_baseline: float  # share right of the best constant letter
    constant_letter: str
    longest_option_baseline: float  # share right of choosing the longest option; ties count in part
    sizes: tuple[tuple[int, int], ...]  # (options, how many of the questions have so many)

    @property
    def chance(self) -> float:
        """The share right of guessing: 0.25 with four options."""
        return sum(questions / options for options, questions in self.sizes) / self.questions

    @property
    def accuracy(self) -> float:
        return self.correct / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.correct, self.questions)

    @property
    def p_value(self) -> float:
        return binomial_p_value(self.correct, self.sizes)

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
            "chance": round(self.chance, 6),
            "always_letter": self.constant_letter,
            "always": round(self.constant_baseline, 6),
            "longest": round(self.longest_option_baseline, 6),
        }


def wilson_interval(correct: float, questions: int) -> tuple[float, float]:
    """Bounds of the 95 % interval of a share; the formula stands in the module docstring."""
    proportion, square = correct / questions, Z_95 * Z_95 / questions
    middle, spread = (
        proportion + square / 2,
        Z_95 * math.sqrt(proportion * (1 - proportion) / questions + square / (4 * questions)),
    )
    low, high = (middle - spread) / (1 + square), (middle + spread) / (1 + square)
    return max(0.0, min(proportion, low)), min(1.0, max(proportion, high))  # rounding errors at 0 and 1


def binomial_p_value(correct: float, sizes: Iterable[tuple[int, int]]) -> float:
    """Probability that guessing gets at least so many right; parts of a question are not counted.

    sizes: (options, questions) for each number of options.
    """
    least, sizes = math.floor(correct + 1e-9), list(sizes)
    if len(sizes) == 1:
        ((options, questions),) = sizes
        return min(1.0, math.fsum(binomial_probability(k, questions, 1 / options) for k in range(least, questions + 1)))
    distribution = np.ones(1)  # the probability of each number of right answers
    for options, questions in sizes:
        distribution = np.convolve(
            distribution, [binomial_probability(k, questions, 1 / options) for k in range(questions + 1)]
        )
    return min(1.0, math.fsum(distribution[least:]))


def binomial_probability(k: int, n: int, p: float) -> float:
    """Probability of k successes in n trials of probability p, 0 < p < 1."""
    log_ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(log_ways + k * math.log(p) + (n - k) * math.log1p(-p))


def score_questions(prompts: Iterable[ExamPrompt]) -> list[QuestionResult]:
    """One entry for each question, its orders put together; in the order in which they were asked."""
    prompts_by_item: dict[ExamItem, list[ExamPrompt]] = {}
    for one in prompts:
        prompts_by_item.setdefault(one.item, []).append(one)
    question_results = []
    for item, item_prompts in prompts_by_item.items():
        options = range(len(item.options))
        chosen = [max(options, key=one.log_probs.__getitem__) for one in item_prompts]
        probabilities = [_softmax(one.log_probs) for one in item_prompts]
        likely = [sum(probability[i] for probability in probabilities) for i in options]
        answer = OPTION_LETTERS.index(item.answer) if item.answer else -1
        question_results.append(
            QuestionResult(
                item,
                OPTION_LETTERS[max(options, key=likely.__getitem__)],
                sum(i == answer for i in chosen) / len(item_prompts) if item.answer else math.nan,
                tuple(sum(one.log_probs[i] for one in item_prompts) / len(item_prompts) for i in options),
                tuple(OPTION_LETTERS[one.order.index(i)] for one, i in zip(item_prompts, chosen, strict=True)),
            )
        )
    return question_results


def _softmax(log_probs: tuple[float, ...]) -> list[float]:
    """Softmax over the options."""
    top = max(log_probs)
    weights = [math.exp(value - top) for value in log_probs]
    return [weight / sum(weights) for weight in weights]


def score_group(name: str, category: str, question_results: list[QuestionResult]) -> GroupScore:
    """The result on questions whose answers are known, at least one."""
    answers = Counter(one.item.answer for one in question_results)
    letter = max(OPTION_LETTERS, key=lambda letter: answers[letter])
    longest = 0.0
    for one in question_results:
        lengths = [len(option) for option in one.item.options]
        winners = [OPTION_LETTERS[i] for i, length in enumerate(lengths) if length == max(lengths)]
        longest += (one.item.answer in winners) / len(winners)
    n, right = len(question_results), sum(one.correct for one in question_results)
    sizes = tuple(sorted(Counter(len(one.item.options) for one in question_results).items()))
    return GroupScore(name, category, n, right, answers[letter] / n, letter, longest / n, sizes)


@dataclass(frozen=True)
class ExamResult:
    """An exam's result: each subject, each category, all."""

    question_results: list[QuestionResult]
    subjects: list[GroupScore]
    categories: list[GroupScore]
    total: GroupScore

    @property
    def mean_of_subjects(self) -> float:
        """Every subject counts alike, whatever its number of questions: how leaderboards average."""
        return sum(subject.accuracy for subject in self.subjects) / len(self.subjects)

    @property
    def letter_frequencies(self) -> dict[str, float]:
        """How often each letter was chosen, as it stood on the page."""
        counts = Counter(letter for one in self.question_results for letter in one.predicted_letters)
        most = max(len(one.item.options) for one in self.question_results)
        return {letter: counts[letter] / counts.total() for letter in OPTION_LETTERS[:most]}


def make_exam_result(exam: ExamSplit, question_results: list[QuestionResult]) -> ExamResult:
    """Subjects by category, categories by name."""
    by_subject: dict[str, list[QuestionResult]] = {subject: [] for subject in exam.subjects}
    for one in question_results:
        by_subject[one.item.subject].append(one)
    categories = sorted({exam.categories[subject] for subject in by_subject})
    subjects = [
        score_group(subject, category, by_subject[subject])
        for category in categories
        for subject in by_subject
        if exam.categories[subject] == category
    ]
    category_scores = [
        score_group(
            category, category, [one for one in question_results if exam.categories[one.item.subject] == category]
        )
        for category in categories
    ]
    return ExamResult(question_results, subjects, category_scores, score_group("all", "", question_results))


def interpretation(result: ExamResult) -> str:
    """What the score means, in words."""
    total, (low, high) = result.total, result.total.interval
    p = total.p_value
    odds = "less than one time in a million" if p < 1e-6 else f"with probability {p:.2g}"
    text = "Above chance" if p < SIGNIFICANCE_LEVEL else "Not above chance"
    text += f": {total.accuracy:.1%} of {total.questions:,} questions right, 95 % interval {low:.1%} to {high:.1%}. "
    text += f"Guessing gives {total.chance:.0%} and does at least as well {odds}."
    if p < SIGNIFICANCE_LEVEL and low <= total.constant_baseline:
        text += (
            f" But always saying {total.constant_letter} gives {total.constant_baseline:.1%}, "
            "which is within the interval."
        )
    elif p < SIGNIFICANCE_LEVEL and low <= total.longest_option_baseline:
        text += (
            f" But always choosing the longest option gives {total.longest_option_baseline:.1%}, "
            "which is within the interval."
        )
    significant = [subject.name for subject in result.subjects if subject.p_value < SIGNIFICANCE_LEVEL]
    if len(result.subjects) >= 10:
        text += (
            f" Above chance by themselves (p < {SIGNIFICANCE_LEVEL}): "
            f"{len(significant)} of {len(result.subjects)} subjects"
        )
        text += f"; luck alone would make it about {SIGNIFICANCE_LEVEL * len(result.subjects):.1f}."
    return text
