"""Rows with tools, calls, results and thoughts: every layout gives the same messages, and nothing is lost silently.

Promises: each layout below is read as CHAT; what cannot be read is bad or dropped with a reason; a chat is never cut
between a call and its results; the rows that data_process.py writes are read as they were; cleaning edits texts and
keeps tools and calls.
"""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus.chats import chat_text
from corpus.data_config import DpoDataConfig
from corpus.examples import ChatExample, messages_hash
from corpus.read_examples import read_chat_examples
from corpus.render_chats import count_answer_bytes, render_chat_examples
from corpus.row_text import DEFAULT_READER
from corpus.stats import BadRow, DataStats, DroppedRow
from corpus.tool_turns import FROM_SYSTEM_TEXT
from corpus.turn_rules import first_turns
from tests.model.test_chatml_tools import CLOCK, bot, chats, result, system, user
from tests.model.test_jinja_template import prepare

LOOK = {
    "name": "look",
    "description": "找东西",
    "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
}
TOOL = {"type": "function", "function": LOOK}
CALL = {"name": "look", "arguments": {"x": "笔"}}
CHAT = [system("Be kind.", TOOL), user("Where?"), bot("", ("look", {"x": "笔"})), result("desk"), bot("On the desk.")]
NO_SYSTEM = [system("", TOOL), *CHAT[1:]]
OPENAI = {"id": "1", "type": "function", "function": {"name": "look", "arguments": json.dumps(CALL["arguments"])}}
HERMES = ("You are a function calling AI model. You are provided with function signatures within <tools></tools> XML "
          "tags. Don't make assumptions.\n<tools> {tools} </tools>\nFor each function call return a json object:\n"
          "<tool_call>\n{'arguments': <args-dict>, 'name': <function-name>}\n</tool_call>")  # fmt: skip


def text(value):
    return json.dumps(value, ensure_ascii=False)


def sharegpt(*turns, **more):
    return {"conversations": [{"from": role, "value": value} for role, value in turns], **more}


def placeholders(turn):
    """A turn of a dataset in which every turn has every key."""
    return {"reasoning_content": "", "tools": "", "tool_calls": "", **turn}


LAYOUTS = {
    "OpenAI": ({"messages": [user("Where?"), bot("") | {"content": None, "tool_calls": [OPENAI]},
                             result("desk") | {"tool_call_id": "1", "name": "look"}, CHAT[-1]], "tools": [TOOL]},
               NO_SYSTEM),
    "function_call": ({"messages": [user("Where?"), bot("") | {"function_call": OPENAI["function"]},
                                    {"role": "function", "name": "look", "content": "desk"}, CHAT[-1]],
                       "functions": [LOOK]}, NO_SYSTEM),
    "ShareGPT": (sharegpt(("human", "Where?"), ("function_call", text(CALL)), ("observation", "desk"),
                          ("gpt", "On the desk."), system="Be kind.", tools=text([LOOK])), CHAT),
    "minimind": ({"conversations": [placeholders(system("Be kind.") | {"tools": text([TOOL])}),
                                    placeholders(user("Where?")), placeholders(bot("") | {"tool_calls": text([CALL])}),
                                    placeholders(result("desk")), placeholders(CHAT[-1])]}, CHAT),
    "Hermes": (sharegpt(("system", HERMES.replace("{tools}", text([TOOL]))), ("human", "Where?"),
                        ("gpt", f"<tool_call>\n{CALL}\n</tool_call>\n"),
                        ("tool", "<tool_response>\ndesk\n</tool_response>\n"), ("gpt", "On the desk.")), NO_SYSTEM),
    "xLAM": ({"query": "Where?", "tools": text([LOOK]), "answers": text([CALL])}, NO_SYSTEM[:3]),
    "result as JSON": ({"messages": [user("?"), bot("") | {"tool_calls": [CALL]}, result({"a": [1]}), bot("1")]},
                       [user("?"), bot("", ("look", {"x": "笔"})), result('{"a": [1]}'), bot("1")]),
    "calls one by one": (sharegpt(("human", "?"), ("gpt", "Well."), ("function_call", text(CALL)),
                                  ("function_call", text([CALL])), ("observation", "1"), ("observation", "")),
                         [user("?"), bot("Well.", *[("look", {"x": "笔"})] * 2), result("1"), result("")]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_messages(name):
    row, messages = LAYOUTS[name]
    content = DEFAULT_READER.read_chat(row)
    assert content.messages == messages and not content.unused
    assert content.changes == [FROM_SYSTEM_TEXT] * (name == "Hermes")
    assert DEFAULT_READER.read_chat({"messages": content.messages}).messages == messages, "read again"


def test_a_rendered_chat_is_read_back(tokenizer):
    """Qwen's layout: the contents of a chat that a chat template has rendered."""
    for chat in (CHAT, [*NO_SYSTEM[:4], bot("ok", thought="desk\n\nis there")], [*CHAT[:3], result("a"), result("b")]):
        turns = tokenizer.format.text(chat).split("<|im_start|>")[1:]
        pairs = [turn.removesuffix("<|im_end|>\n").split("\n", 1) for turn in turns]
        row = {"messages": [{"role": role, "content": content} for role, content in pairs]}
        content = DEFAULT_READER.read_chat(row)
        assert content.messages == chat and content.changes == [FROM_SYSTEM_TEXT]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"q": "1+1", "a": "<think>\none\n</think>\n\n2"}, [user("1+1"), bot("2", thought="one")]),
        ({"q": "1+1", "a": "<think>\n\n</think>\n\n2"}, [user("1+1"), bot("2", thought="")]),
        ({"messages": [user("1+1"), bot("2") | {"reasoning": "one"}]}, [user("1+1"), bot("2", thought="one")]),
        ({"messages": [user("1+1"), bot("2", thought="")]}, [user("1+1"), bot("2", thought="")]),
        ({"messages": [placeholders(user("1+1")), placeholders(bot("2"))]}, [user("1+1"), bot("2")]),
        (sharegpt(("human", "?"), ("function_call", f"<think>\nso\n</think>\n\n{text(CALL)}")),
         [user("?"), bot("", ("look", {"x": "笔"}), thought="so")]),
        ({"q": "What is <think>?", "a": "A marker: <think>x</think>"}, [user("What is <think>?"),
                                                                       bot("A marker: <think>x</think>")]),
        ({"q": "<tool_response>", "a": "<tool_call>x</tool_call>"}, [user("<tool_response>"),
                                                                     bot("<tool_call>x</tool_call>")]),
        ({"q": "?", "a": "<think>never closed"}, [user("?"), bot("<think>never closed")]),
    ],
)  # fmt: skip
def test_thoughts_are_read_and_other_markers_stay_text(row, messages):
    assert DEFAULT_READER.read_chat(row).messages == messages


@pytest.mark.parametrize(
    ("turns", "kind", "reason"),
    [
        ([user("?"), result("x"), bot("y")], DroppedRow, "a tool result that follows no call"),
        ([user("?"), bot("y"), result("x"), bot("y")], DroppedRow, "a tool result that follows no call"),
        ([user("?"), bot("", ("look", {})), bot("y")], DroppedRow, "text after a tool call"),
        ([CHAT[0], user("?"), bot("<tool_call>{}</tool_call> y")], DroppedRow, "text after a tool call"),
        ([CHAT[0], user("?"), bot("<tool_call>{}</tool_call>")], BadRow, "a tool call without a name"),
        ([CHAT[0], user("?"), bot("<tool_call>look</tool_call>")], BadRow, "tool calls are not a JSON list"),
        ([user("?"), bot("") | {"tool_calls": [{"id": "1"}]}], BadRow, "a tool call without a name"),
        ([user("?"), bot("") | {"tool_calls": [{"name": "f", "arguments": "x"}]}], BadRow,
         "the arguments of a tool call are not a JSON object"),
        ([user("?"), bot("") | {"tool_calls": [{"name": "f", "arguments": {"x": float("nan")}}]}], BadRow,
         "a tool call is not JSON"),
        ([user("?"), bot("") | {"tool_calls": [{"name": "f", "arguments": {"x": "\ud800"}}]}], BadRow,
         "malformed UTF-8 in a tool call"),
        ([user("?") | {"tool_calls": [CALL]}, bot("y")], BadRow, "tool_calls in a user message"),
        ([user("?") | {"tools": [TOOL]}, bot("y")], BadRow, "tools in a user message"),
        ([system("") | {"tools": "x"}, user("?"), bot("y")], BadRow, "tools are not a JSON list"),
        ([system("") | {"tools": [{"function": {}}]}, user("?"), bot("y")], BadRow, "a tool without a name"),
        ([user("?"), bot("y") | {"reasoning_content": ["x"]}], BadRow, "reasoning_content is a list, not a string"),
        ([user("?"), bot("", thought="t")], DroppedRow, "an empty answer"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_has_a_reason(turns, kind, reason):
    with pytest.raises(kind) as error:
        DEFAULT_READER.read_chat({"messages": turns})
    assert str(error.value) == reason and type(error.value) is kind


def test_a_chat_is_cut_at_an_empty_message_with_its_results():
    content = DEFAULT_READER.read_chat({"messages": [*CHAT[:4], bot("")]})
    assert content.messages == CHAT[:4] and content.changes == ["cut before an empty message"]
    assert [first_turns(CHAT + CHAT[1:], end) for end in (0, 2, 4, 5, 7, 9)] == [
        [], [], [], CHAT, CHAT, CHAT + CHAT[1:]
    ]  # fmt: skip


def test_statistics_and_hashes_count_all_parts():
    thinking = [user("1+1"), bot("2", thought="one and one")]
    assert (
        chat_text(thinking) == "1+1\none and one\n2" and "look" in chat_text(CHAT) and "找东西" not in chat_text(CHAT)
    )
    assert count_answer_bytes(thinking) == len("<think>\none and one\n</think>\n\n2")
    hashes = {messages_hash(chat) for chat in (thinking, [user("1+1"), bot("2")], [user("1+1"), bot("2", thought="")])}
    assert len(hashes) == 3
    assert messages_hash([user("1"), bot("2")]) == messages_hash([dict(m) for m in (user("1"), bot("2"))])


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(chat=chats(markers=False), fraction=st.floats(0.05, 1.1))
def test_a_chat_that_is_too_long_keeps_whole_turns(tokenizer, chat, fraction):
    """Every document fits, and the documents are those of the longest run of turns whose documents all fit."""
    whole = tokenizer.render_each([chat])[0].samples
    limit = int(fraction * max(len(sample.ids) for sample in whole))
    stats = DataStats()
    (documents,) = render_chat_examples([ChatExample(chat, chat_text(chat), file="a", line=1)], tokenizer, limit, stats)
    ends = [*(i for i, message in enumerate(chat) if message["role"] == "user"), len(chat)][1:]
    fitting = [[]]
    for end in ends:
        samples = tokenizer.render_each([chat[:end]])[0].samples
        if all(len(sample.ids) <= limit for sample in samples):
            fitting.append([(sample.ids, sample.mask) for sample in samples])
    assert [(ids, mask) for ids, mask, _ in documents] == fitting[-1]
    assert stats.kept == bool(documents) and (bool(documents) or stats.dropped_rows == 1)


def test_prepared_data_trains_calls_and_thoughts_and_is_read_again(tokenizer, tmp_path):
    chat = [*CHAT[:4], bot("On the desk.", thought="So."), user("Thanks"), bot("Bye", thought="")]
    report, _, rows = prepare(tmp_path, tokenizer, [chat, CHAT], 2048)
    assert report.kept == 2 and report.dropped_rows == 0 and len(rows) == 3
    trained = [tokenizer.decode(ids[mask == 1].tolist()) for ids, mask in rows]
    call = '<tool_call>\n{"name": "look", "arguments": {"x": "笔"}}\n</tool_call><|im_end|>'
    assert sorted(trained) == sorted([
        call + "<think>\nSo.\n</think>\n\nOn the desk.<|im_end|>",
        "<think>\n\n</think>\n\nBye<|im_end|>",
        call + "On the desk.<|im_end|>",
    ])  # fmt: skip
    path = tmp_path / "out" / "train.jsonl"
    stored = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["messages"] for row in stored] == [chat, CHAT]
    assert [ChatExample.from_row(row, "x", 1).messages for row in stored] == [chat, CHAT]
    assert [example.messages for example in read_chat_examples([path], DataStats())] == [chat, CHAT]


def test_pairs_may_have_tools_and_thoughts(tokenizer, tmp_path):
    """The mask covers calls, thoughts and the answer after the prompt, and no result."""
    row = {"prompt": CHAT[:2], "chosen": CHAT[2:], "rejected": [bot("No idea.", thought="Hm.")]}
    (tmp_path / "p.jsonl").write_text(text(row) + "\n", encoding="utf-8")
    _, _, rows = prepare(tmp_path, tokenizer, tmp_path / "p.jsonl", 2048, DpoDataConfig)
    trained = [tokenizer.decode(ids[mask == 1].tolist()) for ids, mask in rows]
    assert trained == [
        '<tool_call>\n{"name": "look", "arguments": {"x": "笔"}}\n</tool_call><|im_end|>On the desk.<|im_end|>',
        "<think>\nHm.\n</think>\n\nNo idea.<|im_end|>",
    ]
    assert all(tokenizer.decode(ids.tolist()).startswith("<|im_start|>system\nBe kind.\n\n# Tools") for ids, _ in rows)


@pytest.mark.parametrize("name", LAYOUTS)
def test_cleaning_keeps_tools_and_calls(name):
    row, messages = LAYOUTS[name]
    edited = DEFAULT_READER.edit_row(row, lambda words: words.replace("desk", "table"))
    expected = [m | {"content": m["content"].replace("desk", "table")} for m in messages]
    assert DEFAULT_READER.read_chat(edited).messages == expected
    content = DEFAULT_READER.read_content(row)
    assert content.kind == "chat" and content.text == chat_text(messages)


def test_tools_of_the_row_do_not_replace_those_of_the_system_message():
    row = {"messages": CHAT, "tools": [CLOCK]}
    assert DEFAULT_READER.read_chat(row).messages == CHAT
