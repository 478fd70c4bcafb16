"""Promise: every common layout of a pair becomes one prompt and two answers; the loss mask covers only the answers."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from corpus.dataset_meta import read_meta
from corpus.examples import PairExample
from corpus.render_pairs import render_pair_examples
from corpus.row_text import DEFAULT_READER
from corpus.shard_reader import open_split
from corpus.stats import BadRow, DataStats, DroppedRow
from corpus.tokenize_chats import tokenize_chats
from model.chat_template import CHAT_FORMATS
from tests.helpers import SHARED_DATA, visible_names, write_rows


def normalise_pair(row):
    content = DEFAULT_READER.read_pair(row)
    return (content.messages, *content.answers)


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION, GOOD, BAD = [user("1+1?")], [bot("2")], [bot("2, or 3")]
PAIR = (QUESTION, GOOD, BAD)
OTHER_PROMPT, NOT_AN_ANSWER = "chosen and rejected have different prompts", "the last message is not an answer"


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": QUESTION + GOOD, "rejected": QUESTION + BAD, "source": "x", "lang": "en"},
        {"prompt": None, "chosen": QUESTION + GOOD, "rejected": str(QUESTION + BAD)},
        {"prompt": "1+1?", "chosen": "2", "rejected": "2, or 3"},
        {"prompt": "1+1?", "chosen": GOOD, "rejected": BAD},
        {"prompt": "1+1?", "chosen": QUESTION + GOOD, "rejected": QUESTION + BAD, "score_chosen": 9.0},
        {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
        {"prompt": QUESTION, "chosen": "2", "rejected": "2, or 3", "system": ""},
        {"prompt": QUESTION, "chosen": QUESTION + GOOD, "rejected": BAD},
        {"question": "1+1?", "chosen": "2", "rejected": "2, or 3"},
        {"conversations": [{"from": "human", "value": "1+1?"}], "chosen": {"from": "gpt", "value": "2"},
         "rejected": {"from": "gpt", "value": "2, or 3"}},
    ],
)  # fmt: skip
def test_every_layout_gives_the_same_pair(row):
    assert normalise_pair(row) == PAIR


def test_a_system_message_and_earlier_turns_belong_to_the_prompt():
    chat = [SYSTEM, user("Hi"), bot("Hello"), *QUESTION]
    assert normalise_pair({"chosen": chat + GOOD, "rejected": chat + BAD}) == (chat, GOOD, BAD)
    assert normalise_pair({"prompt": chat[1:], "chosen": "2", "rejected": BAD, "system": "Be brief."})[0] == chat
    longer = [*BAD, user("Sure?"), bot("No.")]
    assert normalise_pair({"prompt": chat, "chosen": GOOD, "rejected": longer}) == (chat, GOOD, longer)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "an empty answer (rejected)"),
        ({"prompt": "q", "chosen": None, "rejected": "a"}, "an empty answer (chosen)"),
        ({"prompt": "q", "chosen": [], "rejected": "a"}, "an empty answer (chosen)"),
        ({"chosen": [user("q"), bot(" ")], "rejected": QUESTION + BAD}, "an empty answer (chosen)"),
        ({"chosen": [user("q"), bot("a")], "rejected": [user("r"), bot("b")]}, OTHER_PROMPT),
        ({"chosen": [SYSTEM, *QUESTION, *GOOD], "rejected": QUESTION + BAD}, OTHER_PROMPT),
        ({"prompt": "q", "chosen": QUESTION + GOOD, "rejected": "b"}, OTHER_PROMPT),
        ({"prompt": "q", "chosen": [user("a")], "rejected": "b"}, NOT_AN_ANSWER),
        ({"chosen": [*QUESTION, *GOOD, user("?")], "rejected": QUESTION + BAD}, NOT_AN_ANSWER),
        ({"chosen": QUESTION + GOOD, "rejected": [*QUESTION, *GOOD, user("?"), bot("b")]},
         "one conversation is a prefix of the other"),
    ],
)  # fmt: skip
def test_pairs_unusable_for_dpo_are_dropped_with_a_reason(row, reason):
    with pytest.raises(DroppedRow) as error:
        normalise_pair(row)
    assert str(error.value) == reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "none of the keys of a pair"),
        ({"prompt": "q", "chosen": "a"}, "none of the keys of a pair"),
        ({"chosen": "good", "rejected": "bad"}, "answers without a prompt"),
        ({"prompt": "q", "chosen": True, "rejected": "a"}, "the messages are not a list"),
        ({"prompt": True, "chosen": "a", "rejected": "b"}, "prompt is true/false, not a string"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "prompt is empty"),
        ({"prompt": "q", "chosen": "a\0", "rejected": "b"}, "NUL character in assistant message"),
        ({"chosen": GOOD, "rejected": BAD}, "answers without a prompt"),
        ({"prompt": [user("q"), bot("r")], "chosen": "a", "rejected": "b"}, "the prompt ends with an answer"),
    ],
)
def test_malformed_pairs_are_bad_rows(row, reason):
    with pytest.raises(BadRow) as error:
        normalise_pair(row)
    assert str(error.value) == reason and not isinstance(error.value, DroppedRow)


TEXT = st.text(alphabet="ab你 \n", min_size=1, max_size=5).filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(turns=st.lists(st.tuples(TEXT, TEXT), max_size=3), question=TEXT, answers=st.lists(TEXT, min_size=2, max_size=2))
def test_the_shared_prompt_consists_of_whole_messages(tokenizer, turns, question, answers):
    """Answers that start with the same text keep it: it does not become part of the prompt, in text, ids or masks."""
    prompt = [*itertools.chain(*([user(q), bot(a)] for q, a in turns)), user(question)]
    row = {side: [*prompt, bot(text)] for side, text in zip(("chosen", "rejected"), answers, strict=True)}
    if answers[0] == answers[1]:
        with pytest.raises(DroppedRow):
            normalise_pair(row)
        return
    pair = normalise_pair(row)
    assert pair == (prompt, *([bot(text)] for text in answers))
    item = PairExample(*pair)
    shared, _ = tokenizer.render(prompt, add_generation_prompt=True)
    for (ids, mask, size), text in zip(
        render_pair_examples([item], tokenizer, 10_000, DataStats())[0], answers, strict=True
    ):
        assert ids[: len(shared)] == shared and ids == tokenizer.render([*prompt, bot(text)])[0]
        assert tokenizer.decode([i for i, trained in zip(ids, mask, strict=True) if trained]) == text + "<|im_end|>"
        assert not any(mask[: len(shared)]) and size == len(text.encode())


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_every_chat_format_trains_the_answers_only(tokenizer, name):
    tokenizer, answers = tokenizer.with_chat_format(name), ("2。", "2, or 3")
    for prompt in (QUESTION, [user("Hi"), bot("Hello."), *QUESTION]):
        item = PairExample(prompt, *([bot(text)] for text in answers))
        for (ids, mask, _), text in zip(
            render_pair_examples([item], tokenizer, 500, DataStats())[0], answers, strict=True
        ):
            trained = tokenizer.decode([i for i, one in zip(ids, mask, strict=True) if one])
            assert trained in (text + "<|im_end|>", text + "<|endoftext|>")


@settings(max_examples=80, deadline=None)
@given(turns=st.lists(st.tuples(TEXT, TEXT), max_size=4), system=st.booleans(), limit=st.integers(25, 200))
def test_long_prompts_lose_the_same_oldest_turns_for_both_answers(tokenizer, turns, system, limit):
    prompt = [*itertools.chain(*([user(q), bot(a)] for q, a in turns)), user("q")]
    whole = [SYSTEM, *prompt] if system else prompt
    report = DataStats()
    item = PairExample(whole, [bot("a")], [bot("a longer one")])
    (documents,) = render_pair_examples([item], tokenizer, limit, report)
    starts = [i for i, message in enumerate(prompt) if message["role"] == "user"]
    candidates = [whole[: int(system)] + prompt[i:] for i in starts]
    fits = [p for p in candidates if len(tokenizer.render([*p, bot("a longer one")])[0]) <= limit]
    if not fits:
        assert documents == [] and report.dropped_rows == 1 and report.kept == 0
        return
    assert [ids for ids, _, _ in documents] == [tokenizer.render([*fits[0], bot(t)])[0] for t in ("a", "a longer one")]
    assert report.kept == 1 and len(report.changed) == (fits[0] != whole)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from([QUESTION, GOOD, QUESTION + BAD]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["prompt", "chosen", "rejected", "role", "content", "system"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.fixed_dictionaries({"chosen": JSON, "rejected": JSON}, optional={"prompt": JSON, "system": JSON}) | JSON)
def test_random_rows_give_a_pair_or_a_reason(row):
    try:
        prompt, chosen, rejected = normalise_pair(row)
    except BadRow:
        return
    assert prompt[-1]["role"] == "user" and chosen != rejected
    assert chosen[-1]["role"] == rejected[-1]["role"] == "assistant"


# ---- the command -----------------------------------------------------------------------------------------------------
ROWS = [
    {"prompt": f"What is {i} + 1?", "chosen": f"{i + 1}.", "rejected": f"It may be {i}, or not."} for i in range(120)
]
ROWS += [
    {"prompt": f"{i} 加 1 是多少？", "chosen": f"是 {i + 1}。", "rejected": "不知道，也许很多很多。"}
    for i in range(120)
]
DROPPED = [
    {"prompt": "q", "chosen": "a", "rejected": "a"},
    {"prompt": "q", "chosen": "", "rejected": "a"},
    {"prompt": "q", "chosen": [user("a")], "rejected": "b"},
    {"chosen": [user("q"), bot("a")], "rejected": [user("r"), bot("b")]},
    ROWS[0],
    {"prompt": "long", "chosen": "a", "rejected": "x" * 600},
]


def test_pairs_become_jsonl_and_two_documents_each(tmp_path, process, tokenizer, capsys):
    folder = process("dpo", write_rows(tmp_path / "a.jsonl", ROWS + DROPPED))
    stored = {n: [json.loads(x) for x in (folder / f"{n}.jsonl").read_text().splitlines()] for n in ("train", "val")}
    # The jsonl files contain also the pair with too many tokens, because they do not depend on the tokenizer.
    assert len(stored["train"]) + len(stored["val"]) == 241 and {row["lang"] for row in stored["val"]} == {"zh", "en"}
    tokens = folder / f"tokens-{tokenizer.fingerprint}"
    meta = read_meta(tokens)
    assert meta["kind"] == "pairs" and sorted(meta["splits"]) == ["train", "val_en", "val_zh"]
    train, rows = open_split(tokens, "train"), [row for row in stored["train"] if row["prompt"] != [user("long")]]
    assert train.documents == 2 * len(rows)
    for i, row in enumerate(rows):
        for document, side in ((2 * i, "chosen"), (2 * i + 1, "rejected")):
            ids, mask = train.read_document(document)
            assert (ids.tolist(), mask.tolist()) == tokenizer.render(row["prompt"] + row[side])
    report = json.loads((folder / "meta.json").read_text())["report"]
    assert (report["read"], report["kept"], report["bad"]) == (246, 240, {})
    counts = {reason: entry["count"] for reason, entry in report["dropped"].items()}
    assert counts == {
        "chosen and rejected are the same": 1,
        "an empty answer (chosen)": 1,
        "the last message is not an answer": 1,
        "chosen and rejected have different prompts": 1,
        "exact duplicate": 1,
        "question and longer answer exceed 512 tokens": 1,
    }
    printed = capsys.readouterr().out
    assert "an empty answer (chosen)" in printed and "next: python 5-dpo_train.py" in printed
    stamp = tokens.stat().st_mtime_ns
    assert tokenize_chats(folder, tokenizer, 512, PairExample) == tokens and tokens.stat().st_mtime_ns == stamp


def test_a_question_is_in_one_split_and_csv_equals_jsonl(tmp_path, process):
    rows = [{"prompt": f"question {i % 90}", "chosen": f"good, {i}", "rejected": f'"bad"\n{i}'} for i in range(300)]
    folder = process("dpo", write_rows(tmp_path / "a.jsonl", rows), val_share=0.1)
    train, val = ((folder / f"{n}.jsonl").read_text() for n in ("train", "val"))
    sides = [{json.loads(x)["prompt"][0]["content"] for x in text.splitlines()} for text in (train, val)]
    assert not sides[0] & sides[1] and all(sides)
    quoted = ['"{}"'.format('","'.join(value.replace('"', '""') for value in row.values())) for row in rows]
    (tmp_path / "a.csv").write_text("\n".join(["prompt,chosen,rejected", *quoted]), encoding="utf-8")
    again = process("dpo", tmp_path / "a.csv", val_share=0.1)
    assert ((again / "train.jsonl").read_text(), (again / "val.jsonl").read_text()) == (train, val)


def test_too_many_bad_rows_are_an_error_and_no_output_is_left(tmp_path, process, monkeypatch):
    path = write_rows(
        tmp_path / "a.jsonl", [*ROWS, {"prompt": True, "chosen": "a", "rejected": "b"}, {"chosen": "a"}, {}]
    )
    with pytest.raises(UserError, match="3 of 243 rows read are bad"):
        process("dpo", path)
    with pytest.raises(UserError, match="a pair row needs chosen and rejected"):
        process("dpo", write_rows(tmp_path / "b.jsonl", [{"text": "a"}]))
    monkeypatch.setattr("corpus.tokenize_chats.render_examples", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        process("dpo", path, max_bad_share=0.1)
    assert visible_names(tmp_path) == ["a.jsonl", "b.jsonl"]


def test_check_shows_both_answers_and_writes_nothing(tmp_path, process, capsys):
    process("dpo", write_rows(tmp_path / "a.jsonl", ROWS), check=True, samples=1)
    printed = capsys.readouterr().out
    assert printed.count("--- chosen, ") == printed.count("--- rejected, ") == 1 and "<|im_end|>]]" in printed
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_errors_about_unsuitable_data_name_the_command(tmp_path, process, tokenizer, sft_dir):
    with pytest.raises(UserError, match=r"not a row that data_process.py wrote: run data_process\.py dpo again"):
        tokenize_chats(sft_dir, tokenizer, 500, PairExample)
    with pytest.raises(UserError, match=r"no pairs in .*data_process\.py dpo FILES"):
        tokenize_chats(tmp_path / "none", tokenizer, 500, PairExample)
    with pytest.raises(UserError, match=r"no pair is left to train on: .*exceed 5 tokens: give a larger --max_seq_len"):
        tokenize_chats(process("dpo", write_rows(tmp_path / "a.jsonl", ROWS)), tokenizer, 5, PairExample)


@pytest.mark.real
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs ../shared/data")
def test_real_pairs_have_no_bad_rows_and_most_are_kept(process):
    report = json.loads((process("dpo", SHARED_DATA / "dpo.jsonl.xz", max_seq_len=4096) / "meta.json").read_text())[
        "report"
    ]
    assert report["read"] == 6703 and report["bad"] == {} and report["kept"] > 5500
