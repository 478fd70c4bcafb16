"""Promises of the picture of answers: no text is lost, the question shown follows its rule, it is small."""

from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from demo_world.answers_picture import CLOSING, STAGES, chinese_fonts, columns, draw, pick, wrapped

CHARACTERS = st.sampled_from("ab 12+=.你好吗，。？“”")


def answers(correct):
    """{stage: three sets of two Chinese and two English questions}; correct: stage number, question -> bool."""
    return {
        stage: [
            [{"question": f"{lang} {i}?", "answer": "1+1=2.", "correct": correct(n, i), "lang": lang, "kind": ""}
             for lang in ("zh", "en") for i in range(2)]
            for _ in range(3)
        ]
        for n, stage in enumerate(STAGES)
    }  # fmt: skip


@given(st.text(CHARACTERS, max_size=60), st.integers(12, 30))
def test_lines_keep_every_character_and_their_width(text, width):
    lines = wrapped(text, width, max_lines=100).split("\n")
    assert "".join("".join(lines).split()) == "".join(text.split())
    # Quotation marks and words are not broken, so a line may be longer only if it is one piece.
    assert all(columns(line) <= width or " " not in line.strip() for line in lines)


@given(st.text(CHARACTERS, min_size=1, max_size=60))
def test_closing_punctuation_begins_no_line_after_a_character(text):
    first, *others = wrapped(text, 12, max_lines=100).split("\n")
    assert not [line for before, line in zip([first, *others], others, strict=False)
                if line[:1] in CLOSING and line and before[-1:] not in ("", " ", *CLOSING)]  # fmt: skip


def test_a_long_answer_is_cut():
    assert wrapped("one two three four", 5, max_lines=2) == "one \ntwo …"


def test_the_question_shown_is_the_first_that_is_wrong_first_and_right_last():
    assert pick(answers(lambda stage, i: i == 1 and stage > 0), 0, "zh") == 1
    assert pick(answers(lambda stage, i: i == 1 and stage > 0), 2, "en") == 3
    assert pick(answers(lambda stage, i: True), 0, "en") == 2


def test_a_small_picture_is_drawn(tmp_path):
    for lang in ("en", *(["zh"] if chinese_fonts() else [])):
        draw(answers(lambda stage, i: stage > i), [190.0, 84.0, 29.0, 18.0, 214.0], lang, tmp_path / "a.png")
        assert imread(tmp_path / "a.png").shape[1] > 1000 and (tmp_path / "a.png").stat().st_size < 150_000
