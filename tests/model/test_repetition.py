"""Repetition metrics equal hand counts on short answers."""

import pytest

from model.repetition import distinct_n, has_loop, repetition_stats, split_units


def test_units_are_characters_words_and_punctuation():
    assert split_units("Hello, World 3.5 it's") == ["hello", ",", "world", "3", ".", "5", "it", "'", "s"]
    assert split_units("你好world，再见。\n") == ["你", "好", "world", "，", "再", "见", "。"]
    assert split_units("naïve Жук ひらがな") == ["naïve", "жук", "ひらがな"] and split_units(" \n") == []


def test_distinct_n_equals_hand_counts():
    answers = [["a", "b", "a", "b"], ["a", "b", "c"]]
    assert distinct_n(answers, 1) == pytest.approx(3 / 7)
    assert distinct_n(answers, 2) == pytest.approx(3 / 5)  # ab ba ab, ab bc
    assert distinct_n(answers, 3) == pytest.approx(3 / 3)  # aba bab, abc
    assert distinct_n(answers, 5) is None and distinct_n([], 1) is None


@pytest.mark.parametrize(
    ("answer", "anywhere", "at_end"),
    [
        ("a" * 8, True, True),
        ("a" * 7, False, False),
        ("abc" * 4, True, True),
        ("xy" + "abc" * 4, True, True),
        ("abc" * 4 + "ab", True, True),  # the fifth repetition is incomplete
        ("abc" * 4 + "x", True, False),
        ("abc" * 3, False, False),
        ("".join(map(chr, range(100, 132))) * 4, True, True),
        ("".join(map(chr, range(100, 133))) * 4, False, False),
        ("ab" * 3 + "c" + "ab" * 3, False, False),
        ("", False, False),
    ],
)
def test_has_loop(answer, anywhere, at_end):
    assert has_loop(answer) is anywhere and has_loop(answer, at_end=True) is at_end


def test_repetition_stats():
    answers = [
        {"answer": "是的是的是的是的", "finish_reason": "length"},
        {"answer": "  ", "finish_reason": "stop"},
        {"answer": "It is so.", "finish_reason": "stop"},
        {"answer": "好", "finish_reason": "stop"},
    ]
    found = repetition_stats(answers)
    assert (found["loops"], found["empty"], found["cut_off"], found["answers"]) == (1, 1, 1, 4)
    assert found["loops_rate"] == found["empty_rate"] == 0.25 and found["mean_length"] == (8 + 0 + 4 + 1) / 4
    assert found["distinct_1"] == pytest.approx((2 + 4 + 1) / 13) and found["distinct_2"] == pytest.approx(5 / 10)
    assert repetition_stats([])["mean_length"] == 0
