"""Shared fixtures: a byte-level tokenizer, small datasets and tiny models, created in about a second."""

import json
import os
import signal
import sys
import types

import numpy as np
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker per core, so one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a background job: child processes would ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # under nohup child processes would ignore SIGHUP
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

from tests.helpers import force_tokens, make_chat_row, write_shards


@pytest.fixture(scope="session", autouse=True)
def without_curves():
    """Trainings in this process draw no curves and no page: that takes longer than most. Fixture `curves`: they do."""
    stubs = {name: types.ModuleType(name) for name in ("trainer.curves", "trainer.report_page")}
    stubs["trainer.curves"].draw_curves = stubs["trainer.report_page"].write_page = lambda *_: None
    with pytest.MonkeyPatch.context() as patch:
        for name, stub in stubs.items():
            patch.setitem(sys.modules, name, stub)
        yield


@pytest.fixture
def curves(monkeypatch):
    monkeypatch.delitem(sys.modules, "trainer.curves")
    monkeypatch.delitem(sys.modules, "trainer.report_page")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A byte-level tokenizer without merges: one token per byte, so that token counts are obvious."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    from model.tokenizer import SPARE_TOKENS, SPECIAL_TOKENS, save_tokenizer

    backend = Tokenizer(models.BPE())
    newline = pre_tokenizers.Split(Regex("\n"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([newline, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = SPECIAL_TOKENS + SPARE_TOKENS
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(specials), special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([], trainer)
    return save_tokenizer(backend, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer_dir(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer_dir")
    tokenizer.save(folder)
    return folder


@pytest.fixture
def process(tmp_path, tokenizer_dir):
    """Run data_process.py in this process; returns --out_dir."""
    import data_process

    def run(kind, *files, out=None, **flags):
        out_dir = tmp_path / (out or kind)
        arguments = [kind, *map(str, files), "--out_dir", str(out_dir)]
        arguments += ["--tokenizer", str(tokenizer_dir)] if kind != "rl" else []
        for name, value in flags.items():
            arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        data_process.main(arguments)
        return out_dir

    return run


@pytest.fixture(scope="session")
def pretrain_dir(tokenizer, tmp_path_factory):
    """A pretraining dataset: 59 training rows of 32 tokens, and a few validation rows."""
    random = np.random.default_rng(0)
    words = ["sun", "moon", "tree", "river", "太阳", "月亮", "树", "河"]

    def documents(n):
        for _ in range(n):
            yield [*tokenizer.encode(" ".join(random.choice(words, 6))), tokenizer.eos_id]

    splits = {"train": documents(60), "val_zh": documents(4), "val_en": documents(4)}
    return write_shards(tmp_path_factory.mktemp("data") / "pretrain", "pretrain", tokenizer, splits)


@pytest.fixture(scope="session")
def sft_dir(tmp_path_factory):
    """An SFT dataset as written by data_process.py sft, not tokenized: chats of various lengths in two languages."""
    folder = tmp_path_factory.mktemp("data") / "sft"
    folder.mkdir()
    for split, count in (("train", 40), ("val", 8)):
        rows = [make_chat_row(i) for i in range(count)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_parent(tokenizer, tmp_path_factory):
    """Path of an untrained model with dim 32, saved as a pretraining checkpoint."""
    import torch

    from model.checkpoint import save_model
    from model.config import ModelConfig
    from model.transformer import Transformer

    torch.manual_seed(0)
    model = Transformer(ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, max_seq_len=64))
    path = tmp_path_factory.mktemp("parent") / "pretrain_32.pth"
    save_model(path, model, "pretrain", tokenizer, [{"stage": "pretrain"}])
    return path


@pytest.fixture(scope="session")
def scripted_models(tokenizer, tmp_path_factory):
    """A folder with two checkpoints: full_sft always generates A巴, pretrain generates Paris!."""
    import torch

    from model.checkpoint import save_model
    from model.config import ModelConfig
    from model.transformer import Transformer

    folder = tmp_path_factory.mktemp("out")
    torch.manual_seed(0)
    config = ModelConfig(tokenizer.vocab_size, 64, 1, 2, 2, max_seq_len=96, tie_embeddings=False)
    for stage, chain in (
        ("full_sft", [*tokenizer.encode("\nA巴"), tokenizer.im_end_id]),
        ("pretrain", [*tokenizer.encode("\nParis!\n")]),
    ):
        model = Transformer(config)
        force_tokens(model, chain, logit_scale=1)
        save_model(folder / f"{stage}_64.pth", model, stage, tokenizer, [{"stage": stage}])
    os.utime(folder / "full_sft_64.pth", (0, 0))  # the older file of the later stage
    return folder


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the table of attacks (tests/faults). The main process of pytest-xdist loads only this conftest.py."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    rows = [value for report in reports if getattr(report, "when", "") == "call"
            for name, value in report.user_properties if name == "attacks"]  # fmt: skip
    if rows:
        terminalreporter.section("attacks")
    for kind, number, outcomes in sorted(rows, key=lambda row: row[0]):
        shown = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in outcomes.items())
        terminalreporter.write_line(f"{number:>9,}  {kind}" + (f": {shown}" if shown else ""))
