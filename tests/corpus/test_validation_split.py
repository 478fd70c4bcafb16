"""Promise: the content determines the split, small data has a validation split, and so have chats of one question."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.examples import ChatExample, text_hash
from corpus.validation_split import MAX_SAME_QUESTION, MIN_VALIDATION_EXAMPLES
from tests.helpers import assign_splits


def chat(question, answer, language="en"):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return ChatExample(messages, "", language, text_hash(question), text_hash(question + "\n" + answer))


def split(items, val_share=0.01):
    """The content hashes of the training examples and of the validation examples."""
    sides = {True: [], False: []}
    for name, item in assign_splits(items, val_share):
        assert name in ("train", f"val_{item.language}")
        sides[name != "train"].append(item.content_hash)
    assert sorted(sides[True] + sides[False]) == sorted(item.content_hash for item in items)
    return set(sides[False]), set(sides[True])


@pytest.mark.parametrize("count", [20, 30, 169, 400, 1000])
@pytest.mark.parametrize("language", ["zh", "en"])
def test_small_data_has_a_validation_split_of_a_twentieth_up_to_twenty(count, language):
    items = [chat(f"question {i}", f"answer {i}", language) for i in range(count)]
    _, validation = split(items)
    assert (
        min(MIN_VALIDATION_EXAMPLES, count // 20) <= len(validation) <= max(MIN_VALIDATION_EXAMPLES, 3 * count // 100)
    )
    assert not split(items, 0)[1] and not split(items[:19])[1]


@pytest.mark.parametrize("question", [f"Hi {i}" for i in range(40)])
@pytest.mark.parametrize("count", [20, 25, 30, 300])
def test_chats_of_one_question_are_in_both_splits(question, count):
    training, validation = split([chat(question, f"answer {i}") for i in range(count)])
    assert len(validation) >= max(1, count // 20 - 1) and len(training) >= count - MAX_SAME_QUESTION - max(
        MIN_VALIDATION_EXAMPLES, count // 10
    )
    assert training


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 60), st.booleans()), min_size=1, max_size=60),
    st.sampled_from([0.0001, 0.01, 0.05]),
)
def test_a_twentieth_of_the_chats_up_to_twenty_is_held_out(questions, val_share):
    """For any numbers of chats to a question, in two languages, and never more than three twentieths and 20 more."""
    items = [
        chat(f"q{number}", f"a{number} {i}", "zh" if is_chinese else "en")
        for number, count, is_chinese in {q[0]: q for q in questions}.values()
        for i in range(count)
    ]
    training, validation = split(items, val_share)
    if len(items) >= 20:
        assert len(validation) >= min(20, len(items) // 20)
    # Hashes below --val_fraction are random: a group of 20 may be among them. The rule itself adds at most 2 * wanted.
    below = [item for item in items if item.split_hash < val_share * 2.0**64 or item.content_hash < val_share * 2.0**64]
    assert len(validation) <= len(below) + 2 * 2 * min(20, len(items) // 20)
    assert training or len(below) == len(items)


@given(st.lists(st.integers(1, 20), min_size=20, max_size=40), st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_chosen_chats_do_not_depend_on_the_order(counts, rng: random.Random):
    items = [chat(f"q{number}", f"a{i}") for number, count in enumerate(counts) for i in range(count)]
    expected = split(items)
    rng.shuffle(items)
    assert split(items) == expected


def test_chats_of_few_questions_have_a_validation_split():
    """The only chat of a question is not the whole split beside questions with more chats than are wanted."""
    items = [chat(f"question {i}", f"answer {j}") for i in range(12) for j in range(14)]
    items.append(chat("alone", "answer"))
    assert len(split(items, 1e-9)[1]) == 8


def test_a_question_with_few_answers_is_in_one_split():
    items = [chat(f"question {i}", f"answer {j}") for i in range(300) for j in range(5)]
    training, validation = split(items, 0.1)
    for i in range(300):
        assert sum(item.content_hash in validation for item in items[5 * i : 5 * i + 5]) in (0, 5)
    assert 0.05 < len(validation) / len(items) < 0.2 and training


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=300), st.sampled_from([0.0, 0.01, 0.3]), st.randoms())
def test_the_split_does_not_depend_on_row_order_unless_a_question_is_common(numbers, val_share, rng: random.Random):
    items = list({i: chat(f"q{i % 97}", f"a{i}", ("zh", "en")[i % 2]) for i in numbers}.values())
    expected = split(items, val_share)
    rng.shuffle(items)
    assert split(items, val_share) == expected
