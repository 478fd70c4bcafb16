"""Statistics of an exam: accuracy, 95 % confidence intervals, p-values against random guessing, and baselines.

    interval  Wilson (1927): (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.96     p: accuracy, n questions
    p-value   P(X >= correct), X ~ Binomial(n, 1/4): exact, one-sided, against random guessing; with other numbers of
              options, X is the sum of one binomial for each number of options k, with probability 1/k

With several orders of the options, a question counts as the fraction of orders in which its answer is correct.
Interval and p-value still use the number of questions, so they are conservative.
Two more baselines: the best constant letter (chosen with the answers known) and the longest option.

Read next: exam_prompts.py (scoring methods), exam_report.py (tables and files).
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.exam_data import ExamItem, ExamSplit
from evaluation.exam_prompts import ExamPrompt
from evaluation.exam_table import OPTION_LETTERS

Z_95 = 1.959964  # the 97.5 % quantile of the normal distribution
SIGNIFICANCE_LEVEL = 0.05


@dataclass(frozen=True)
class QuestionResult:
    """One question with the model's prediction over all orders of its options."""

    item: ExamItem
    prediction: str  # letter of the option with the largest mean probability over the orders
    correct: float  # fraction of the orders answered correctly; NaN where the answer is unknown
    mean_log_probs: tuple[float, ...]  # mean over the orders for each option, in the order of the file
    predicted_letters: tuple[str, ...]  # letter of the predicted option in the prompt, for each order


@dataclass(frozen=True)
class GroupScore:
    """The score of a group of questions: a subject, a category or the whole exam."""

    name: str
    category: str
    questions: int
    correct: float
    constant_baseline: float  # accuracy of the best constant letter
    constant_letter: str
    longest_option_baseline: float  # accuracy of choosing the longest option; ties count fractionally
    sizes: tuple[tuple[int, int], ...]  # (number of options, number of questions with so many)

    @property
    def chance(self) -> float:
        """Expected accuracy of random guessing: 0.25 with four options."""
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
    """(low, high) of the 95 % confidence interval of correct / questions."""
    proportion, square = correct / questions, Z_95 * Z_95 / questions
    middle = proportion + square / 2
    spread = Z_95 * math.sqrt(proportion * (1 - proportion) / questions + square / (4 * questions))
    low, high = (middle - spread) / (1 + square), (middle + spread) / (1 + square)
    return max(0.0, min(proportion, low)), min(1.0, max(proportion, high))  # rounding errors at 0 and 1


def binomial_p_value(correct: float, sizes: Iterable[tuple[int, int]]) -> float:
    """Probability that random guessing gets at least floor(`correct`) questions right.

    sizes: (options, questions) for each number of options.
    """
    least = math.floor(correct + 1e-9)
    counts = [[binomial_probability(k, questions, 1 / options) for k in range(questions + 1)]
              for options, questions in sizes]  # fmt: skip
    return min(1.0, math.fsum(functools.reduce(np.convolve, counts)[least:]))  # of the sum of the binomials


def binomial_probability(k: int, n: int, p: float) -> float:
    """Probability of k successes in n trials of probability p, 0 < p < 1."""
    return math.exp(log_ways(n, k) + k * math.log(p) + (n - k) * math.log1p(-p))


def log_ways(n: int, k: int) -> float:
    """Logarithm of n choose k."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def score_questions(prompts: Iterable[ExamPrompt]) -> list[QuestionResult]:
    """One result for each question, which combines its orders; in the order of the prompts."""
    prompts_by_item: dict[ExamItem, list[ExamPrompt]] = {}
    for prompt in prompts:
        prompts_by_item.setdefault(prompt.item, []).append(prompt)
    results = []
    for item, orders in prompts_by_item.items():
        chosen = [prompt.log_probs.index(max(prompt.log_probs)) for prompt in orders]
        likely = [sum(values) for values in zip(*(_softmax(prompt.log_probs) for prompt in orders), strict=True)]
        means = tuple(sum(values) / len(orders) for values in zip(*(p.log_probs for p in orders), strict=True))
        letters = tuple(OPTION_LETTERS[p.order.index(i)] for p, i in zip(orders, chosen, strict=True))
        right = sum(OPTION_LETTERS[i] == item.answer for i in chosen) / len(orders) if item.answer else math.nan
        results.append(QuestionResult(item, OPTION_LETTERS[likely.index(max(likely))], right, means, letters))
    return results


def _softmax(log_probs: tuple[float, ...]) -> list[float]:
    """Softmax over the options."""
    top = max(log_probs)
    weights = [math.exp(value - top) for value in log_probs]
    return [weight / sum(weights) for weight in weights]


def score_group(name: str, category: str, question_results: list[QuestionResult]) -> GroupScore:
    """The score of a non-empty group of questions with known answers."""
    answers = Counter(question.item.answer for question in question_results)
    letter = max(OPTION_LETTERS, key=lambda letter: answers[letter])
    longest = 0.0
    for question in question_results:
        lengths = [len(option) for option in question.item.options]
        winners = [OPTION_LETTERS[i] for i, length in enumerate(lengths) if length == max(lengths)]
        longest += (question.item.answer in winners) / len(winners)
    n, right = len(question_results), sum(question.correct for question in question_results)
    sizes = tuple(sorted(Counter(len(question.item.options) for question in question_results).items()))
    return GroupScore(name, category, n, right, answers[letter] / n, letter, longest / n, sizes)


@dataclass(frozen=True)
class ExamResult:
    """The scores of an exam by subject, by category and in total."""

    question_results: list[QuestionResult]
    subjects: list[GroupScore]
    categories: list[GroupScore]
    total: GroupScore

    @property
    def mean_of_subjects(self) -> float:
        """Macro average of the accuracy: every subject has the same weight, as in leaderboards."""
        return sum(subject.accuracy for subject in self.subjects) / len(self.subjects)

    @property
    def letter_frequencies(self) -> dict[str, float]:
        """The fraction of predictions of each letter in the prompts."""
        counts = Counter(letter for question in self.question_results for letter in question.predicted_letters)
        most = max(len(question.item.options) for question in self.question_results)
        return {letter: counts[letter] / counts.total() for letter in OPTION_LETTERS[:most]}


def make_exam_result(exam: ExamSplit, question_results: list[QuestionResult]) -> ExamResult:
    """Score all subjects (sorted by category), categories (by name) and the whole exam."""
    by_subject: dict[str, list[QuestionResult]] = {subject: [] for subject in exam.subjects}
    for question in question_results:
        by_subject[question.item.subject].append(question)
    subjects = sorted(by_subject, key=lambda subject: exam.categories[subject])
    by_category: dict[str, list[QuestionResult]] = {}
    for subject in subjects:
        by_category.setdefault(exam.categories[subject], []).extend(by_subject[subject])
    return ExamResult(
        question_results,
        [score_group(subject, exam.categories[subject], by_subject[subject]) for subject in subjects],
        [score_group(category, category, questions) for category, questions in by_category.items()],
        score_group("all", "", question_results),
    )


def interpretation(result: ExamResult) -> str:
    """A text that compares the score with random guessing and the two baselines."""
    total, (low, high), p = result.total, result.total.interval, result.total.p_value
    odds = "with probability below 1e-06" if p < 1e-6 else f"with probability {p:.2g}"
    text = (
        f"{'Above' if p < SIGNIFICANCE_LEVEL else 'Not above'} chance: {total.accuracy:.1%} of {total.questions:,} "
        f"questions correct, 95 % confidence interval {low:.1%} to {high:.1%}. "
        f"Random guessing scores {total.chance:.0%} on average, and at least as high {odds}."
    )
    baselines = {total.constant_letter: total.constant_baseline, "the longest option": total.longest_option_baseline}
    for name, baseline in baselines.items() if p < SIGNIFICANCE_LEVEL else ():
        if low <= baseline:
            text += f" But always predicting {name} scores {baseline:.1%}, which is not below the interval."
            break
    if len(result.subjects) >= 10:
        significant = sum(subject.p_value < SIGNIFICANCE_LEVEL for subject in result.subjects)
        text += (
            f" Subjects above chance (p < {SIGNIFICANCE_LEVEL}, uncorrected): {significant} of {len(result.subjects)}; "
            f"random guessing gives about {SIGNIFICANCE_LEVEL * len(result.subjects):.1f}."
        )
    return text
