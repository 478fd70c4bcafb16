"""Promise: intervals, p-values and baselines equal published or enumerated values; the interpretation uses them."""

import math
from itertools import product

import pytest

from evaluation.exam_data import ExamItem, ExamSplit
from evaluation.exam_prompts import ExamPrompt, option_orders
from evaluation.exam_stats import (
    binomial_p_value,
    interpretation,
    make_exam_result,
    score_group,
    score_questions,
    wilson_interval,
)


def make_item(number, answer="A", options=("1", "2", "3", "4"), subject="logic"):
    return ExamItem(subject, str(number), f"q{number}", options, answer, f"f:{subject}{number}")


def make_prompt(item, chosen, order=(0, 1, 2, 3)):
    """A prompt with the largest log-probability at `chosen`, a letter in the order of the data file."""
    letters = "ABCDE"[: len(item.options)]
    return ExamPrompt(
        item, order, [1], [[1]] * len(letters), 0, False, tuple(-1.0 if x == chosen else -2.0 for x in letters)
    )


def make_result(answer_pairs, subject="logic"):
    items = [make_item(i, answer, subject=subject) for i, (answer, _) in enumerate(answer_pairs)]
    found = score_questions(make_prompt(one, chosen) for one, (_, chosen) in zip(items, answer_pairs, strict=True))
    return make_exam_result(ExamSplit("val", items, {}, {subject: "Humanities"}), found)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),  # Newcombe 1998, table I, method 3, rounded to four decimals
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_published_values(correct, n, low, high):
    assert wilson_interval(correct, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_p_value_equals_enumeration_of_guesses():
    for n in (1, 4, 6):
        right = [sum(guess) for guess in product((1, 0, 0, 0), repeat=n)]  # one of four options is correct
        for k in range(n + 1):
            assert binomial_p_value(k, [(4, n)]) == pytest.approx(sum(r >= k for r in right) / 4**n)
    assert binomial_p_value(2.75, [(4, 4)]) == binomial_p_value(2, [(4, 4)]), "2.75 correct questions are rounded down"
    assert binomial_p_value(12342, [(4, 12342)]) < 1e-300 and binomial_p_value(0, [(4, 12342)]) == 1


def test_p_value_for_mixed_numbers_of_options_equals_enumeration_of_guesses():
    # Two questions with 2 options, two with 3, one with 5.
    guesses = list(product(*[(1, 0)] * 2, *[(1, 0, 0)] * 2, (1, 0, 0, 0, 0)))
    for k in range(6):
        expected = sum(sum(guess) >= k for guess in guesses) / len(guesses)
        assert binomial_p_value(k, [(2, 2), (3, 2), (5, 1)]) == pytest.approx(expected)
    mixed = [make_item(0, "B", ("1", "2")), make_item(1, "E", ("1", "2", "3", "4", "55"))]
    found = score_group("x", "", score_questions(make_prompt(one, "B") for one in mixed))
    assert (found.chance, found.longest_option_baseline, found.correct) == (0.35, 0.75, 1)


def test_accuracy_baselines_and_means_are_exact():
    found = make_result([("A", "A"), ("B", "C"), ("B", "C"), ("C", "C")])
    total = found.total
    assert (total.correct, total.accuracy, total.constant_letter, total.constant_baseline) == (2, 0.5, "B", 0.5)
    assert total.longest_option_baseline == 0.25, "if all four options are equally long, each counts 1/4"
    assert found.letter_frequencies == {"A": 0.25, "B": 0.0, "C": 0.75, "D": 0.0} and found.mean_of_subjects == 0.5
    long = [make_item(0, "B", ("1", "22", "33", "4")), make_item(1, "D", ("1", "2", "3", "44"))]
    assert score_group("x", "", score_questions(make_prompt(one, "A") for one in long)).longest_option_baseline == 0.75


def test_orders_assign_every_option_to_every_letter_once():
    assert option_orders(4, 2) == [(0, 1), (1, 0)] and option_orders(3, 3) == [(0, 1, 2), (1, 2, 0), (2, 0, 1)]
    assert len(option_orders(4, 5)) == 4 and len({order[0] for order in option_orders(5, 5)}) == 5
    orders = option_orders(24)
    assert len(set(orders)) == 24 and option_orders(1) == [(0, 1, 2, 3)]
    for start in range(0, 24, 4):
        for position in range(4):
            assert {order[position] for order in orders[start : start + 4]} == {0, 1, 2, 3}


def test_always_predicting_one_letter_scores_chance_over_four_orders():
    items = [make_item(i, "B") for i in range(20)]
    always_b = [make_prompt(one, "ABCD"[order[1]], order) for one in items for order in option_orders(4)]
    found = make_exam_result(ExamSplit("val", items, {}, {"logic": "Humanities"}), score_questions(always_b))
    assert found.total.accuracy == 0.25 and found.letter_frequencies["B"] == 1
    one_order = score_questions(make_prompt(one, "B") for one in items)
    assert sum(one.correct for one in one_order) == 20, "with a single order the same prediction scores 100 %"


def test_prediction_has_the_largest_mean_probability_over_orders():
    one = make_item(0, "D")
    first = ExamPrompt(one, (0, 1, 2, 3), [1], [[1]] * 4, 0, False, (-1.0, -5.0, -5.0, -1.5))
    second = ExamPrompt(one, (1, 2, 3, 0), [1], [[1]] * 4, 0, False, (-5.0, -5.0, -5.0, -0.5))
    (found,) = score_questions([first, second])
    assert (found.prediction, found.correct, found.predicted_letters) == ("D", 0.5, ("A", "C"))
    assert found.mean_log_probs == (-3.0, -5.0, -5.0, -1.0)


def test_interpretation_compares_accuracy_with_chance_and_constant_letter():
    assert interpretation(make_result([("A", "A"), *[("B", "C")] * 3])).startswith(
        "Not above chance: 25.0% of 4 questions"
    )
    all_correct = interpretation(make_result([(letter, letter) for letter in "ABCD" * 10]))
    assert all_correct.startswith("Above chance: 100.0% of 40 questions correct, 95 % confidence interval 91.2% to")
    constant = interpretation(make_result([("C", "C")] * 20 + [("A", "C")] * 20))
    assert constant.startswith("Above chance") and "always predicting" in constant and "50.0%" in constant


def test_question_without_answer_has_nan_accuracy():
    (found,) = score_questions([make_prompt(make_item(0, ""), "C")])
    assert found.prediction == "C" and math.isnan(found.correct)
