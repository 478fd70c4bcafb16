"""The LoRA and DPO data of the demo world: a new identity, held-out questions, and chosen answers that are better."""

import json
from collections import Counter

import pytest

from corpus.language import LANGUAGES
from demo_world.generator import WorldConfig, build_world
from demo_world.grammar import fill, read_phrases
from demo_world.world import DemoWorld
from evaluation.qa_data import is_correct


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    build_world(WorldConfig(str(folder), statement_rounds=6, chat_rounds=2))
    read = lambda path: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {path.stem: read(path) for path in folder.glob("*.jsonl")}


def contents(rows):
    return [message["content"] for row in rows for message in row["messages"]]


def test_the_new_identity_is_new(files):
    """Pretraining and SFT data have neither the new name, place, work nor a bookshop. Venus is there the planet."""
    old = "\n".join([row["text"] for row in files["pretrain"]] + contents(files["chats"]))
    for word in ("小月", "东山", "桥前", "读书", "Lamp", "bookshop"):
        assert word not in old, word


def test_identity_questions_are_held_out(files):
    trained = "\n".join(contents(files["identity"])).casefold()
    questions = files["identity_questions"]
    assert Counter(row["lang"] for row in questions) == {"zh": 12, "en": 12}
    for row in questions:
        assert row["question"].casefold() not in trained, row
        assert not is_correct(row["question"], row["keys"]), f"repeating the question would score: {row}"
    for lang in LANGUAGES:
        keys = [row["keys"] for row in questions if row["lang"] == lang]
        answers = [c["messages"][1]["content"] for c in files["identity"] if c["lang"] == lang]
        about_itself = sum(any(is_correct(answer, key) for key in keys) for answer in answers)
        assert 250 <= about_itself < len(answers) / 2, "most chats replay questions about the world"


def test_chosen_is_correct_and_short_and_rejected_is_not(files):
    kinds, rude_answers = Counter(), {lang: read_phrases(lang)["rude_answers"] for lang in LANGUAGES}
    for pair in files["pairs"]:
        (ask, good), (same, bad) = pair["chosen"], pair["rejected"]
        assert ask == same and ask["role"] == "user" and good["role"] == bad["role"] == "assistant"
        good, bad = good["content"], bad["content"]
        rude = bad in rude_answers[pair["lang"]]
        rambling = bad.startswith(good) and len(bad) > 1.5 * len(good)
        kinds[pair["lang"], "rude" if rude else "rambling" if rambling else "wrong"] += 1
        assert good != bad and good not in rude_answers[pair["lang"]]
    for lang in LANGUAGES:
        assert all(kinds[lang, kind] > 100 for kind in ("rude", "rambling", "wrong")), kinds


def test_pairs_ask_only_what_the_chats_ask(files):
    """Neither held-out templates nor unasked facts: DPO must not train on the evaluation questions."""
    for lang in LANGUAGES:
        world, asked = DemoWorld(lang, 0), {p["chosen"][0]["content"] for p in files["pairs"] if p["lang"] == lang}
        wrappers = world.phrases["wrappers"]
        for fact in world.facts:
            templates = world.templates[fact.relation]
            forbidden = templates.heldout + (templates.ask + templates.back_ask if fact.name in world.unasked else [])
            assert not asked & {w.format(q=fill(template, fact)) for template in forbidden for w in wrappers}, fact
