"""Strong and weak subjects are those that differ significantly, with a family-wise error rate of 5 %.

Promises: the p-values equal an enumeration; a model that knows one subject is strong in that subject only; a model that
guesses, or is equally good in all subjects, has no strong or weak subject in at least 95 of 100 exams.
"""

import random
from math import comb

import pytest

from evaluation.exam_stats import ExamResult, GroupScore
from evaluation.subject_strengths import find_strengths, fisher_p_value, holm_rejections, strengths_interpretation


def make_result(subjects):
    """subjects: {name: (right, questions)}."""
    scores = [GroupScore(name, "x", n, right, 0.3, "A", 0.3, ((4, n),)) for name, (right, n) in subjects.items()]
    questions, right = sum(one.questions for one in scores), sum(one.correct for one in scores)
    return ExamResult([], scores, [], GroupScore("all", "", questions, right, 0.3, "A", 0.3, ((4, questions),)))


def random_result(rng, chances, questions=20):
    """An exam with `questions` per subject; `chances`: the probability of a correct answer in each subject."""
    right = [sum(rng.random() < p for _ in range(questions)) for p in chances]
    return make_result({f"s{i}": (count, questions) for i, count in enumerate(right)})


def test_fisher_p_value_equals_enumeration():
    # the lady tasting tea (Fisher 1935): 3 of 4 right; tables 0..4 have 1, 16, 36, 16, 1 of 70 ways
    assert fisher_p_value(3, 4, 1, 4) == pytest.approx(34 / 70) and fisher_p_value(4, 4, 0, 4) == pytest.approx(2 / 70)
    assert fisher_p_value(0, 5, 0, 9) == fisher_p_value(5, 5, 9, 9) == 1
    ways = [comb(12, k) * comb(300, 80 - k) for k in range(13)]
    for right in range(13):
        expected = sum(w for w in ways if w <= ways[right]) / sum(ways)
        assert fisher_p_value(right, 12, 80 - right, 300) == pytest.approx(expected, rel=1e-9)


def test_holm_rejects_step_by_step():
    # Holm's thresholds 0.0125, 0.0167, 0.025, 0.05
    assert holm_rejections([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert holm_rejections([0.04, 0.9], 0.05) == [False, False]
    assert holm_rejections([0.04], 0.05) == [True] and holm_rejections([]) == []
    assert holm_rejections([0.01, 0.02, 0.04]) == [True, True, True], "Bonferroni rejects only one"


def test_single_known_subject_is_strong():
    rng = random.Random(0)
    for _ in range(20):
        found = find_strengths(random_result(rng, [0.95] + [0.25] * 51))
        assert [one.name for one in found.strong] == ["s0"] and len(found.weak) <= 1
    found = find_strengths(make_result({"law": (19, 20), **{f"s{i}": (5, 20) for i in range(51)}}))
    assert found.to_dict()["strong"] == ["law"] and not found.weak
    text = strengths_interpretation(found)
    assert text.startswith("Strong subjects: law 95.0% (76.4% to 99.1%). Weak subjects: none.")
    assert "1 of 52 subjects are above the random baseline (52 subjects, exact tests, Holm's correction, " in text
    assert "significance level 5%)" in text


def test_single_unknown_subject_is_weak():
    found = find_strengths(make_result({"logic": (4, 20), **{f"s{i}": (16, 20) for i in range(20)}}))
    assert [one.name for one in found.weak] == ["logic"] and not found.strong and len(found.above_guessing) == 20
    assert "Strong subjects: none. Weak subjects: logic 20.0% (8.1% to 41.6%)." in strengths_interpretation(found)


def test_below_guessing_is_not_strong():
    """More accurate than the other subjects, but not above the random baseline."""
    found = find_strengths(make_result({"law": (13, 50), **{f"s{i}": (0, 50) for i in range(9)}}))
    assert not found.strong and not found.above_guessing


@pytest.mark.parametrize("chance", [0.25, 0.6])
@pytest.mark.parametrize("questions", [12, 25])
def test_family_wise_error_rate_is_at_most_5_percent(chance, questions):
    rng, exams = random.Random(1), 150
    alarms = above = 0
    for _ in range(exams):
        found = find_strengths(random_result(rng, [chance] * 52, questions))
        alarms += bool(found.strong or found.weak)
        above += bool(found.above_guessing)
        if not found.strong and not found.weak:
            assert strengths_interpretation(found).startswith("No subject differs significantly from the others; ")
    assert alarms <= 0.05 * exams + 3 * (0.05 * 0.95 * exams) ** 0.5
    assert chance > 0.25 or above <= 0.05 * exams + 3 * (0.05 * 0.95 * exams) ** 0.5


def test_exam_of_one_subject_has_no_strengths_interpretation():
    found = find_strengths(make_result({"mine": (6, 6)}))
    assert strengths_interpretation(found) == "" and not found.strong and not found.weak
    equal = find_strengths(make_result({"a": (2, 5), "b": (2, 5)}))
    assert strengths_interpretation(equal).startswith("No subject differs")
