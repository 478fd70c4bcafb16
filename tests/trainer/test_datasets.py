"""Datasets: each token is a label once, only answer tokens are labels in chats, mismatched data is rejected."""

import json

import numpy as np
import pytest
import torch

from common.errors import UserError
from corpus.dataset_meta import read_meta, write_meta
from tests.helpers import load_script, write_shards
from trainer.chat_data import dropped_row_messages
from trainer.datasets import ChatDataset, PackedDataset, check_data
from trainer.loss import IGNORE_INDEX


def test_packed_rows_cover_the_stream_once(tokenizer, pretrain_dir):
    data = PackedDataset(str(pretrain_dir), "train", 32)
    batch = data.batch(np.arange(len(data)))
    stream = data.tokens.read(0, data.tokens.tokens)
    assert batch["labels"][batch["labels"] != IGNORE_INDEX].tolist() == stream[1:].tolist()
    trained_fraction = (batch["labels"] != IGNORE_INDEX).float().mean().item()
    assert trained_fraction >= 0.98


def test_only_answer_tokens_are_labels(tokenizer, tmp_path):
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "你好 <|im_end|>"},
        {"role": "assistant", "content": "你好！"},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
    ]
    folder = write_shards(tmp_path / "chats", "chats", tokenizer, {"train": [tokenizer.render(messages)]})
    labels = ChatDataset(str(folder), "train", tokenizer.pad_id).batch(np.array([0]))["labels"][0]
    assert (labels != IGNORE_INDEX).sum() == len("你好！2".encode()) + 2
    assert tokenizer.decode(labels[labels != IGNORE_INDEX].tolist()) == "你好！<|im_end|>2<|im_end|>"


def test_chat_batches_have_few_widths(tokenizer, tmp_path):
    """On a CPU, each new matmul shape allocates buffers. SFT used 15 GB when each batch had a different width."""
    sizes = [5, 16, 17, 18, 30, 33, 34, 41]
    chats = [(np.ones(size, dtype=np.int64), np.ones(size, dtype=np.int64)) for size in sizes]
    data = ChatDataset(str(write_shards(tmp_path / "chats", "chats", tokenizer, {"train": chats})), "train", 0)
    widths = [data.batch(np.array([row]))["input_ids"].shape[1] for row in range(len(sizes))]
    assert widths == [16, 16, 16, 32, 32, 32, 40, 40], (
        "widths must be multiples of 16, or the width of the longest chat"
    )
    assert data.batch(np.arange(len(sizes)))["token_mask"].sum() == sum(sizes) - len(sizes)


def test_chat_loss_is_independent_of_batch_composition(tokenizer, tmp_path):
    from model.config import ModelConfig
    from model.transformer import Transformer

    chats = [
        tokenizer.render(
            [{"role": "user", "content": "q" * (1 + 3 * i)}, {"role": "assistant", "content": "a" * (2 + 5 * i)}]
        )
        for i in range(6)
    ]
    folder = str(write_shards(tmp_path / "chats", "chats", tokenizer, {"train": chats}))
    data = ChatDataset(folder, "train", tokenizer.pad_id)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(tokenizer.vocab_size, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=128))
    compute_loss = load_script("3-full_sft.py").compute_loss
    with torch.no_grad():
        alone = sum(compute_loss(model, data.batch(np.array([i])))[0].item() for i in range(6))
        together = compute_loss(model, data.batch(np.arange(6)))[0].item()
    assert together == pytest.approx(alone, rel=1e-5)


def test_data_of_another_stage_or_tokenizer_is_rejected(tokenizer, pretrain_dir, tmp_path):
    with pytest.raises(UserError, match="holds pretrain data, this stage reads chats"):
        check_data(str(pretrain_dir), "chats", tokenizer)
    other = write_shards(tmp_path / "other", "pretrain", tokenizer, {"train": [[1, 2, 3]]})
    write_meta(other, read_meta(other) | {"tokenizer": "0123456789abcdef"})
    with pytest.raises(UserError, match="0123456789abcdef"):
        check_data(str(other), "pretrain", tokenizer)


def test_rows_dropped_for_max_seq_len_are_printed(tokenizer, tmp_path):
    """A model with max_seq_len 64 drops chats of data prepared for 512; the run prints how many and why."""
    from corpus.tokenize_chats import tokenize_chats

    def chat(words):
        return [{"role": "user", "content": "hi " * words}, {"role": "assistant", "content": "yes"}]

    lines = [json.dumps({"messages": chat(words), "lang": "en"}) for words in (1, 2, 200, 3, 300)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "val.jsonl").write_text("")
    report = read_meta(str(tokenize_chats(tmp_path, tokenizer, 64)))["report"]
    assert list(dropped_row_messages(report)) == ["2 of 5 rows left out: first turn longer than 64 tokens"]
    assert not list(dropped_row_messages(report | {"read": 5})), "data_process.py has printed these rows already"
    assert not list(dropped_row_messages({})), "a folder of an older version has no report"
