"""Promise: every command reads every documented layout in the same way and reports unused keys by name."""

import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_process
from common.errors import UserError
from corpus.layouts import (
    COMPARISON_KEYS,
    FIELD_KEYS,
    LAYOUTS,
    Layout,
    explain_expected_keys,
    layout_tables,
    nearest_layouts,
    parse_keys,
)
from corpus.read_examples import read_chat_examples, read_documents, read_pair_examples
from corpus.row_text import DEFAULT_READER, RowReader
from corpus.stats import BadRow, DataStats
from corpus.tool_turns import FROM_SYSTEM_TEXT
from curation.transform import read_numbered_rows
from tests.helpers import ROOT

EXAMPLES = pytest.mark.parametrize("layout", LAYOUTS, ids=[layout.name for layout in LAYOUTS])
WORDS = {"1+1?", "2", "1+1=2 #### 2", "3", "Add.", "1+1", "Hi", "Hello", "Who?", "Li wrote it.", "Li.", "…"}

TEXTS = ("content", "reasoning_content")


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


@EXAMPLES
def test_every_example_is_read_completely_and_as_its_kind(layout):
    read = {"text": DEFAULT_READER.read_text, "chat": DEFAULT_READER.read_chat, "pair": DEFAULT_READER.read_pair}[
        layout.kind
    ]
    content = read(layout.example)
    assert content.kind == layout.kind and not content.unused and content.changes in ([], [FROM_SYSTEM_TEXT])
    texts = [
        m[key]
        for m in (*content.messages, *(m for answer in content.answers for m in answer))
        for key in TEXTS
        if key in m
    ]
    words = set("\n".join(texts or [content.text]).split("\n")) - {""}
    assert words <= WORDS and words >= {word for word in WORDS if f'"{word}"' in json.dumps(layout.example)} - {"1+1?"}
    if layout.kind == "chat":
        assert content.messages[-1]["role"] == "assistant" and content.messages[-2]["role"] in ("user", "tool")
    if layout.kind == "pair":
        assert [answer[0]["content"] for answer in content.answers] == ["2", "3"]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"kind": "x", "input": "q", "target": "a"}, [user("q"), bot("a")]),
        ({"instruction": "", "input": "q", "output": "a"}, [user("q"), bot("a")]),
        ({"instruction": None, "output": None, "question": "q", "answer": "a"}, [user("q"), bot("a")]),
        ({"messages": [], "prompt": "q", "answer": "a"}, [user("q"), bot("a")]),
        ({"INSTRUCTION": "q", "RESPONSE": "a"}, [user("q"), bot("a")]),
        ({"指令": "q", "输入": "c", "输出": "a"}, [user("q\nc"), bot("a")]),
        ({"问题": "q", "回答": "a"}, [user("q"), bot("a")]),
        ({"question": "q", "context": ["c", "d"], "answer": "a"}, [user("q\nc\nd"), bot("a")]),
        ({"passage": "c", "question": "q", "answer": "a"}, [user("q\nc"), bot("a")]),
        ({"system_prompt": "s", "question": "q", "response": "a"},
         [{"role": "system", "content": "s"}, user("q"), bot("a")]),
        ({"prompt": [user("q")], "completion": [bot("a")]}, [user("q"), bot("a")]),
        ({"messages": [user("q")], "response": "a"}, [user("q"), bot("a")]),
        ({"prompt": "q", "response": "a", "history": [user("x"), bot("y")]},
         [user("x"), bot("y"), user("q"), bot("a")]),
        ({"prompt": "q", "response": "a", "history": ["x", "y"]}, [user("x"), bot("y"), user("q"), bot("a")]),
        ({"chat": {"turn_1": {"Human": "q", "MOSS": "a"}}}, [user("q"), bot("a")]),
        ({"dialog": [["q", "a"]]}, [user("q"), bot("a")]),
        ({"conversation": [{"user": "q"}, {"assistant": "a"}]}, [user("q"), bot("a")]),
        ({"conversation": [{"assistant": "a", "human": "q"}]}, [user("q"), bot("a")]),
        ({"question": "q", "answer": json.dumps([bot("a")])}, [user("q"), bot("a")]),
        ({"messages": [user(json.dumps([{"type": "text", "text": "q"}])), bot("a")]}, [user("q"), bot("a")]),
        ({"text": "### Human: q\n### Assistant: a"}, [user("q"), bot("a")]),
        ({"text": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"}, [user("q"), bot("a")]),
        ({"q": "Human: who wrote it?", "a": '["x", "y"]'}, [user("Human: who wrote it?"), bot('["x", "y"]')]),
    ],
)  # fmt: skip
def test_variants_of_chat_layouts_are_read(row, messages):
    assert DEFAULT_READER.read_chat(row).messages == messages


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": {"role": "user", "content": "q"}, "chosen": bot("a"), "rejected": bot("b")},
        {"prompt": "q", "chosen": json.dumps([bot("a")]), "rejected": json.dumps([bot("b")])},
        {"question": "q", "response_j": "a", "response_k": "b"},
        {"prompt": "q", "accepted": "a", "rejected": "b"},
        {"prompt": "q", "chosen": ["a"], "rejected": ["b"]},
        {"问题": "q", "优选": "a", "劣选": "b"},
        {"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": 1},
        {"conversation_a": [user("q"), bot("b")], "conversation_b": [user("q"), bot("a")], "winner": "model_b"},
    ],
)
def test_variants_of_pair_layouts_are_read(row):
    content = DEFAULT_READER.read_pair(row)
    assert (content.messages, *content.answers) == ([user("q")], [bot("a")], [bot("b")])


def test_a_tie_is_dropped():
    with pytest.raises(BadRow, match="no answer is marked as the better one"):
        DEFAULT_READER.read_pair(
            {"conversation_a": [user("q"), bot("a")], "conversation_b": [user("q"), bot("b")], "winner": "tie"}
        )


# ---- one reader for every command ------------------------------------------------------------------------------------
TEXT = st.text("ab你好 .", min_size=1, max_size=8).filter(str.strip).map(lambda text: f"w{text}w")


def filled(example, texts):
    """Returns the example with its texts replaced by those of `texts`."""
    if isinstance(example, str):
        if example.startswith(("[", "\n\nHuman", "Human", "USER")):
            return re.sub(r"1\+1\?|Hello|Hi|(?<=: )[23]$", lambda found: texts[found[0]], example)
        return texts.get(example, example)
    if isinstance(example, list):
        return [filled(inner, texts) for inner in example]
    return {key: filled(inner, texts) for key, inner in example.items()} if isinstance(example, dict) else example


@EXAMPLES
@settings(max_examples=25, deadline=None)
@given(words=st.lists(TEXT, min_size=12, max_size=12, unique_by=lambda text: text.strip("w")))
def test_cleaning_reads_and_edits_what_training_reads(layout: Layout, words):
    row = filled(layout.example, dict(zip(sorted(WORDS), words, strict=False)))
    read = {"text": DEFAULT_READER.read_text, "chat": DEFAULT_READER.read_chat, "pair": DEFAULT_READER.read_pair}[
        layout.kind
    ]
    content = read(row)
    everything = DEFAULT_READER.read_content(row)
    assert everything.kind == content.kind and everything.text == content.text
    edited = DEFAULT_READER.edit_row(row, str.upper)
    again = read(edited)
    in_upper_case = lambda m: m | {key: m[key].upper() for key in TEXTS if key in m}  # not tools and calls
    upper = [[in_upper_case(m) for m in part] for part in (content.messages, *content.answers)]
    assert [again.messages, *again.answers] == upper and again.text.upper() == content.text.upper()


def test_a_row_with_a_text_and_a_chat_is_cleaned_in_both():
    row = {"instruction": "ask", "input": "", "output": "mail me", "text": "ask, mail me"}
    assert set(DEFAULT_READER.read_content(row).text.split("\n")) == {
        "ask", "mail me", "ask, mail me"
    }  # fmt: skip
    assert (
        DEFAULT_READER.edit_row(row, str.upper)["output"] == "MAIL ME"
        and DEFAULT_READER.edit_row(row, str.upper)["text"] == "ASK, MAIL ME"
    )
    assert DEFAULT_READER.read_text(row).unused == ["instruction", "output"] and DEFAULT_READER.read_chat(
        row
    ).unused == ["text"]


def test_the_turns_of_a_history_written_as_text_are_edited():
    row = {"q": "x", "a": "y", "history": "[['see b', 'c']]"}
    assert DEFAULT_READER.edit_row(row, str.upper)["history"] == '[["SEE B", "C"]]'
    assert DEFAULT_READER.edit_row(row, lambda text: text) == row


ODD = (
    {"messages": [user("q"), {"role": "tool", "content": "x"}, bot("a")]},
    {"messages": [bot("hello"), user("q"), bot("a")]},
    {"messages": [{"role": "cat", "content": "x"}]},
    {"prompt": "q", "completion": "a", "label": False},
    {"q": "q", "a": ""},
    {"q": 5, "a": "a"},
    {"text": ""},
    {"a": "b"},
    [user("q"), bot("a")],
    "plain text",
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(range(len(ODD) + len(LAYOUTS))), max_size=40))
def test_every_row_is_kept_dropped_or_bad(numbers):
    """For any rows, in every command: read = kept + dropped + bad, and every dropped or bad row has a reason."""
    rows = [[*ODD, *(layout.example for layout in LAYOUTS)][i] for i in numbers]
    rows = [row for row in rows if isinstance(row, (dict, list))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for take in (read_documents, read_chat_examples, read_pair_examples, read_numbered_rows):
            report = DataStats(max_bad_fraction=1.0)
            kept = 0
            try:
                for _ in take([path], report):
                    kept += 1
            except UserError as reason:
                assert "none of its" in str(reason) and not kept
            assert report.read == kept + report.dropped_rows + report.bad_rows == max(1, len(rows))
            assert report.dropped_rows == sum(reason.count for reason in report.dropped.values())
            assert report.bad_rows == sum(reason.count for reason in report.bad.values())


# ---- the user's own keys ---------------------------------------------------------------------------------------------
def test_own_keys_replace_the_usual_ones():
    reader = RowReader(parse_keys("prompt=ask, answer=gold"))
    row = {"ask": "q", "gold": "a", "answer": "no", "question": "neither"}
    content = reader.read_chat(row)
    assert content.messages == [user("q"), bot("a")] and content.unused == ["answer", "question"]
    assert reader.edit_row({"ask": "q", "other": "q"}, str.upper) == {"ask": "Q", "other": "q"}
    assert RowReader(parse_keys("text=abstract")).read_text({"abstract": "t"}).text == "t"
    assert RowReader(parse_keys("prompt=text,answer=y")).read_chat({"text": "q", "y": "a"}).messages == [
        user("q"),
        bot("a"),
    ]


@pytest.mark.parametrize("text", ["ask", "prompt=", "colour=x", "prompt=a,prompt=b"])
def test_invalid_keys_flags_are_errors(text):
    with pytest.raises(UserError, match="--keys"):
        parse_keys(text)


def test_the_error_for_an_unknown_layout_names_the_nearest_ones():
    assert nearest_layouts("chat", ["anwser", "question"])[0].name == "question, answer"
    assert nearest_layouts("pair", ["chosen", "prompts"])[0].name == "prompt and answers"
    message = explain_expected_keys("chat", ["frage", "antwort"])
    assert "found the keys frage, antwort" in message and "--keys prompt=KEY,answer=KEY" in message


def test_keys_are_unique_per_field_and_comparison_keys_belong_to_no_field():
    for field, keys in FIELD_KEYS.items():
        assert len(set(keys)) == len(keys), field
    compared = {key.lower() for first, second, *_ in COMPARISON_KEYS for key in (first, second)}
    assert not compared & {key for keys in FIELD_KEYS.values() for key in keys}


# ---- documentation ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "chinese"), [("README.md", False), ("README_zh.md", True)])
def test_the_layout_tables_of_the_documentation_match_the_code(name, chinese):
    text = (ROOT / "dataset" / name).read_text(encoding="utf-8")
    begin, end = "<!-- layouts: ", "<!-- end of layouts -->"
    tables = text[text.index(begin) : text.index(end)].partition("-->\n")[2].strip()
    assert tables == layout_tables(chinese), f"dataset/{name}: paste layout_tables({chinese}) between its markers"


def test_list_layouts_prints_every_layout(capsys):
    with pytest.raises(SystemExit) as done:
        data_process.main(["--list_layouts"])
    shown = capsys.readouterr().out
    assert not done.value.code and all(layout.name in shown for layout in LAYOUTS)
    assert all(key in shown for keys in FIELD_KEYS.values() for key in keys)
