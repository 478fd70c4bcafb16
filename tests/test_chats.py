"""Promise: every usual chat format becomes the same messages, and what cannot teach is refused with its reason."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.chats import chat_text, is_chat, normalise_chat, whole_turns
from corpus.report import BadRow

TURNS = [("user", "你好"), ("assistant", "您好！"), ("user", "1+1?"), ("assistant", "2")]
CHAT = [{"role": role, "content": content} for role, content in TURNS]
SYSTEM = {"role": "system", "content": "Be brief."}
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": content} for role, content in TURNS]
LAST = {"q": "1+1?", "a": "2"}


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
def test_every_format_gives_the_same_messages(row):
    assert is_chat(row) and normalise_chat(row) == CHAT


def test_details_of_the_formats():
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
        ({"messages": ["hello"]}, "a message is not an object"),
        ({"messages": [{"content": "hello"}]}, "a message without a role"),
        ({"messages": [{"role": "cat", "content": "miaow"}]}, "unknown role 'cat'"),
        ({"messages": [{"role": "user", "content": ""}]}, "user message is empty"),
        ({"messages": [{"role": "user", "content": 5}]}, "user message is a number, not a string"),
        ({"messages": [{"role": "user", "content": None}]}, "user message is null"),
        ({"messages": [{"role": "user", "content": "\0"}]}, "NUL character in user message"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "malformed UTF-8 in user message"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a message with parts that are not text"),
        ({"messages": CHAT[1:]}, "the assistant speaks first"),
        ({"messages": [*CHAT[:2], SYSTEM, *CHAT[2:]]}, "a system message after the start"),
        ({"messages": [CHAT[0], CHAT[0]]}, "two messages of one role in a row"),
        ({"messages": [*CHAT, CHAT[1]]}, "two messages of one role in a row"),
        ({"q": 5, "a": "x"}, "q is a number, not a string"),
        ({"q": "x", "a": " "}, "a is empty"),
        ({"history": "[['a']]", **LAST}, "history is not a list of [question, answer] pairs"),
        ({"history": "[['a', 3]]", **LAST}, "history is a number, not a string"),
        ({"history": {"a": "b"}, **LAST}, "history is not a list"),
        ({"history": "__import__('os').system('false')", **LAST}, "history is neither JSON nor a Python list"),
        ({"history": "[" * 5000, **LAST}, "history is neither JSON nor a Python list"),
        ({"history": "-" * 50_000 + "1", **LAST}, "history is neither JSON nor a Python list"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, "input is a list, not a string"),
    ],
)
def test_what_cannot_teach_is_refused_with_its_reason(row, reason):
    with pytest.raises(BadRow) as error:
        normalise_chat(row)
    assert str(error.value) == reason


def test_whole_turns_end_with_an_answer():
    assert whole_turns(CHAT) == CHAT
    assert whole_turns(CHAT[:3]) == CHAT[:2]
    assert whole_turns([SYSTEM, CHAT[0]]) == []
    assert chat_text(CHAT[:2]) == "你好\n您好！"


KEYS = st.sampled_from(
    ["messages", "role", "content", "from", "value", "q", "a", "history", "system", "input", "instruction"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_random_rows_give_messages_or_a_reason(row):
    try:
        messages = normalise_chat(row)
    except BadRow:
        return
    roles = [m["role"] for m in messages if m["role"] != "system"]
    assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))] and all(m["content"] for m in messages)
