"""Promise: `data_process.py rl` turns questions with answers and chats into prompts with references, each prompt once,
and resumes after a kill to the same bytes; damaged and foreign folders are refused in one line."""

import json
import random

import pytest

import data_process
from corpus import prepare_prompts
from corpus.prompt_data import PromptRow, prompts_fingerprint, read_prompts
from tests.helpers import make_chat_row, one_line_error, read_folder, read_jsonl, visible_names, write_rows


def user(text):
    return {"role": "user", "content": text}


def bot(text, **more):
    return {"role": "assistant", "content": text, **more}


def prompts(folder, split="train"):
    """(messages, reference) of a split."""
    return [(row.messages, row.reference) for row in read_prompts(folder, split)]


@pytest.fixture
def questions(tmp_path):
    rows = [{"question": f"What is {i} + 2?", "answer": str(i + 2)} for i in range(300)]
    rows += [{"question": f"{i}加2等于几？", "answer": i + 2} for i in range(300)]
    return write_rows(tmp_path / "questions.jsonl", rows)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "1+1?", "answer": "2"}, ([user("1+1?")], "2")),
        ({"question": "1+1?", "answer": 2}, ([user("1+1?")], "2")),
        ({"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}, ([user("1+1?")], "1+1=<<1+1=2>>2\n#### 2")),
        ({"prompt": [user("1+1?")], "reward_model": {"style": "rule", "ground_truth": "2"}}, ([user("1+1?")], "2")),
        ({"prompt": "1+1?", "ground_truth": 2}, ([user("1+1?")], "2")),
        ({"题目": "1+1？", "答案": "2"}, ([user("1+1？")], "2")),
        ({"instruction": "Add.", "input": "1+1", "output": "2"}, ([user("Add.\n1+1")], "2")),
        ({"prompt": [{"role": "system", "content": "Be brief."}, user("1+1?")], "answer": "2"},
         ([{"role": "system", "content": "Be brief."}, user("1+1?")], "2")),
        ({"messages": [user("Hi"), bot("Hello"), user("1+1?"), bot("2")]},
         ([user("Hi"), bot("Hello"), user("1+1?")], "2")),
        ({"messages": [user("1+1?"), bot("2"), user("and 2+2?")]}, ([user("1+1?")], "2")),
        ({"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]}, ([user("1+1?")], "2")),
    ],
)  # fmt: skip
def test_the_last_answer_of_every_layout_is_the_reference(tmp_path, process, row, expected):
    folder = process("rl", write_rows(tmp_path / "a.jsonl", [row]))
    assert prompts(folder) == [expected]
    assert visible_names(folder) == ["meta.json", "train.jsonl", "val.jsonl"], "no tokens"


CALCULATOR = {"name": "calculator", "description": "", "parameters": {"type": "object", "properties": {}}}
OFFER = {"role": "system", "content": "", "tools": [{"type": "function", "function": CALCULATOR}]}


def test_tools_calls_and_results_stay_in_the_prompt(tmp_path, process):
    """The answer after a result is the reference; a question that offers tools and has an answer ends with the user."""
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "3+4"}}}
    turns = [user("3+4?"), bot("", tool_calls=[call]), {"role": "tool", "content": "7"}]
    rows = [
        {"messages": [*turns, bot("It is 7.")], "tools": [CALCULATOR]},
        {"messages": [user("4+4?")], "tools": json.dumps(OFFER["tools"]), "answer": "8"},
        {"messages": turns[:2], "tools": [CALCULATOR]},
        {"messages": [user("5+5?"), bot("<think>\nadd\n</think>\n\n10")]},
    ]
    folder = process("rl", write_rows(tmp_path / "a.jsonl", rows))
    assert prompts(folder) == [
        ([OFFER, *turns], "It is 7."),
        ([OFFER, user("4+4?")], "8"),
        ([user("5+5?")], "10"),
    ]
    assert [row.tools for row in read_prompts(folder, "train")] == [OFFER["tools"], OFFER["tools"], []]
    dropped = json.loads((folder / "meta.json").read_text())["report"]["dropped"]
    assert list(dropped) == ["no answer with a text, so no reference"]


def test_every_row_is_counted(tmp_path, process, capsys):
    rows = [*2 * [{"question": "1+1?", "answer": "2"}], {"question": "1+1?", "answer": "3"},
            {"messages": [user("Hi")]}, {"messages": [user("Hi"), bot("Hello", weight=0)]},
            {"prompt": "1+1?", "chosen": "2", "rejected": "3"}, {"question": "2+2?", "answer": "4", "hint": "add"},
            {"question": "2+2?", "answer": None}]  # fmt: skip
    file = write_rows(tmp_path / "a.jsonl", rows)
    folder = process("rl", file, max_bad_fraction=0.5)
    assert prompts(folder) == [([user("1+1?")], "2"), ([user("2+2?")], "4")]
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["kind"], meta["rows"]) == ("prompts", {"train": 2, "val": 0})
    report = meta["report"]
    counts = {name: reason["first"] for kind in ("dropped", "bad") for name, reason in report[kind].items()}
    assert counts == {
        "exact duplicate": [f"{file}:2"],
        "an earlier prompt with another reference": [f"{file}:3"],
        "no answer with a text, so no reference": [f"{file}:4", f"{file}:5"],
        "a pair of answers: data_process.py dpo reads it": [f"{file}:6"],
        "answer is null": [f"{file}:8"],
    }
    assert (report["read"], report["kept"], report["tokens"]) == (8, 2, 0)
    printed = capsys.readouterr().out
    assert "written" in printed and "(prompts: train 2, val 0)" in printed and "length in tokens" not in printed
    assert f"rows have a `hint` that is not used (first: {file}:7)" in printed


def test_pairs_and_texts_are_refused_in_one_line(tmp_path, process):
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "1+1?", "chosen": "2", "rejected": "3"}])
    with one_line_error(pairs, "a pair of answers: data_process.py dpo reads it"):
        process("rl", pairs)
    with one_line_error("a chat row needs a list of turns"):
        process("rl", write_rows(tmp_path / "texts.jsonl", ["One text.", "Another."]))
    everything = write_rows(tmp_path / "few.jsonl", [{"question": "1+1?", "answer": "2"}])
    with one_line_error("all 1 are held out", "--val_fraction"):
        process("rl", everything, val_fraction=0.9999999999)
    assert not list(tmp_path.glob("rl*/*"))


def test_a_question_is_held_out_by_sft_and_rl_alike(questions, process):
    """The split depends on the first question alone, so a model is not trained on questions that SFT held out."""
    held_out = {
        row["messages"][0]["content"] for row in read_jsonl(process("sft", questions, val_fraction=0.1) / "val.jsonl")
    }
    folder = process("rl", questions, val_fraction=0.1)
    assert {messages[0]["content"] for messages, _ in prompts(folder, "val")} == held_out
    assert len(held_out) > 30 and len(prompts(folder)) == 600 - len(held_out)
    assert {row.language for row in read_prompts(folder, "val")} == {"zh", "en"}


def test_rows_know_their_place_and_tools():
    row = PromptRow([{"role": "system", "content": "", "tools": [{"type": "function"}]}, user("hi")], "x")
    assert row.tools == [{"type": "function"}] and PromptRow([user("hi")], "x").tools == []


def test_rows_are_read_with_their_place(questions, process):
    folder = process("rl", questions)
    rows = read_prompts(folder, "train")
    assert [row.line for row in rows] == list(range(1, len(rows) + 1))
    assert {row.file for row in rows} == {str(folder / "train.jsonl")}


@pytest.mark.parametrize("at", [2, 4, 7])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, questions, process, monkeypatch, at):
    monkeypatch.setattr("corpus.examples.BATCH_EXAMPLES", 100)
    monkeypatch.setattr("corpus.job_state.CHECKPOINT_SECONDS", 0)
    whole = read_folder(process("rl", questions, out="whole"))
    pull, calls = prepare_prompts.next_batch, []

    def interrupt(examples):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return pull(examples)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_prompts, "next_batch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            process("rl", questions)
    partial = tmp_path / "rl.partial"
    saved = json.loads((partial / "progress.json").read_text())["state"]
    assert 0 < saved["items"] < 600
    with (partial / "train.jsonl").open("a") as cut:
        cut.write('{"messages": [{"ro')  # a write that was cut by the kill
    assert read_folder(process("rl", questions)) == whole and not partial.exists()


def test_check_writes_nothing_and_shows_prompts(tmp_path, questions, process, capsys):
    process("rl", questions, check=True, samples=2)
    printed = capsys.readouterr().out
    assert printed.count("--- prompt, ") == printed.count("\nreference: ") == 2 and not (tmp_path / "rl").exists()


def test_there_is_no_flag_of_a_tokenizer(questions, tmp_path):
    with one_line_error("unknown flag --tokenizer"):
        data_process.main(["rl", str(questions), "--out_dir", str(tmp_path / "rl"), "--tokenizer", "x"])


# ---- damaged and foreign folders -------------------------------------------------------------------------------------
def test_damaged_and_foreign_folders_are_refused_in_one_line(tmp_path, questions, process):
    with one_line_error("no prompts in", "data_process.py rl FILES…` first"):
        read_prompts(tmp_path / "nothing", "train")
    chats = process("sft", write_rows(tmp_path / "chats.jsonl", [make_chat_row(i) for i in range(60)]))
    with one_line_error(chats, "holds other data than prompts (messages)"):
        read_prompts(chats, "train")
    folder = process("rl", questions)
    (folder / "val.jsonl").unlink()
    with one_line_error("cannot read", "val.jsonl"):
        read_prompts(folder, "val")
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"messages": [], "reference": "", "language": "en"}\n')
    with one_line_error("train.jsonl is damaged", "pass the edited file as FILES"):
        read_prompts(folder, "train")


def test_a_flipped_bit_is_refused(questions, process):
    folder = process("rl", questions)
    rng = random.Random(0)
    for name in ("train.jsonl", "val.jsonl", "meta.json"):
        content = (folder / name).read_bytes()
        for bit in rng.sample(range(8 * len(content)), 40):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(changed)
            with one_line_error(name, "data_process.py rl FILES"):
                read_prompts(folder, "train"), read_prompts(folder, "val")
        (folder / name).write_bytes(content)
    assert len(read_prompts(folder, "train")) + len(read_prompts(folder, "val")) == 600


def test_the_fingerprint_depends_on_the_prompts_alone(tmp_path, questions, process):
    one, again = process("rl", questions), process("rl", questions, out="again")
    other = process("rl", questions, out="other", val_fraction=0.3)
    assert prompts_fingerprint(one) == prompts_fingerprint(again) != prompts_fingerprint(other)
    assert prompts_fingerprint(one, "val") != prompts_fingerprint(one, "train")
