"""Bits per byte and SFT loss equal a reference for every batch size; texts and chats are read up to a byte limit.

Reference: one forward pass per token over its window, softmax in fp64.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from evaluation import bits_per_byte as bits_module
from evaluation.bits_per_byte import (
    ScoredSequence,
    bits_per_byte,
    ratio_with_error,
    read_chats_by_language,
    read_named_texts,
    sft_loss,
    sliding_windows,
)
from model.checkpoint import load_model
from model.config import ModelConfig
from model.transformer import Transformer
from trainer import loss as loss_module
from trainer.loss import IGNORE_INDEX

TEXTS = ["ab", "今天天气很好。", "The river is long and the moon is far away, and so on and so on. " * 3, "x"]


@pytest.fixture(scope="module")
def model(tokenizer):
    """Large embeddings make the probabilities differ; the context is 24 tokens."""
    torch.manual_seed(1)
    config = ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, max_seq_len=24)
    model = Transformer(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(8)
    return model


def reference_bits(model, tokenizer, text: str) -> float:
    limit, ids = model.config.max_seq_len, [tokenizer.eos_id, *tokenizer.encode(text)]
    bits = 0.0
    for position in range(1, len(ids)):
        start = 0
        while position - start > limit:  # the stride is half the context
            start += limit // 2
        with torch.no_grad():
            logits = model.logits(torch.tensor([ids[start:position]]))[0, -1].double()
        bits -= math.log2(logits.softmax(-1)[ids[position]])
    return bits


def test_bits_per_byte_equals_reference_beyond_context(model, tokenizer):
    found = bits_per_byte(model, tokenizer, TEXTS)
    expected_bits, sizes = (
        [reference_bits(model, tokenizer, text) for text in TEXTS],
        [len(text.encode()) for text in TEXTS],
    )
    assert len(tokenizer.encode(TEXTS[2])) > 4 * model.config.max_seq_len
    assert found["bits_per_byte"] == pytest.approx(sum(expected_bits) / sum(sizes), abs=1e-6)
    assert found["bytes"] == sum(sizes) and found["tokens"] == sum(sizes) and found["documents"] == 4  # byte-level
    assert found["changed"] == 0
    for text, bits, size in zip(TEXTS, expected_bits, sizes, strict=True):
        alone = bits_per_byte(model, tokenizer, [text])
        assert alone["bits_per_byte"] == pytest.approx(bits / size, abs=1e-6) and alone["error"] is None


def test_scores_do_not_depend_on_batch_size(model, tokenizer, monkeypatch):
    chats = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes " * i}] for i in range(1, 4)]
    wide = Transformer(ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, max_seq_len=64)).eval()
    expected = bits_per_byte(model, tokenizer, TEXTS)["bits_per_byte"], sft_loss(wide, tokenizer, chats)["loss"]
    for batch_size, chunk, tokens in ((1, 1024, 16_384), (3, 7, 16_384), (64, 1, 16_384), (16, 1024, 30), (2, 5, 1)):
        monkeypatch.setattr(loss_module, "LOGITS_CHUNK", chunk)
        monkeypatch.setattr(bits_module, "MAX_WINDOW_TOKENS", tokens)
        found = bits_per_byte(model, tokenizer, reversed(TEXTS), batch_size)["bits_per_byte"]
        assert found == pytest.approx(expected[0], abs=1e-6)
        assert sft_loss(wide, tokenizer, chats, batch_size)["loss"] == pytest.approx(expected[1], abs=1e-6)


def test_autocast_and_training_mode_do_not_change_bits_per_byte(model, tokenizer):
    expected = bits_per_byte(model, tokenizer, TEXTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bits_per_byte(model.train(), tokenizer, TEXTS) == expected
    assert model.training
    model.eval()


def test_uniform_model_needs_log2_vocab_size_bits(tokenizer):
    model = Transformer(ModelConfig(tokenizer.vocab_size, 32, 1, 2, 2, max_seq_len=8, tie_embeddings=False))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = bits_per_byte(model, tokenizer, TEXTS)
    assert found["bits_per_byte"] == pytest.approx(math.log2(tokenizer.vocab_size), abs=1e-6)
    assert found["error"] == pytest.approx(0, abs=1e-6)
    chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    assert sft_loss(model, tokenizer, chats) == {
        **{"loss": None, "error": None, "bits_per_byte": None, "tokens": 0, "chats": 0, "dropped": 1},
    }  # no turn fits into 8 tokens


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 90), st.integers(1, 20), st.data())
def test_every_scored_token_is_the_label_of_one_window(n, limit, data):
    scored = data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))
    sequence = ScoredSequence(list(range(n)), scored, 1)
    found = []
    for inputs, labels in sliding_windows(sequence, limit):
        assert len(inputs) == len(labels) <= limit and inputs == list(range(inputs[0], inputs[0] + len(inputs)))
        for before, label in zip(inputs, labels, strict=True):
            if label != IGNORE_INDEX:
                assert label == before + 1
                assert inputs[0] == 0 or label - inputs[0] > limit - max(1, limit // 2)  # enough context
                found.append(label)
    assert sorted(found) == [i for i in range(1, n) if scored[i]] and found == sorted(found)


def test_sft_loss_equals_training_loss(tokenizer, sft_dir, tiny_parent):
    """Equal to the validation loss of 3-full_sft.py on the same file."""
    from corpus.tokenize_chats import tokenize_chats
    from trainer.datasets import ChatDataset
    from trainer.loss import cross_entropy_sum

    model, _, _ = load_model(tiny_parent)
    folder = str(tokenize_chats(sft_dir, tokenizer, 64))
    for lang, chats in read_chats_by_language(str(sft_dir / "val.jsonl")).items():
        data = ChatDataset(folder, f"val_{lang}", tokenizer.pad_id)
        batch = data.batch(list(range(len(data))))
        with torch.no_grad():
            hidden, _ = model(batch["input_ids"])
            total = cross_entropy_sum(hidden, model.lm_head.weight, batch["labels"])
        found = sft_loss(model, tokenizer, chats)
        assert found["tokens"] == batch["num_targets"] and found["chats"] == len(data) == 4
        assert found["loss"] == pytest.approx(total.item() / batch["num_targets"], rel=1e-5)
        answer_bytes = sum(len(chat[1]["content"].encode()) for chat in chats)
        assert found["bits_per_byte"] == pytest.approx(total.item() / math.log(2) / answer_bytes, rel=1e-5)


def test_ratio_error_equals_formula():
    value, error = ratio_with_error([2.0, 6.0], [1, 2])
    assert value == pytest.approx(8 / 3)
    assert error == pytest.approx(math.sqrt(2 / 1 * ((2 - 8 / 3) ** 2 + (6 - 16 / 3) ** 2)) / 3)
    assert ratio_with_error([1.0], [2]) == (0.5, None) and ratio_with_error([], []) == (None, None)


# ---- reading ---------------------------------------------------------------------------------------------------------
def test_read_named_texts_names_and_limits_texts(tmp_path):
    (tmp_path / "a.txt").write_text("今天很好。" * 50, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    a, b = str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")
    found = read_named_texts([a, b, f"law={a}"], 10)
    assert list(found) == ["zh", "en", "law"] and found["law"]["file"] == a
    assert found["zh"]["texts"] == ["今天很"] and found["zh"]["bytes"] == 9  # no incomplete character
    assert found["en"]["texts"] == ["one", "two", "thre"] and found["en"]["bytes"] == 10
    assert read_named_texts([b])["en"]["texts"] == ["one", "two", "three"]
    with pytest.raises(UserError, match="are both named zh: name them"):
        read_named_texts([a, f"zh={a}"])
    with pytest.raises(UserError, match="absent"):
        read_named_texts(["zh=absent.txt"])
    (tmp_path / "c=d.txt").write_text("text", encoding="utf-8")
    assert list(read_named_texts([str(tmp_path / "c=d.txt")])) == ["en"]  # a path may contain =
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"empty\.txt"):
        read_named_texts([str(tmp_path / "empty.txt")])


def test_read_chats_by_language_limits_bytes(sft_dir, tmp_path):
    everything = read_chats_by_language(str(sft_dir / "train.jsonl"))
    assert list(everything) == ["zh", "en"] and [len(chats) for chats in everything.values()] == [20, 20]
    few = read_chats_by_language(str(sft_dir / "train.jsonl"), 10)
    sizes = {lang: [len(chat[1]["content"].encode()) for chat in chats] for lang, chats in few.items()}
    assert all(sum(found) >= 10 > sum(found[:-1]) for found in sizes.values())
    (tmp_path / "t.jsonl").write_text('{"text": "no chat"}\n')
    with pytest.raises(UserError, match=r"t\.jsonl"):
        read_chats_by_language(str(tmp_path / "t.jsonl"))


def test_lossy_tokenizer_is_reported(model, tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "encode", lambda self, text: self.backend.encode(text.lower()).ids)
    assert bits_per_byte(model, tokenizer, ["ABC", "abc"])["changed"] == 1
