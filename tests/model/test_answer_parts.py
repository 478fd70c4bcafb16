"""The parts of a generated answer: thought, content, tool calls.

Promises: every text is an answer, and reading it takes linear time; an answer that is cut into pieces anywhere has the
parts of the whole; a call that is no JSON object, has no name or no end stays text; a thought without end is the whole
answer; well-formed answers are read as they were written.
"""

import json
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from model.answer_parts import AnswerParts, AnswerStream, ToolCall, answer_message, parse_answer, parse_json_object

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ADD = ToolCall("add", {"a": 1})
# Answers made of whole and broken markers, so that random ones contain thoughts and calls.
PIECES = ["<think>", "</think>", "<tool_call>", "</tool_call>", CALL, "<", "</", "tool_call>", "<think", "\n", "\n\n"]
PIECES += [" ", "a", "答", '{"name": "f", "arguments": {}}', '{"name": ', "<tool_response>", "\u2028"]
answers = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join)


def parts_of(pieces) -> AnswerParts:
    """The parts that a stream of these pieces has."""
    stream = AnswerStream()
    deltas = [delta for piece in pieces for delta in stream.push(piece)] + stream.finish()
    thoughts = [delta.text for delta in deltas if delta.kind == "reasoning"]
    content = "".join(delta.text for delta in deltas if delta.kind == "content")
    calls = [delta.tool_call for delta in deltas if delta.kind == "tool_call"]
    return AnswerParts("".join(thoughts) if thoughts else None, content, calls)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", (None, "", [])),
        ("巴黎。\n", (None, "巴黎。\n", [])),
        ("  \n", (None, "  \n", [])),
        ("<think>\n1+1\n\nis 2\n</think>\n\n2", ("1+1\n\nis 2", "2", [])),
        ("<think>\n\n</think>\n\n2", ("", "2", [])),
        ("<think></think>2", ("", "2", [])),
        (" \n<think>a</think>b", ("a", "b", [])),
        ("<think>\nno end\n", ("no end", "", [])),
        ("<think>", ("", "", [])),
        ("<think>a<tool_call>b</tool_call><think></think>c", ("a<tool_call>b</tool_call><think>", "c", [])),
        ("<think>a</think><think>b</think>", ("a", "<think>b</think>", [])),
        ("so <think>a</think>", (None, "so <think>a</think>", [])),
        ("a</think>b", (None, "a</think>b", [])),
        (CALL, (None, "", [ADD])),
        (f"text\n{CALL}", (None, "text", [ADD])),
        (f"text\n\n{CALL}\n", (None, "text\n", [ADD])),
        (f"<think>\nr\n</think>\n\n{CALL}\n{CALL}", ("r", "", [ADD, ADD])),
        (f"{CALL} \n then\n{CALL}", (None, " \n then", [ADD, ADD])),
        (f"{CALL}<think>a</think>", (None, "<think>a</think>", [ADD])),
        ('<tool_call>{"name": "now"}</tool_call>', (None, "", [ToolCall("now", {})])),
        (r'<tool_call>{"name": "f", "arguments": "{\"x\": [1]}"}</tool_call>', (None, "", [ToolCall("f", {"x": [1]})])),
    ],
)
def test_golden_answers(text, parts):
    assert parse_answer(text) == parts


@pytest.mark.parametrize(
    "text",
    [
        "a\n<tool_call>\n{}\n</tool_call>\n",
        "a\n<tool_call>\nadd(1)\n</tool_call>",
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "1"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": null}</tool_call>',
        '<tool_call>[{"name": "f", "arguments": {}}]</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": ' + "[" * 40 + "]" * 40 + "}}</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"x": ' + "[" * 100_000 + "]" * 100_000 + "}}</tool_call>",
        '<tool_call>{"name": "f", "arguments": {}}',
        '<tool_call>{"name": "f", "arguments": {}}</tool_call',
        '{"name": "f", "arguments": {}}</tool_call>',
        "<tool_response>1</tool_response>",
    ],
)
def test_a_broken_call_is_text(text):
    assert parse_answer(text) == (None, text, [])
    is_open = text.rfind("<tool_call>") > text.rfind("</tool_call>")
    assert parse_answer(text + CALL).tool_calls == ([] if is_open else [ADD]), "a call after it is read"


@given(answers, st.data())
@example(f"<think>\n a \n</think>\n\nb\n{CALL}\n{CALL}\n", None)
def test_an_answer_in_pieces_has_the_parts_of_the_whole(text, data):
    whole = parse_answer(text)
    assert parts_of(text) == whole
    if data:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
        assert parts_of(text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)) == whole


@given(answers)
def test_nothing_of_an_answer_is_lost_but_markers_and_whitespace_of_the_format(text):
    reasoning, content, calls = parse_answer(text)
    if reasoning is None and not calls:
        assert content == text
    if not calls:
        kept = text.replace("<think>", "", 1).replace("</think>", "", 1) if reasoning is not None else text
        assert "".join(kept.split()) == "".join(((reasoning or "") + content).split())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
plain_text = st.text().filter(lambda text: "<" not in text)


def write_answer(reasoning, content, calls) -> str:
    """An answer in the format of the module's docstring."""
    text = "" if reasoning is None else f"<think>\n{reasoning}\n</think>\n\n"
    blocks = [json.dumps(call._asdict(), ensure_ascii=False) for call in calls]
    return text + "\n".join(filter(None, [content, *(f"<tool_call>\n{block}\n</tool_call>" for block in blocks)]))


@pytest.fixture(scope="module")
def render(tokenizer):
    return lambda messages: tokenizer.decode(tokenizer.render(messages)[0])


@given(
    st.none() | plain_text.map(lambda text: text.strip("\n")),
    plain_text.map(lambda text: text.lstrip("\n")).filter(lambda text: text.strip() or not text),
    st.lists(st.tuples(st.text(min_size=1).filter(str.strip), st.dictionaries(st.text(), json_values, max_size=3))),
)
def test_a_written_answer_is_read_back_and_rendered_as_it_was(render, reasoning, content, calls):
    calls = [ToolCall(*call) for call in calls if "</tool_call>" not in json.dumps(call)]
    text = write_answer(reasoning, content, calls)
    assert parse_answer(text) == (reasoning, content, calls)
    rendered = render([{"role": "user", "content": "?"}, answer_message(text)])
    assert rendered.endswith(f"assistant\n{text}<|im_end|>\n")


def test_the_message_of_an_answer_has_only_the_keys_it_needs():
    assert answer_message("hi") == {"role": "assistant", "content": "hi"}
    function = {"name": "add", "arguments": {"a": 1}}
    assert answer_message(f"<think></think>hi\n{CALL}") == {
        "role": "assistant",
        "content": "hi",
        "reasoning_content": "",
        "tool_calls": [{"type": "function", "function": function}],
    }


def test_only_undecided_text_is_held_back():
    stream = AnswerStream()
    texts = [
        [delta.text for delta in stream.push(piece)] for piece in ("a <", "b", "\n", "c</thin", "k>", "<tool", "s")
    ]
    assert texts == [["a "], ["<b"], [], ["\nc"], ["</think>"], [], ["<tools"]]


@given(st.text())
def test_json_objects_are_read_and_nothing_else(text):
    assert parse_json_object(text) is None or text.lstrip().startswith("{")
    assert parse_json_object(json.dumps({"k": text})) == {"k": text}


@pytest.mark.parametrize(
    "unit", ["<", "\n", "<think>", "<tool_call>", "</tool_call>", CALL, "<tool_call>{</tool_call>"]
)
@pytest.mark.parametrize("start", ["", "<think>a", "<tool_call>"])
def test_reading_takes_linear_time(start, unit):
    def seconds(count):
        text, best = start + unit * count, float("inf")
        for _ in range(3):
            began = time.process_time()
            parts_of(text)
            best = min(best, time.process_time() - began)
        return best

    count = 2000 // len(unit) + 50
    assert seconds(8 * count) < 24 * seconds(count) + 0.01
