"""Promise: every supported chat layout gives the same messages; an untrainable row is rejected with its reason."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.chats import chat_text
from corpus.row_text import DEFAULT_READER
from corpus.stats import BadRow, DroppedRow
from corpus.turn_rules import CUT_AT_EMPTY, JOINED_ROLES, WITHOUT_OPENING, trim_unanswered

TURNS = [("user", "你好"), ("assistant", "您好！"), ("user", "1+1?"), ("assistant", "2")]
CHAT = [{"role": role, "content": content} for role, content in TURNS]
SYSTEM = {"role": "system", "content": "Be brief."}
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": content} for role, content in TURNS]
LAST = {"q": "1+1?", "a": "2"}


def normalise_chat(row):
    return DEFAULT_READER.read_chat(row).messages


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"conversations": CHAT, "source": "somewhere", "id": 3},
        {"conversation": [dict(message, weight=1, name=None) for message in CHAT]},
        {"messages": [{**message, "role": message["role"].upper()} for message in CHAT]},
        {"messages": [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in CHAT]},
        {"messages": [{"role": "system", "content": ""}, *CHAT]},
        {"conversations": SHAREGPT},
        {"conversations": SHAREGPT, "system": ""},
        {"conversations": str(SHAREGPT)},
        {"messages": None, "question": "1+1?", "answer": "2", "history": [["你好", "您好！"]]},
        {"instruction": "1+1?", "input": "", "output": "2", "history": [["你好", "您好！"]], "system": None},
        {"instruction": "1+1?", "output": "2", "history": [("你好", "您好！")]},
        {"history": '[["你好", "您好！"]]', **LAST},
        {"history": "[['你好', '您好！']]", **LAST},
        {"history": "[('你好', '您好！')]", **LAST},
        {"history": [["你好", "您好！"]], "prompt": "1+1?", "response": "2"},
    ],
)
def test_every_chat_layout_gives_the_same_messages(row):
    assert normalise_chat(row) == CHAT


def test_roles_spelling_and_nesting_of_turns_are_normalised():
    assert normalise_chat({"messages": [SYSTEM, *CHAT]}) == [SYSTEM, *CHAT]
    assert normalise_chat({"conversations": SHAREGPT, "system": "Be brief."}) == [SYSTEM, *CHAT]
    assert normalise_chat({"messages": [SYSTEM, *CHAT], "system": "Another."}) == [SYSTEM, *CHAT]
    alpaca = {"instruction": "Translate.", "input": "猫", "output": "cat", "system": "Be brief."}
    asked = {"role": "user", "content": "Translate.\n猫"}
    assert normalise_chat(alpaca) == [SYSTEM, asked, {"role": "assistant", "content": "cat"}]
    for empty in (None, "", "[]", " ", float("nan"), []):
        assert len(normalise_chat({"history": empty, **LAST})) == 2
    marker = {"q": "what is <|im_end|>?", "a": "a marker"}
    assert normalise_chat(marker)[0]["content"] == "what is <|im_end|>?"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "plain text, not a chat"),
        ({"text": "a"}, "none of the keys of a chat"),
        ({"instruction": "a"}, "none of the keys of a chat"),
        ({"messages": None}, "the list of messages is null"),
        ({"messages": []}, "no messages"),
        ({"messages": [SYSTEM]}, "no messages"),
        ({"messages": 5}, "the messages are not a list"),
        ({"messages": "hello"}, "the list of messages is neither JSON nor a Python list"),
        ({"messages": [5]}, "a message is not an object"),
        ({"messages": [{"content": "hello"}]}, "a message without a role"),
        ({"messages": [{"role": "cat", "content": "miaow"}]}, "unknown role 'cat'"),
        ({"messages": [{"role": "user", "content": ""}]}, "user message is empty"),
        ({"messages": [{"role": "user", "content": True}]}, "user message is true/false, not a string"),
        ({"messages": [{"role": "user", "content": None}]}, "user message is null"),
        ({"messages": [{"role": "user", "content": "\0"}]}, "NUL character in user message"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "malformed UTF-8 in user message"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a message with parts that are not text"),
        ({"q": True, "a": "x"}, "q is true/false, not a string"),
        ({"q": "x", "a": None}, "a is null"),
        ({"q": " ", "a": "x"}, "q is empty"),
        ({"history": "[['a']]", **LAST}, "history is not a list of [question, answer] pairs"),
        ({"history": "[['a', True]]", **LAST}, "history is true/false, not a string"),
        ({"history": {"a": "b"}, **LAST}, "history is not a list"),
        ({"history": "__import__('os').system('false')", **LAST}, "history is neither JSON nor a Python list"),
        ({"history": "[" * 5000, **LAST}, "history is neither JSON nor a Python list"),
        ({"history": "-" * 50_000 + "1", **LAST}, "history is neither JSON nor a Python list"),
        ({"instruction": "a", "input": [5], "output": "c"}, "input is a list, not a string"),
        ({"chosen": "a", "rejected": "b"}, "a pair of answers: data_process.py dpo reads it"),
        (
            {"instruction": "a", "output": ["b", "c"]},
            "several answers in output: data_process.py dpo reads ranked ones",
        ),
    ],
)
def test_untrainable_rows_are_rejected_with_a_reason(row, reason):
    with pytest.raises(BadRow) as error:
        normalise_chat(row)
    assert str(error.value) == reason


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("messages", "result", "change"),
    [
        ([turn("developer", "Be brief."), *CHAT], [SYSTEM, *CHAT], None),
        ([turn("system", "Be"), turn("system", "brief."), *CHAT], [turn("system", "Be\nbrief."), *CHAT], JOINED_ROLES),
        ([turn("assistant", "Ask me."), *CHAT], CHAT, WITHOUT_OPENING),
        ([SYSTEM, turn("assistant", "Ask me."), *CHAT], [SYSTEM, *CHAT], WITHOUT_OPENING),
        ([turn("user", "你"), turn("user", "好"), CHAT[1]], [turn("user", "你\n好"), CHAT[1]], JOINED_ROLES),
        ([*CHAT, turn("assistant", "!")], [*CHAT[:3], turn("assistant", "2\n!")], JOINED_ROLES),
        ([turn("user", " "), *CHAT], CHAT, None),
        ([*CHAT[:3], turn("assistant", "")], CHAT[:2], CUT_AT_EMPTY),
        ([*CHAT[:2], turn("user", None), turn("assistant", "x")], CHAT[:2], CUT_AT_EMPTY),
        ([*CHAT[:2], turn("user", "x"), turn("assistant", " "), *CHAT[:2]], CHAT[:2], CUT_AT_EMPTY),
        ([CHAT[0], turn("assistant", "您好！", weight=0), *CHAT[2:]],
         [CHAT[0], turn("assistant", "您好！", weight=0), *CHAT[2:]], None),
        ([CHAT[0], turn("assistant", "您好！", train=False), *CHAT[2:]],
         [CHAT[0], turn("assistant", "您好！", weight=0), *CHAT[2:]], None),
    ],
)  # fmt: skip
def test_every_turn_rule_is_applied_and_reported(messages, result, change):
    content = DEFAULT_READER.read_chat({"messages": messages})
    assert content.messages == result and content.changes == ([change] if change else [])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"q": "x", "a": " "}, "an empty answer"),
        ({"messages": [CHAT[0], turn("assistant", "")]}, "an empty answer"),
        ({"messages": [CHAT[1]]}, "only assistant messages"),
        ({"messages": [*CHAT[:2], SYSTEM, *CHAT[2:]]}, "a system message after the start"),
        ({"messages": [CHAT[0], turn("tool", "{}"), CHAT[1]]}, "a tool result that follows no call"),
        ({"prompt": "x", "completion": "y", "label": False}, "an answer that is marked as bad (label is false)"),
        ({"prompt": "x", "completion": "y", "label": 0}, "an answer that is marked as bad (label is false)"),
        ({"messages": CHAT, "kto_tag": "False"}, "an answer that is marked as bad (kto_tag is false)"),
        ({"messages": CHAT, "weight": 0}, "a row with weight 0"),
        ({"messages": [turn("user", [{"type": "image_url", "image_url": "x"}]), CHAT[1]]},
         "a message with parts that are not text"),
    ],
)  # fmt: skip
def test_untrainable_rows_are_dropped_with_a_reason(row, reason):
    with pytest.raises(DroppedRow) as error:
        DEFAULT_READER.read_chat(row)
    assert str(error.value) == reason


def test_unknown_keys_are_reported():
    answer = turn("assistant", "2", reasoning_content="One and one.", tools=None, tool_calls=None, mood="glad")
    content = DEFAULT_READER.read_chat({"messages": [CHAT[2], answer], "id": 7, "remark": "easy", "empty": ""})
    assert content.messages == [CHAT[2], {**CHAT[3], "reasoning_content": "One and one."}]
    assert content.changes == [] and content.unused == ["remark", "messages.mood"]


def test_trim_unanswered_ends_with_an_answer():
    assert trim_unanswered(CHAT) == CHAT
    assert trim_unanswered(CHAT[:3]) == CHAT[:2]
    assert trim_unanswered([SYSTEM, CHAT[0]]) == []
    assert chat_text(CHAT[:2]) == "你好\n您好！"


KEYS = st.sampled_from(
    ["messages", "role", "content", "from", "value", "q", "a", "history", "system", "input", "instruction", "chosen",
     "rejected", "human", "assistant", "label", "weight", "text", "completion", "data"]
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=9) | st.sampled_from(["user", "assistant", "tool"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_random_rows_give_messages_or_a_reason(row):
    try:
        messages = DEFAULT_READER.read_chat(row).messages
    except BadRow:
        return
    roles = [m["role"] for m in messages if m["role"] not in ("system", "tool")]
    assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))]
    assert all(m["content"] or m["role"] == "tool" or m.get("tool_calls") for m in messages)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_cleaning_reads_every_row_that_training_reads(row):
    read = []
    for command in (DEFAULT_READER.read_text, DEFAULT_READER.read_chat, DEFAULT_READER.read_pair):
        with contextlib.suppress(BadRow):
            read.append(command(row))
    if not read:
        with pytest.raises(BadRow):
            DEFAULT_READER.read_content(row)
        return
    everything = DEFAULT_READER.read_content(row).text
    for content in read:
        turns = [*content.messages, *(turn for answer in content.answers for turn in answer)]
        assert all(text in everything for text in [turn["content"] for turn in turns] or [content.text])
