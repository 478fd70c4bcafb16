"""Steps with batch 8 = 4 x 2 accumulated = 2 processes x 2 x 2 accumulated give equal results up to rounding."""

import sys

import pytest
import torch

from common.errors import UserError
from tests.helpers import EXACT_FLAGS, ROOT, TINY_MODEL_FLAGS, load_weights, read_jsonl, run_process, run_script
from trainer.config import TrainConfig
from trainer.distributed import DistContext
from trainer.train_state import micro_batch_size, resolve_global_batch_size

# AdamW, because Muon orthogonalises in bf16, which amplifies rounding differences.
COMMON = [*TINY_MODEL_FLAGS, *EXACT_FLAGS, "--optimizer", "adamw", "--max_steps", "9", "--eval_interval", "4"]
# 59 rows = 7 full batches of 8 and one of 3: the comparison includes the short batch and the second epoch.


def pretrain(monkeypatch, pretrain_dir, tokenizer_dir, out, *flags):
    paths = ["--data_path", pretrain_dir, "--tokenizer", tokenizer_dir, "--out_dir", out]
    run_script(monkeypatch, "1-pretrain.py", *COMMON, *paths, *flags)
    return out


def assert_same_run(one, other):
    ours, theirs = (read_jsonl(folder / "pretrain_32.jsonl") for folder in (one, other))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, their in zip(ours, theirs, strict=True):
        assert mine["tokens"] == their["tokens"]
        for name in ("loss", "grad_norm"):
            if name in mine:
                assert mine[name] == pytest.approx(their[name], rel=1e-4), (name, mine["step"])
        for split, value in mine.get("val_loss", {}).items():
            assert value == pytest.approx(their["val_loss"][split], rel=1e-4)
    mine, their = load_weights(one / "pretrain_32.pth"), load_weights(other / "pretrain_32.pth")
    for name in mine:
        torch.testing.assert_close(mine[name], their[name], rtol=1e-3, atol=1e-4)


@pytest.fixture
def big_batch(monkeypatch, pretrain_dir, tokenizer_dir, tmp_path):
    return pretrain(monkeypatch, pretrain_dir, tokenizer_dir, tmp_path / "big", "--batch_size", 8)


def test_accumulation_equals_one_large_batch(monkeypatch, big_batch, pretrain_dir, tokenizer_dir, tmp_path):
    for flags in (
        ("--batch_size", 4, "--accumulation_steps", 2),
        ("--batch_size", 4, "--global_batch_size", 8),
        ("--batch_size", 3, "--global_batch_size", 8),  # micro-batches of 3, 3 and 2 rows
    ):
        out = tmp_path / f"{flags[1]}{flags[2]}"
        assert_same_run(big_batch, pretrain(monkeypatch, pretrain_dir, tokenizer_dir, out, *flags))
    flags = ("--batch_size", 3, "--accumulation_steps", 3)  # 9 rows per step: the comparison must fail
    with pytest.raises(AssertionError):
        assert_same_run(big_batch, pretrain(monkeypatch, pretrain_dir, tokenizer_dir, tmp_path / "nine", *flags))


@pytest.mark.parametrize("model", [[], ["--use_moe", "--n_routed_experts", "2", "--balance_loss_coef", "0"]])
def test_two_processes_equal_one(monkeypatch, model, pretrain_dir, tokenizer_dir, tmp_path):
    one = pretrain(monkeypatch, pretrain_dir, tokenizer_dir, tmp_path / "one", "--batch_size", 8, *model)
    two = tmp_path / "two"
    flags = ["--batch_size", 2, "--global_batch_size", 8, "--data_path", pretrain_dir, "--tokenizer", tokenizer_dir]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = run_process(*torchrun, ROOT / "1-pretrain.py", *COMMON, *flags, *model, "--out_dir", two)
    assert result.returncode == 0, result.stderr[-2000:]
    if model:
        for folder in (one, two):
            (folder / "pretrain_32_moe.jsonl").rename(folder / "pretrain_32.jsonl")
            (folder / "pretrain_32_moe.pth").rename(folder / "pretrain_32.pth")
    assert_same_run(one, two)


def test_rows_per_step_are_shared_evenly(tmp_path):
    """--batch_size is the largest micro-batch; the processes of a step have equally many rows."""
    assert [micro_batch_size(TrainConfig(batch_size=size), 8, 1) for size in (8, 4, 3)] == [8, 4, 3]
    assert [micro_batch_size(TrainConfig(batch_size=size), 8, 2) for size in (8, 4, 3)] == [4, 4, 2]
    three = DistContext(torch.device("cpu"), torch.float32, world_size=3)
    with pytest.raises(UserError, match=r"^3 processes cannot share 8 rows per step evenly: .* --global_batch_size$"):
        resolve_global_batch_size(TrainConfig(global_batch_size=8), tmp_path / "pretrain_32.pth", three)
    assert resolve_global_batch_size(TrainConfig(accumulation_steps=2), tmp_path / "pretrain_32.pth", three) == 48
    with pytest.raises(UserError, match="both set the rows per step: leave one out"):
        TrainConfig(global_batch_size=8, accumulation_steps=2)


def test_log_rows_hold_every_metric(curves, big_batch):
    """Every logged step has the metrics of the log format; the run writes a plot."""
    rows = read_jsonl(big_batch / "pretrain_32.jsonl")
    steps = [row for row in rows if "loss" in row]
    wanted = {
        "step",
        "epoch",
        "loss",
        "lr",
        "tokens",
        "tokens_per_second",
        "grad_norm",
        "seconds",
        "peak_memory_mb",
        "tflops",
    }
    assert all(wanted <= row.keys() for row in steps) and [row["step"] for row in steps] == list(range(1, 10))
    assert rows[-1]["val_loss"].keys() == rows[-1]["bits_per_byte"].keys() == {"zh", "en"}
    assert (big_batch / "pretrain_32.png").stat().st_size > 5_000
