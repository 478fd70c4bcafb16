"""Rows as batches: every token is trained once, answers alone carry labels, and data of another model is refused."""

import json

import numpy as np
import pytest
import torch

from common.errors import UserError
from corpus.dataset_meta import read_meta, write_meta
from tests.helpers import load_script, write_shards
from trainer.datasets import Chats, Windows, left_out, open_data
from trainer.loss import IGNORE


def test_windows_cover_the_stream_once(tokenizer, pretrain_dir):
    data = Windows(str(pretrain_dir), "train", 32)
    batch = data.batch(np.arange(len(data)))
    stream = data.tokens.read(0, data.tokens.tokens)
    assert batch["labels"][batch["labels"] != IGNORE].tolist() == stream[1:].tolist()
    trained = (batch["labels"] != IGNORE).float().mean().item()
    assert trained >= 0.98, f"{trained:.3f} of the positions are trained"


def test_labels_are_the_answers_and_nothing_else(tokenizer, tmp_path):
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "你好 <|im_end|>"},
        {"role": "assistant", "content": "你好！"},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
    ]
    folder = write_shards(tmp_path / "chats", "chats", tokenizer, {"train": [tokenizer.render(messages)]})
    labels = Chats(str(folder), "train", tokenizer.pad_id).batch(np.array([0]))["labels"][0]
    assert (labels != IGNORE).sum() == len("你好！2".encode()) + 2
    assert tokenizer.decode(labels[labels != IGNORE].tolist()) == "你好！<|im_end|>2<|im_end|>"


def test_batches_of_chats_have_few_widths(tokenizer, tmp_path):
    """A CPU keeps memory for every shape of matrix product: SFT took 15 GB when every batch had its own width."""
    sizes = [5, 16, 17, 18, 30, 33, 34, 41]
    chats = [(np.ones(size, dtype=np.int64), np.ones(size, dtype=np.int64)) for size in sizes]
    data = Chats(str(write_shards(tmp_path / "chats", "chats", tokenizer, {"train": chats})), "train", 0)
    widths = [data.batch(np.array([row]))["input_ids"].shape[1] for row in range(len(sizes))]
    assert widths == [16, 16, 16, 32, 32, 32, 40, 40], "multiples of 16, but never wider than the longest chat needs"
    assert data.batch(np.arange(len(sizes)))["real"].sum() == sum(sizes) - len(sizes)


def test_a_chat_costs_the_same_alone_and_among_others(tokenizer, tmp_path):
    from model.config import ModelConfig
    from model.transformer import Transformer

    chats = [
        tokenizer.render(
            [{"role": "user", "content": "q" * (1 + 3 * i)}, {"role": "assistant", "content": "a" * (2 + 5 * i)}]
        )
        for i in range(6)
    ]
    folder = str(write_shards(tmp_path / "chats", "chats", tokenizer, {"train": chats}))
    data = Chats(folder, "train", tokenizer.pad_id)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(tokenizer.vocab_size, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=128))
    compute_loss = load_script("3-full_sft.py").compute_loss
    with torch.no_grad():
        alone = sum(compute_loss(model, data.batch(np.array([i])))[0].item() for i in range(6))
        together = compute_loss(model, data.batch(np.arange(6)))[0].item()
    assert together == pytest.approx(alone, rel=1e-5)


def test_data_of_another_tokenizer_is_refused(tokenizer, pretrain_dir, tmp_path):
    with pytest.raises(UserError, match="holds pretrain data, this stage reads chats"):
        open_data(str(pretrain_dir), "chats", tokenizer)
    other = write_shards(tmp_path / "other", "pretrain", tokenizer, {"train": [[1, 2, 3]]})
    write_meta(other, read_meta(other) | {"tokenizer": "0123456789abcdef"})
    with pytest.raises(UserError, match="0123456789abcdef"):
        open_data(str(other), "pretrain", tokenizer)


def test_what_tokenising_for_the_model_leaves_out_is_printed(tokenizer, tmp_path):
    """The data was cut to 512 tokens; a model that reads 64 loses chats, and the run says how many, and why."""
    from corpus.prepare_chats import tokenise_chats

    def chat(words):
        return [{"role": "user", "content": "hi " * words}, {"role": "assistant", "content": "yes"}]

    lines = [json.dumps({"messages": chat(words), "lang": "en"}) for words in (1, 2, 200, 3, 300)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "val.jsonl").write_text("")
    report = read_meta(str(tokenise_chats(tmp_path, tokenizer, 64)))["report"]
    assert list(left_out(report)) == ["2 of 5 rows left out: first turn longer than 64 tokens"]
    assert not list(left_out(report | {"read": 5})), "data_process.py has printed these itself"
    assert not list(left_out({})), "an old folder without a report"
