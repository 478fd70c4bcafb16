"""Promises of the picture of answers: no text is lost, the question shown follows its rule, it is small."""

from matplotlib.image import imread

from demo_world.answers_picture import STAGES, chinese_fonts, draw, pick, wrapped


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


def test_lines_are_broken_at_words_and_never_before_closing_punctuation():
    assert wrapped("“里”的反义词是“外”。", 12) == "“里”的反义\n词是“外”。"
    assert wrapped("一二三四五六。", 12) == "一二三四五\n六。"
    assert wrapped("The capital city of Sweden", 12) == "The capital \ncity of \nSweden"


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
