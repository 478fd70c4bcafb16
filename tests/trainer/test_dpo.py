"""5-dpo_train.py: the first loss is ln 2, preferences are learnt, early stop, reference cache, exact resume."""

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from corpus.dataset_meta import write_meta
from model.checkpoint import save_model
from model.config import ModelConfig
from model.transformer import Transformer
from tests.helpers import ROOT, free_port, load_weights, read_jsonl, run_process, run_script, visible_names
from trainer import dpo as dpo_module
from trainer.dpo import has_loop

# AdamW, because Muon orthogonalises in bf16, which amplifies rounding differences.
SHORT = [
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--optimizer",
    "adamw",
    "--learning_rate",
    "1e-3",
    "--log_interval",
    "1",
]
SHORT += ["--warmup_iters", "0", "--eval_interval", "100", "--max_chosen_drop", "0"]
SIZE = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64, "dropout": 0.1}


@pytest.fixture
def dpo_dir(tmp_path):
    """A data folder as written by data_process.py dpo, without the token folder."""
    folder = tmp_path / "dpo"
    folder.mkdir()
    for split, count in (("train", 30), ("val", 8)):
        rows = []
        for i in range(count):
            question, good, bad = (
                (f"{i}?", "yes, please" + "!" * (i % 5), "no") if i % 2 else (f"数{i}", "好的", "不" * 4)
            )
            sides = {
                side: [{"role": "assistant", "content": text}] for side, text in (("chosen", good), ("rejected", bad))
            }
            rows.append({"prompt": [{"role": "user", "content": question}], **sides, "lang": "en" if i % 2 else "zh"})
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def save_parent(out, tokenizer, seed=0, **changes):
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(tokenizer.vocab_size, **SIZE, **changes))
    lineage = [{"stage": "pretrain"}, {"stage": "full_sft", "data": str(out.parent / "sft")}]
    save_model(out / f"full_sft_{model.config.name}.pth", model, "full_sft", tokenizer, lineage)


@pytest.fixture
def dpo(monkeypatch, tokenizer, dpo_dir, tmp_path):
    """Run 5-dpo_train.py on an untrained parent; returns its output folder."""

    def run(*flags, out="out"):
        folder = tmp_path / out
        if not list(folder.glob("full_sft_*.pth")):
            save_parent(folder, tokenizer)
        run_script(monkeypatch, "5-dpo_train.py", *SHORT, "--data_path", dpo_dir, "--out_dir", folder, *flags)
        return folder

    return run


def steps(folder, name="dpo_32"):
    return [row for row in read_jsonl(folder / f"{name}.jsonl") if "loss" in row]


# ---- training and logs -----------------------------------------------------------------------------------------------
def test_dpo_starts_at_ln_2_and_learns_preferences(curves, dpo, monkeypatch, capsys):
    folder = dpo("--batch_size", 10, "--epochs", 6)
    rows, last = steps(folder), read_jsonl(folder / "dpo_32.jsonl")[-1]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    names = "reward_accuracy reward_margin chosen_logp rejected_logp kl chosen_length rejected_length "
    names += "chosen_logp_delta pairs grad_norm"
    assert all(set(names.split()) <= row.keys() for row in rows) and rows[-1]["pairs"] == 6 * 30
    assert "tokens" not in rows[0] and "aux_loss" not in rows[0], "the unit is pairs; a dense model has no router"
    assert (
        rows[-1]["loss"] < 0.5
        and rows[-1]["reward_accuracy"] == 1
        and rows[-1]["reward_margin"] > 0.5
        and rows[-1]["kl"] > 0
    )
    for name in ("val_loss", "val_reward_accuracy", "val_reward_margin", "val_kl"):
        assert last[name].keys() == {"zh", "en"}
    assert last["val_reward_accuracy"] == {"zh": 1.0, "en": 1.0} and "bits_per_byte" not in last
    assert last["loop_rate"].keys() == {"before", "after"} and last["loop_rate"]["after"].keys() == {"zh", "en"}
    said = capsys.readouterr().out
    assert "first loss 0.6931, expected 0.6931" in said and "30 pairs, 10 pairs = " in said
    assert "answers that loop, before: en" in said and "answers that loop, after: en" in said
    checkpoint = torch.load(folder / "dpo_32.pth", weights_only=True)
    assert [entry["stage"] for entry in checkpoint["lineage"]] == ["pretrain", "full_sft", "dpo"]
    entry = checkpoint["lineage"][-1]
    assert entry["pairs"] == 180 and entry["validation"]["loop_rate"] == last["loop_rate"] and "stopped" not in entry
    assert visible_names(folder) == [
        "dpo_32.jsonl", "dpo_32.png", "dpo_32.pth", "dpo_32.reference", "full_sft_32.pth", "report.html",
    ]  # fmt: skip
    run_script(
        monkeypatch, "2-eval.py", "--out_dir", folder, "--device", "cpu", "--prompt", "1?", "--max_new_tokens", 4
    )
    assert "dpo_32.pth: dpo, " in capsys.readouterr().out, "2-eval.py loads the latest stage"


@pytest.mark.parametrize(("loss", "first"), [("ipo", 25.0), ("simpo", None)])
def test_ipo_and_simpo_learn_preferences(dpo, loss, first):
    rows = steps(dpo("--loss", loss, "--batch_size", 30, "--epochs", 8, "--sft_weight", 0.1))
    assert first is None or rows[0]["preference_loss"] == pytest.approx(first, abs=1e-3)
    assert rows[-1]["preference_loss"] < rows[0]["preference_loss"] and rows[-1]["reward_accuracy"] == 1
    assert rows[0]["loss"] > rows[0]["preference_loss"], "the SFT loss of the chosen answers is added"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dpo_first_loss_in_low_precision(dpo, dtype):
    row = steps(dpo("--dtype", dtype, "--batch_size", 16, "--max_steps", 1))[0]
    assert row["loss"] == pytest.approx(math.log(2), abs=dpo_module.LOW_PRECISION_TOLERANCE / 2)


def test_reference_of_another_model_is_an_error(dpo, monkeypatch):
    real = dpo_module.reference_log_probs
    monkeypatch.setattr(dpo_module, "reference_log_probs", lambda *a: real(*a) * 1.5)
    with pytest.raises(UserError, match=r"the first loss is .*, not 0\.6931 .*delete .*dpo_32\.reference"):
        dpo("--max_steps", 2)


def test_dpo_adds_aux_loss_of_moe(dpo, tokenizer, tmp_path):
    save_parent(tmp_path / "moe", tokenizer, use_moe=True, n_routed_experts=4)
    rows = steps(dpo("--batch_size", 16, "--epochs", 4, out="moe"), "dpo_32_moe")
    assert all(0.009 < row["aux_loss"] < 0.04 for row in rows)
    assert rows[0]["preference_loss"] == pytest.approx(math.log(2), abs=1e-5) and rows[-1]["reward_accuracy"] > 0.9
    assert rows[0]["loss"] == pytest.approx(rows[0]["preference_loss"] + rows[0]["aux_loss"], abs=1e-5)


def test_dpo_starts_from_a_lora_adapter(dpo, tokenizer, tmp_path):
    """The default parent is the LoRA stage: its adapter is merged, and DPO saves a whole model."""
    from model.checkpoint import load_model, record_parent
    from model.lora import LoRAConfig, attach, lora_layers

    folder = tmp_path / "out"
    save_parent(folder, tokenizer)
    model, _, parent = load_model(folder / "full_sft_32.pth")
    attach(model, LoRAConfig(rank=2))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    record_parent(model, folder / "full_sft_32.pth", folder / "lora_sft_32.pth")
    save_model(folder / "lora_sft_32.pth", model, "lora_sft", tokenizer, [*parent["lineage"], {"stage": "lora_sft"}])
    assert steps(dpo("--max_steps", 2))[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    child = torch.load(folder / "dpo_32.pth", weights_only=True)
    assert [entry["stage"] for entry in child["lineage"]] == ["pretrain", "full_sft", "lora_sft", "dpo"]
    assert child["model"].keys() == load_weights(folder / "full_sft_32.pth").keys() and "adapter" not in child


# ---- early stop ------------------------------------------------------------------------------------------------------
def test_chosen_drop_ends_the_stage_with_a_save(dpo, capsys, monkeypatch):
    # A negative sft_weight, which the flag rejects, makes the chosen answers unlikely; DPO alone seldom does.
    monkeypatch.setattr("common.flag_types.non_negative_float", float)
    folder = dpo("--batch_size", 30, "--sft_weight", -5, "--epochs", 40, "--max_chosen_drop", 0.5)
    rows = steps(folder)
    drops = [-row["chosen_logp_delta"] / row["chosen_length"] for row in rows]
    assert len(rows) < 40 and drops[-1] > 0.5 >= max(drops[:-1]), "stops at the first step above the limit"
    said = capsys.readouterr().out
    reason = re.search(r"stopped at step (\d+) of 40: (log p of the chosen answers fell .*)\)\n", said)
    assert int(reason[1]) == len(rows) and "--max_chosen_drop 0.5" in reason[2]
    entry = torch.load(folder / "dpo_32.pth", weights_only=True)["lineage"][-1]
    assert entry["stopped"] == reason[2] and entry["validation"]["val_loss"].keys() == {"zh", "en"}
    assert not (folder / "dpo_32.resume").exists(), "the next run, with other hyper-parameters, starts anew"


def test_max_seq_len_limits_pairs(dpo, dpo_dir):
    """--max_seq_len of the training script sets the length, as the same flag of data_process.py does."""
    dpo("--max_steps", 1, "--max_seq_len", 40)
    (meta,) = dpo_dir.glob("tokens-*/meta.json")
    assert json.loads(meta.read_text())["max_seq_len"] == 40


def test_nonpositive_beta_is_rejected(dpo):
    with pytest.raises(UserError, match="--beta: 0 is not a number above 0"):
        dpo("--beta", 0)


# ---- reference cache -------------------------------------------------------------------------------------------------
def test_reference_cache_is_reused_until_an_input_changes(dpo, monkeypatch, tokenizer, dpo_dir, capsys):
    folder = dpo("--max_steps", 1)
    file, calls = folder / "dpo_32.reference", []
    real = dpo_module.reference_log_probs
    monkeypatch.setattr(dpo_module, "reference_log_probs", lambda *a: calls.append(1) or real(*a))

    def run_again(*flags):
        calls.clear()
        dpo("--max_steps", 1, "--resume", "never", *flags)
        return len(calls)

    assert run_again() == 0 and "same parent, tokenizer and data" in capsys.readouterr().out
    assert run_again("--dtype", "bfloat16") == 3, "train, val_zh, val_en: another dtype gives other values"
    assert run_again() == 3 and run_again("--beta", 0.3, "--learning_rate", "1e-5") == 0
    save_parent(folder, tokenizer, seed=1)
    assert run_again() == 3 and run_again() == 0, "another parent"
    lines = (dpo_dir / "train.jsonl").read_text(encoding="utf-8")
    (dpo_dir / "train.jsonl").write_text(lines.replace("please", "thanks"), encoding="utf-8")
    assert run_again() == 3 and run_again() == 0, "other data, of the same size"
    file.write_bytes(b"half a fi")
    assert run_again() == 3 and run_again() == 0, "a damaged file"
    assert torch.load(file, weights_only=True)["key"].keys() == {"parent", "tokenizer", "data", "dtype"}


# ---- resume, accumulation, launchers ---------------------------------------------------------------------------------
class Killed(BaseException):
    """Simulates SIGKILL: no handler catches it."""


def test_killed_dpo_run_ends_with_the_same_weights(dpo, monkeypatch, capsys):
    flags = ("--batch_size", 4, "--accumulation_steps", 2, "--epochs", 2, "--save_interval", 3, "--max_chosen_drop", 9)
    whole = dpo(*flags, out="whole")
    from trainer import loop

    real_step, done = loop.train_step, 0

    def step_then_die(*positional):
        nonlocal done
        if done == 5:
            raise Killed
        done += 1
        return real_step(*positional)

    monkeypatch.setattr(loop, "train_step", step_then_die)
    with pytest.raises(Killed):
        dpo(*flags, out="parts")
    monkeypatch.setattr(loop, "train_step", real_step)
    parts = dpo(*flags, out="parts")
    said = capsys.readouterr().out
    assert "resuming after step 3" in said and "same parent, tokenizer and data" in said
    ours, theirs = load_weights(whole / "dpo_32.pth"), load_weights(parts / "dpo_32.pth")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows = [[(row["step"], row["loss"], row["kl"]) for row in steps(folder)] for folder in (whole, parts)]
    assert rows[0] == rows[1] and len(rows[0]) == 8


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]


def test_dpo_steps_are_equal_under_accumulation_and_launchers(dpo, monkeypatch, dpo_dir, tmp_path):
    """30 pairs in steps of 8, the last one shorter: one batch, accumulated, two processes under either launcher."""
    folders = [dpo("--batch_size", 8, "--max_steps", 5, out="big")]
    folders += [dpo("--batch_size", 4, "--accumulation_steps", 2, "--max_steps", 5, out="accumulated")]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name, launcher in (("torchrun", TORCHRUN), ("deepspeed", DEEPSPEED)):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        shutil.copy(folders[0] / "full_sft_32.pth", folders[-1])
        flags = ["--batch_size", 4, "--max_steps", 5, "--data_path", dpo_dir, "--out_dir", folders[-1]]
        result = run_process(*launcher, ROOT / "5-dpo_train.py", *SHORT, *flags)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "2 process(es)" in result.stdout and result.stdout.count("saved ") == 1
    logs = [read_jsonl(folder / "dpo_32.jsonl") for folder in folders]
    for folder, log in zip(folders[1:], logs[1:], strict=True):
        for mine, theirs in zip(logs[0], log, strict=True):
            for name in {"loss", "grad_norm", "reward_margin", "chosen_logp", "kl", "chosen_length"} & mine.keys():
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (name, mine["step"])
            for split, value in mine.get("val_reward_margin", {}).items():
                assert value == pytest.approx(theirs["val_reward_margin"][split], rel=1e-3)
        for name, tensor in load_weights(folders[0] / "dpo_32.pth").items():
            torch.testing.assert_close(load_weights(folder / "dpo_32.pth")[name], tensor, rtol=1e-3, atol=1e-4)


# ---- languages and repetition loops ----------------------------------------------------------------------------------
@pytest.mark.parametrize(("chinese", "warned"), [(30, False), (55, True), (0, True)])
def test_language_mismatch_with_sft_data_is_warned(dpo, tokenizer, tmp_path, capsys, chinese, warned):
    tokens = tmp_path / "sft" / f"tokens-{tokenizer.fingerprint}"
    tokens.mkdir(parents=True)
    report = {"languages": {"zh": {"documents": chinese}, "en": {"documents": 60 - chinese}}}
    write_meta(tokens, {"kind": "chats", "dtype": "uint16", "splits": {}, "report": report})
    dpo("--max_steps", 1)
    said = capsys.readouterr().out
    assert f"50% of the pairs are Chinese, {chinese / 60:.0%} of the chats" in said
    assert ("WARNING: the language mixes differ strongly" in said) == warned


def test_missing_sft_data_skips_the_language_comparison(dpo, capsys):
    dpo("--max_steps", 1)
    assert (
        "50% of the pairs are Chinese; the chats that the parent was trained on are not available"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        ([5] * 8, True),
        ([5] * 7, False),
        ([1, 2, 3] * 4, True),
        ([9, 9, *[1, 2, 3] * 4, 8], True),
        ([1, 2, 3] * 3, False),
        ([*range(32)] * 4, True),
        ([*range(33)] * 4, False),
        ([*range(100)], False),
        ([1, 2] * 3 + [7] + [1, 2] * 3, False),
        ([], False),
    ],
)
def test_repetition_loop_is_detected(ids, loops):
    assert has_loop(ids) == loops
