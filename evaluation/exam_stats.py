"""Statistics of an exam: accuracy, 95 % confidence intervals, p-values against random guessing, and baselines.

    interval  Wilson (1927): (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.96     p: accuracy, n questions
    p-value   P(X >= correct), X ~ Binomial(n, 1/4): exact, one-sided, against random guessing; with other numbers of
              options, X is the sum of one binomial for each number of options k, with probability 1/k

With several orders of the options, a question counts as the fraction of orders in which its answer is correct.
Interval and p-value still use the number of questions, so they are conservative.
Two more baselines: the best constant letter (chosen with the answers known) and the longest option.

Read next: exam_prompts.py (scoring methods), exam_report.py (tables and files).
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
    middle, spread = (
        proportion + square / 2,
        Z_95 * math.sqrt(proportion * (1 - proportion) / questions + square / (4 * questions)),
    )
    low, high = (middle - spread) / (1 + square), (middle + spread) / (1 + square)
    return max(0.0, min(proportion, low)), min(1.0, max(proportion, high))  # rounding errors at 0 and 1


def binomial_p_value(correct: float, sizes: Iterable[tuple[int, int]]) -> float:
    """Probability that random guessing gets at least floor(`correct`) questions right.

    sizes: (options, questions) for each number of options.
    """
    least, sizes = math.floor(correct + 1e-9), list(sizes)
    if len(sizes) == 1:
        ((options, questions),) = sizes
        return min(1.0, math.fsum(binomial_probability(k, questions, 1 / options) for k in range(least, questions + 1)))
    distribution = np.ones(1)  # probability of each number of correct answers
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
    """One result for each question, which combines its orders; in the order of the prompts."""
    prompts_by_item: dict[ExamItem, list[ExamPrompt]] = {}
    for prompt in prompts:
        prompts_by_item.setdefault(prompt.item, []).append(prompt)
    question_results = []
    for item, item_prompts in prompts_by_item.items():
        options = range(len(item.options))
        chosen = [max(options, key=prompt.log_probs.__getitem__) for prompt in item_prompts]
        probabilities = [_softmax(prompt.log_probs) for prompt in item_prompts]
        likely = [sum(probability[i] for probability in probabilities) for i in options]
        answer = OPTION_LETTERS.index(item.answer) if item.answer else -1
        question_results.append(
            QuestionResult(
                item,
                OPTION_LETTERS[max(options, key=likely.__getitem__)],
                sum(i == answer for i in chosen) / len(item_prompts) if item.answer else math.nan,
                tuple(sum(prompt.log_probs[i] for prompt in item_prompts) / len(item_prompts) for i in options),
                tuple(OPTION_LETTERS[prompt.order.index(i)] for prompt, i in zip(item_prompts, chosen, strict=True)),
            )
        )
    return question_results


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
    categories = sorted({exam.categories[subject] for subject in by_subject})
    subjects = [
        score_group(subject, category, by_subject[subject])
        for category in categories
        for subject in by_subject
        if exam.categories[subject] == category
    ]
    category_scores = [
        score_group(
            category,
            category,
            [question for question in question_results if exam.categories[question.item.subject] == category],
        )
        for category in categories
    ]
    return ExamResult(question_results, subjects, category_scores, score_group("all", "", question_results))


def interpretation(result: ExamResult) -> str:
    """A text that compares the score with random guessing and the two baselines."""
    total, (low, high) = result.total, result.total.interval
    p = total.p_value
    odds = "with probability below 1e-06" if p < 1e-6 else f"with probability {p:.2g}"
    text = "Above chance" if p < SIGNIFICANCE_LEVEL else "Not above chance"
    text += f": {total.accuracy:.1%} of {total.questions:,} questions correct, "
    text += f"95 % confidence interval {low:.1%} to {high:.1%}. "
    text += f"Random guessing scores {total.chance:.0%} on average, and at least as high {odds}."
    if p < SIGNIFICANCE_LEVEL and low <= total.constant_baseline:
        text += (
            f" But always predicting {total.constant_letter} scores {total.constant_baseline:.1%}, "
            "which is not below the interval."
        )
    elif p < SIGNIFICANCE_LEVEL and low <= total.longest_option_baseline:
        text += (
            f" But always predicting the longest option scores {total.longest_option_baseline:.1%}, "
            "which is not below the interval."
        )
    significant = [subject.name for subject in result.subjects if subject.p_value < SIGNIFICANCE_LEVEL]
    if len(result.subjects) >= 10:
        text += (
            f" Subjects above chance (p < {SIGNIFICANCE_LEVEL}, uncorrected): "
            f"{len(significant)} of {len(result.subjects)}"
        )
        text += f"; random guessing gives about {SIGNIFICANCE_LEVEL * len(result.subjects):.1f}."
    return text
