"""6-grpo_train.py: rewards rise, the log, early stops, exact resume, several processes, LoRA, tools."""

import json
import math
import re
import sys

import numpy as np
import pytest
import torch

import data_process
from common.errors import UserError
from corpus.prompt_data import PromptRow
from model.checkpoint import save_model
from model.config import ModelConfig
from model.transformer import Transformer
from tests.helpers import ROOT, free_port, load_weights, read_jsonl, run_process, run_script, write_rows

SHORT = ["--device", "cpu", "--dtype", "float32", "--learning_rate", "3e-3", "--log_interval", "1", "--warmup_iters"]
SHORT += ["0", "--prompts_per_step", "4", "--group_size", "4", "--max_new_tokens", "8", "--eval_interval", "100"]
SHORT += ["--truncated", "keep", "--reward", "toy_reward:has_digit", "--max_reward_drop", "0", "--min_entropy", "0"]
SIZE = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64, "dropout": 0.1}
REWARDS = """
def has_digit(prompt, answer, reference):
    return float(reference in answer)

def length(prompt, answer, reference):
    return len(answer) / 8

def bad(prompt, answer, reference):
    raise ValueError("no")
"""
VOLATILE = {"seconds", "seconds_left", "tokens_per_second", "peak_memory_mb", "tflops"}


@pytest.fixture
def rl_dir(tmp_path):
    """Prompts "digit 3" and "数字3" with the reference "3"; a third of them is held out."""
    rows = [{"question": f"{'digit ' if i % 2 else '数字'}{i % 10}, {i}?", "answer": str(i % 10)} for i in range(30)]
    folder = tmp_path / "rl"
    data_process.main(
        ["rl", str(write_rows(tmp_path / "rows.jsonl", rows)), "--out_dir", str(folder), "--val_fraction", "0.3"]
    )
    return folder


def save_parent(out, tokenizer, stage="full_sft", **changes):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(tokenizer.vocab_size, **{**SIZE, **changes}))
    save_model(out / f"{stage}_{model.config.name}.pth", model, stage, tokenizer, [{"stage": "pretrain"}])


@pytest.fixture
def grpo(monkeypatch, tokenizer, rl_dir, tmp_path):
    """Run 6-grpo_train.py on an untrained parent; returns its output folder."""
    (tmp_path / "toy_reward.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_reward", raising=False)

    def run(*flags, out="out"):
        folder = tmp_path / out
        if not list(folder.glob("full_sft_*.pth")):
            save_parent(folder, tokenizer)
        run_script(monkeypatch, "6-grpo_train.py", *SHORT, "--data_path", rl_dir, "--out_dir", folder, *flags)
        return folder

    return run


def steps(folder, name="grpo_32"):
    rows = [row for row in read_jsonl(folder / f"{name}.jsonl") if "loss" in row]
    return [{key: value for key, value in row.items() if key not in VOLATILE} for row in rows]


# ---- training and logs -----------------------------------------------------------------------------------------------
def test_the_reward_rises(grpo, capsys):
    folder = grpo("--max_steps", 40, "--group_size", 16, "--prompts_per_step", 8, "--learning_rate", "1e-2")
    rows = steps(folder)
    for row in rows[::4]:
        print(row)
    assert sum(row["reward"] for row in rows[:4]) / 4 < 0.1 and sum(row["reward"] for row in rows[-4:]) / 4 > 0.8
