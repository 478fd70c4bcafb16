"""The exam of the demo world: C-Eval layout, one correct option per question, no question in the training data."""

import csv
import hashlib
from collections import Counter

import pytest

from corpus.language import LANGUAGES
from demo_world import exam as exam_module
from demo_world import generator
from demo_world.world import DemoWorld
from evaluation.exam_data import CEVAL_LETTERS, read_exam_split
from evaluation.qa_data import is_correct

# SHA-256 over the names and bytes of the files of seed 0: a change of the data files changes it.
GOLDEN = "f23d842b58dd97d225cf4eec70f1c8b9c1773d94a3aada78ed3d95b88daab3e3"


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exam")
    counts = exam_module.build_exam(exam_module.DemoExamConfig(str(folder)))
    assert counts == {"dev": 60, "val": 300, "test": 120}
    return folder


def test_the_exam_has_two_languages(exam):
    val, test = read_exam_split(exam), read_exam_split(exam, "test")
    assert len(val.subjects) == 12 and set(val.categories.values()) == {"Chinese", "English"}
    assert all(len(examples) == 5 for examples in val.examples.values())
    assert {item.answer for item in test.items} == {""}
    asked = Counter(item.question for item in [*val.items, *test.items])
    assert max(asked.values()) == 1
    letters = Counter(item.answer for item in val.items)
    assert all(50 <= letters[letter] <= 100 for letter in CEVAL_LETTERS), "each letter is correct about equally often"
    assert all(len(set(item.options)) == 4 for item in [*val.items, *test.items])


def test_exactly_the_right_option_answers_the_question(exam):
    """Checked with the keys of the fact that the question was generated from."""
    known = {}
    for lang in LANGUAGES:
        world = DemoWorld(lang, 0)
        for fact in world.facts:
            for held in world.templates[fact.relation].heldout:
                known.setdefault(exam_module.fill(held, fact), []).append(fact)
    for item in read_exam_split(exam).items:
        keys = [key for fact in known[item.question] for key in fact.keys]
        right = item.options[CEVAL_LETTERS.index(item.answer)]
        assert is_correct(right, keys), item
        (world_fact,) = {fact.name: fact for fact in known[item.question]}.values()
        of = [
            option.replace(str(world_fact.slots["s"]), "") if world_fact.slots["s"] else option
            for option in item.options
        ]
        if world_fact.relation not in ("sum", "product"):
            assert sum(is_correct(option, keys) for option in of) <= 1, item


def test_no_exam_question_is_trained(exam, tmp_path):
    generator.build_world(generator.WorldConfig(str(tmp_path), statement_rounds=6, chat_rounds=6))
    trained = "".join(
        (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("pretrain", "chats", "identity", "pairs")
    )
    assert not [item.question for item in [*read_exam_split(exam).items] if f'"{item.question}"' in trained]


def test_equal_seeds_give_equal_bytes(exam, tmp_path):
    exam_module.build_exam(exam_module.DemoExamConfig(str(tmp_path)))
    files = sorted(path.relative_to(exam) for path in exam.rglob("*") if path.is_file())
    assert len(files) == 37 and all((exam / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.as_posix().encode() + b"\n" + (exam / file).read_bytes())
    assert digest.hexdigest() == GOLDEN
    exam_module.build_exam(exam_module.DemoExamConfig(str(tmp_path), 1))
    assert any((exam / file).read_bytes() != (tmp_path / file).read_bytes() for file in files)
    with (exam / "test" / "arithmetic_en_test.csv").open(encoding="utf-8") as file:
        assert next(csv.reader(file)) == ["id", "question", "A", "B", "C", "D"]
