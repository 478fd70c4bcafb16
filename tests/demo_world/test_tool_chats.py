"""Chats with a calculator and thoughts: right results, valid calls, and numbers and wordings in one file only."""

import json
import re

import pytest
from jsonschema import validate

from corpus.language import LANGUAGES
from corpus.tokenizer_training import train_tokenizer
from demo_world.generator import CALCULATOR, WorldConfig, build_world
from demo_world.tool_chats import OFFER, ToolChatsConfig, build_tool_chats, thought_of
from evaluation.qa_data import is_correct
from evaluation.tools import run_tool
from model.answer_parts import ToolCall
from model.tokenizer import SPARE_TOKENS, SPECIAL_TOKENS, save_tokenizer
from tests.helpers import read_jsonl
from trainer.reward_text import agrees

FILES = ("chats", "prompts", "arithmetic", "calculator")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    build_tool_chats(ToolChatsConfig(str(folder)))
    return {name: read_jsonl(folder / f"{name}.jsonl") for name in FILES}


def calculations(files):
    """(question, call, result, answer) of every call in the chats."""
    for row in files["chats"]:
        messages = row["messages"]
        for i, message in enumerate(messages):
            for call in message.get("tool_calls", ()):
                yield messages[i - 1], call["function"], messages[i + 1], messages[i + 2]


def messages_of(files):
    return [row["messages"] for row in files["chats"] if row["messages"][0]["role"] == "user"]


def numbers(text):
    return tuple(map(int, re.findall(r"\d+", text)))


def sums(files):
    """The sums of three terms of the chats: (question, thought, answer)."""
    for row in files["chats"]:
        if row["messages"][-1].get("reasoning_content"):
            question, answer = row["messages"]
            yield question["content"], answer["reasoning_content"], answer["content"]


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        counts = build_tool_chats(ToolChatsConfig(str(tmp_path / name), seed, tool_chats=5, sums=5, replay=5))
        assert counts.keys() == set(FILES)
    for file in FILES:
        one, again, other = ((tmp_path / name / f"{file}.jsonl").read_bytes() for name in ("one", "again", "other"))
        assert one == again != other


def test_calls_fit_the_schema_and_results_are_those_of_the_tool(files):
    found = list(calculations(files))
    assert len(found) > 1000
    for question, call, result, answer in found:
        validate(call["arguments"], CALCULATOR.schema["function"]["parameters"])
        assert call["name"] == CALCULATOR.name and result["role"] == "tool"
        assert result["content"] == run_tool(ToolCall(**call), [CALCULATOR])
        asked, terms = numbers(question["content"]), numbers(call["arguments"]["expression"])
        assert sorted(asked) == sorted(terms) and numbers(answer["content"]) == (*terms, int(result["content"]))
    operators = {re.sub(r"\d", "", call["arguments"]["expression"]) for _, call, _, _ in found}
    assert operators == {"+", "-", "*"}


def test_thoughts_end_with_the_answer(files):
    assert thought_of(8, 7, 15) == "8+7=15, 15+15=30"
    found = list(sums(files))
    assert len(found) > 500
    for question, thought, answer in found:
        a, b, c = numbers(question)
        assert thought == f"{a}+{b}={a + b}, {a + b}+{c}={a + b + c}" and numbers(answer) == (a, b, c, a + b + c)


def test_terms_of_a_sum_are_in_one_file_in_any_order(files):
    chats = {tuple(sorted(numbers(question))) for question, _, _ in sums(files)}
    prompts, held_out = (
        {terms for row in files[name] if len(terms := tuple(sorted(numbers(row["question"])))) == 3}
        for name in ("prompts", "arithmetic")
    )
    assert not chats & prompts and not chats & held_out and not prompts & held_out
    assert {len(chats), len(held_out)} == {150} and len(prompts) > 400
    assert all(max(terms[:2]) <= 10 and terms[2] <= 20 for terms in chats | prompts | held_out)


def test_prompts_are_rewarded_for_right_answers(files):
    """Half of them are about the world; the reward accepts the answers that SFT trains."""
    of_sums = [row for row in files["prompts"] if len(numbers(row["question"])) == 3]
    assert 0.4 < len(of_sums) / len(files["prompts"]) < 0.6
    for row in of_sums:
        assert int(row["answer"]) == sum(numbers(row["question"]))
    trained = {m[i]["content"]: m[i + 1]["content"] for m in messages_of(files) for i in range(0, len(m) - 1, 2)}
    known = [row for row in files["prompts"] if row not in of_sums and row["question"] in trained]
    assert len(known) > 300 and all(agrees(trained[row["question"]], row["answer"]) for row in known)


def test_large_numbers_of_the_questions_are_in_no_chat(files):
    trained = {n for question, _, _, _ in calculations(files) for n in numbers(question["content"])}
    asked = {n for row in files["calculator"] for n in numbers(row["question"])}
    assert not trained & asked and min(trained | asked) >= 100 and len(asked) > 100


def test_no_held_out_wording_is_trained(files):
    def wording(text):
        return re.sub(r"\d+", "0", text).casefold()

    trained = {wording(m["content"]) for row in files["chats"] for m in row["messages"] if m["role"] == "user"}
    trained |= {wording(row["question"]) for row in files["prompts"]}
    for row in files["arithmetic"] + files["calculator"]:
        assert not [text for text in trained if wording(row["question"]) in text], row


def test_keys_are_right_and_no_part_of_the_question(files):
    for row in files["arithmetic"] + files["calculator"]:
        (key,), terms = row["keys"], numbers(row["question"])
        right = {"difference": abs(terms[0] - terms[1]), "product": terms[0] * terms[1]}
        assert int(key) == right.get(row["kind"], sum(terms))
        assert not is_correct(row["question"], row["keys"]), "repeating the question must not score"


def test_both_languages_and_ordinary_chats(files):
    for name, rows in files.items():
        counts = [sum(row["lang"] == lang for row in rows) for lang in LANGUAGES]
        assert sum(counts) == len(rows) and abs(counts[0] - counts[1]) < 0.1 * len(rows), name
    plain = [row for row in files["chats"] if len(row["messages"]) == 2 and "reasoning" not in json.dumps(row)]
    assert len(plain) == 2 * ToolChatsConfig.replay
    offered = [row["messages"] for row in files["chats"] if row["messages"][0]["role"] == "system"]
    without_call = [m for messages in offered for m in messages if m["role"] == "assistant" and m["content"]]
    digits = [
        m[i] for m in offered for i in range(1, len(m) - 1) if m[i]["role"] == "user" and numbers(m[i]["content"])
    ]
    assert len(digits) == len(list(calculations(files))), "with the tool it computes all results"
    assert len(offered) == 2 * ToolChatsConfig.tool_chats and len(without_call) > len(list(calculations(files))), (
        "some questions need no tool"
    )


def test_a_prompt_with_the_calculator_is_short(tmp_path):
    """The tokenizer of the demo knows the words of the text around the schema: without them 342 tokens."""
    build_world(WorldConfig(str(tmp_path), statement_rounds=4, chat_rounds=2))
    texts = [row["text"] for row in read_jsonl(tmp_path / "words.jsonl")]
    tokenizer = save_tokenizer(
        train_tokenizer("bpe", texts, 5120, (*SPECIAL_TOKENS, *SPARE_TOKENS)), tmp_path / "tok", "chatml"
    )
    messages = [OFFER, {"role": "user", "content": "What is 171+358?"}]
    assert len(tokenizer.render(messages, add_generation_prompt=True)[0]) < 160
