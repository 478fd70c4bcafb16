"""Promise: an answer with weight 0 is context and is never trained, in every chat format."""

import json

import pytest

import data_process
from corpus.examples import read_chat_examples
from corpus.render_chats import render_chat_examples
from corpus.shard_reader import open_split
from corpus.stats import DataStats
from model.chat_template import CHAT_FORMATS

CHAT = [("user", "Q1"), ("assistant", "bad"), ("user", "Q2"), ("assistant", "good")]


def row(*weights):
    turns = [{"role": role, "content": content} for role, content in CHAT]
    for turn, weight in zip(turns[1::2], weights, strict=True):
        turn["weight"] = weight
    return {"messages": turns}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(tokenizer, ids, mask):
    return tokenizer.decode([i for i, mark in zip(ids, mask, strict=True) if mark])


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_only_answers_with_a_weight_are_trained(tmp_path, tokenizer, name):
    known = tokenizer.with_chat_format(name)
    report = DataStats()
    (item,) = read_chat_examples([write(tmp_path / "a.jsonl", row(0, 1))], report)
    ((ids, mask, size),) = render_chat_examples([item], known, 512, report)[0]
    assert "bad" in known.decode(ids) and "bad" not in trained(known, ids, mask)
    assert trained(known, ids, mask).strip().startswith("good") and size == len("good")
    ids_of_both, mask_of_both = known.render([{**turn, "weight": 1} for turn in item.messages])
    assert ids == ids_of_both and sum(mask_of_both) > sum(mask)


def test_a_long_chat_without_a_trained_answer_left_is_dropped_with_a_reason(tmp_path, tokenizer):
    report = DataStats()
    (item,) = read_chat_examples([write(tmp_path / "a.jsonl", row(0, 1))], report)
    whole = len(tokenizer.render(item.messages)[0])
    assert render_chat_examples([item], tokenizer, whole - 1, report) == [[]]  # no trained answer is left
    assert report.dropped[f"first turn longer than {whole - 1} tokens"].count == 1
    assert len(list(read_chat_examples([write(tmp_path / "b.jsonl", row(0, 0), row(1, 1))], report))) == 1
    assert report.dropped["no answer, so nothing to train on"].count == 1


def test_masks_on_disk_exclude_answers_of_weight_0(tmp_path, tokenizer, tokenizer_dir):
    path = write(tmp_path / "a.jsonl", row(0, 1), *({"q": f"q{i}", "a": f"a{i}"} for i in range(30)))
    data_process.main(["sft", str(path), "--tokenizer", str(tokenizer_dir), "--out_dir", str(tmp_path / "out")])
    stored = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert sum(any(turn.get("weight") == 0 for turn in row["messages"]) for row in stored) == 1
    (folder,) = (tmp_path / "out").glob("tokens-*")
    split = open_split(folder, "train")
    texts = [trained(tokenizer, *map(list, split.read_document(i))) for i in range(len(split.lengths()))]
    assert "good<|im_end|>" in texts and not any("bad" in text for text in texts)
