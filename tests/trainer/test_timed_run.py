"""1-pretrain.py --minutes (trainer/timed_run.py, trainer/speed.py): whole runs, resumed runs, machines that slow down.

In these tests a fake measurement states the speed of the machine, and the choice follows it. The runs themselves are of
tiny models, which take seconds on any machine.
"""

import dataclasses
import json
import re
import sys
import time

import pytest
import torch

from common.cli import parse
from corpus.dataset_meta import read_meta
from tests.helpers import (
    EXACT_FLAGS,
    TINY_MODEL_FLAGS,
    load_script,
    load_weights,
    one_line_error,
    read_jsonl,
    run_here,
    run_process,
    run_script,
    visible_names,
)
from tests.trainer.test_resume import assert_equal_to_the_bit, stop_after
from trainer import dial, speed, timed_run
from trainer.distributed import DistContext
from trainer.scaling_law import ScalingLaw
from trainer.throughput import flops_per_token

TINY_LADDER = ((64, 1, 1, 32), (64, 2, 1, 32), (128, 2, 1, 32), (192, 3, 1, 32))
TINY_LAW = ScalingLaw("total", E=1, A=50, alpha=0.3, B=50, beta=0.3)
RUN_FLAGS = [*EXACT_FLAGS, "--batch_size", "4", "--eval_interval", "50"]


@pytest.fixture
def measured(monkeypatch):
    """Replaces the measurement by a machine of `speed` FLOP/s; lists the sizes that are measured."""
    seen = []

    def pretend(flops_per_second):
        def measure_step(config, stage, dist, rows_per_step, seconds):
            seen.append(size := stage.model.config)
            torch.manual_seed(config.seed)
            return rows_per_step * size.max_seq_len * flops_per_token(size, size.max_seq_len) / flops_per_second

        monkeypatch.setattr(timed_run, "measure_step", measure_step)
        return seen

    monkeypatch.setattr("time.process_time", lambda: 0.0)  # what the tests before have used
    monkeypatch.setattr(dial, "LADDER", TINY_LADDER)
    monkeypatch.setattr(timed_run, "read_law", lambda: TINY_LAW)
    return pretend


@pytest.fixture
def pretrain(monkeypatch, capsys, pretrain_dir, tokenizer_dir, tmp_path):
    """Run lesson 1 in this process; returns (output folder, text)."""

    def run(name, *flags):
        where = ["--data_path", pretrain_dir, "--tokenizer", tokenizer_dir, "--out_dir", tmp_path / name]
        run_script(monkeypatch, "1-pretrain.py", *where, *RUN_FLAGS, *flags)
        return tmp_path / name, capsys.readouterr().out

    return run


def planned_steps(text):
    return int(re.search(r"([\d,]+) steps in all", text)[1].replace(",", ""))


def last_step(folder):
    (log,) = folder.glob("*.jsonl")
    return max(row["step"] for row in read_jsonl(log))


# ---- a whole run -----------------------------------------------------------------------------------------------------
def test_a_run_of_some_minutes_says_its_choice_trains_it_and_compares_it_with_the_prediction(measured, pretrain):
    seen = measured(5e7)
    folder, text = pretrain("run", "--minutes", "10")
    choice = re.search(r"^10 minutes here: (\S+) M parameters, (\S+) M tokens, expect (\S+) bits per byte$", text, re.M)
    result = re.search(
        r"^predicted (\S+), reached (\S+) bits per byte \((en|zh) (\S+), (en|zh) (\S+)\), ([+-]\S+)%, "
        r"after (\S+) of 10 minutes$", text, re.M,
    )  # fmt: skip
    assert choice and result and result[1] == choice[3]
    last = [row for row in read_jsonl(next(folder.glob("*.jsonl"))) if "bits_per_byte" in row][-1]
    assert float(result[2]) == pytest.approx(sum(last["bits_per_byte"].values()) / 2, abs=0.0051)
    assert float(result[7]) == pytest.approx(100 * (float(result[2]) / float(result[1]) - 1), abs=0.6)
    assert last["step"] == planned_steps(text) > 4
    assert f"{planned_steps(text) * 4 * 32 / 1e6:.1f}" == choice[2]
    assert not list(folder.glob("*.resume")) and "docs/size_sweep.csv" in text
    assert seen[0].n_layers == 1 and len(set(seen)) == len(seen), "the smallest first, none twice"


def test_the_run_equals_one_with_the_chosen_size_and_steps_on_the_command_line(measured, pretrain):
    measured(3e7)
    chosen, text = pretrain("chosen", "--minutes", "4", *TINY_MODEL_FLAGS, "--dropout", "0.1")
    given, _ = pretrain("given", "--max_steps", planned_steps(text), *TINY_MODEL_FLAGS, "--dropout", "0.1")
    assert_equal_to_the_bit(given, chosen)


def test_a_real_measurement_changes_neither_weights_nor_data(monkeypatch, pretrain):
    """As above, but with measured steps: they leave the same random numbers behind."""
    monkeypatch.setattr("time.process_time", lambda: 0.0)  # what the tests before have used
    real, seen = speed.measure_step, []
    monkeypatch.setattr(timed_run, "measure_step", lambda *given: seen.append(real(*given)) or 1.0)
    chosen, text = pretrain("chosen", "--minutes", "5", *TINY_MODEL_FLAGS)
    assert len(seen) == 1 and 0 < seen[0] < 60 and 2 <= planned_steps(text) < 300
    given, _ = pretrain("given", "--max_steps", planned_steps(text), *TINY_MODEL_FLAGS)
    assert_equal_to_the_bit(given, chosen)


@pytest.fixture
def choose(capsys, pretrain_dir, tokenizer, tmp_path):
    """Return (configuration, plan, text) of --minutes without training."""

    def run(minutes, *flags, dist=None):
        lesson = load_script("1-pretrain.py")
        where = ["--data_path", str(pretrain_dir), "--out_dir", str(tmp_path), "--minutes", str(minutes)]
        config = parse(lesson.PretrainConfig, None, [*where, *RUN_FLAGS, *flags])
        dist = dist or DistContext(torch.device("cpu"), torch.float32)
        run = timed_run.TimedRun(config, tokenizer, lesson.compute_loss, None, dist, time.monotonic())
        return *run.choose(), capsys.readouterr().out

    return run


def test_a_faster_machine_takes_a_larger_model_in_the_same_minutes(measured, choose):
    sizes = []
    for flops_per_second in (3e7, 3e8, 3e9):
        measured(flops_per_second)
        config, plan, _ = choose(6)
        sizes.append(config.model["dim"] * config.model["n_layers"])
        assert config.max_steps == plan["steps"] and 0 < config.max_minutes < 6 and not config.minutes
    assert sizes[0] < sizes[1] < sizes[2]


def test_a_size_that_does_not_fit_into_memory_is_no_candidate(monkeypatch, measured, choose):
    measured(3e9)
    config, _, _ = choose(10)
    assert config.model["dim"] == 192
    monkeypatch.setattr(timed_run, "machine_memory", lambda: 6e6)
    less, _, _ = choose(10)
    assert less.model["dim"] == 64
    shared = DistContext(torch.device("cpu"), torch.float32, 0, 2)
    shared.all_reduce_sum = lambda values: values
    assert choose(10, dist=shared)[0].model["n_layers"] == 1, "two processes share the memory"
    with one_line_error("2 processes", "--global_batch_size 3"):
        choose(10, "--global_batch_size", "3", dist=shared)
    monkeypatch.setattr(timed_run, "machine_memory", lambda: 1e5)
    with one_line_error("no size fits into 0.0 GB", "--batch_size"):
        choose(10)
    assert "10 minutes here" in choose(10, *TINY_MODEL_FLAGS)[2], "a size that the user gives is trained"


def test_a_run_that_compiles_counts_on_the_speed_of_a_compiled_step_and_a_short_run_does_not_compile(
    monkeypatch, measured, choose
):
    measured(1e8)
    uncompiled, seen = timed_run.measure_step, []
    _, plain, _ = choose(30, *TINY_MODEL_FLAGS)

    def measure_step(config, *given):
        seen.append(config.compile)
        return uncompiled(config, *given) / (3 if config.compile == "on" else 1)

    monkeypatch.setattr(timed_run, "measure_step", measure_step)
    monkeypatch.setattr(timed_run, "decide_compile", lambda config, *_: dataclasses.replace(config, compile="on"))
    config, plan, _ = choose(30, *TINY_MODEL_FLAGS)
    assert seen == ["off", "on"] and config.compile == plan["compile"] == "on" and plain["compile"] == "off"
    assert 1.5 * plain["steps"] < plan["steps"] <= 3 * plain["steps"]
    config, plan, _ = choose(3, *TINY_MODEL_FLAGS)
    assert seen[2:] == ["off"] and config.compile == plan["compile"] == "off"
    assert choose(3, *TINY_MODEL_FLAGS, "--compile", "on")[0].compile == "on", "unless the flag says so"


def test_repeated_text_is_reported(measured, choose, pretrain_dir):
    measured(1e8)
    _, plan, text = choose(4)
    passes = plan["tokens"] / read_meta(pretrain_dir)["splits"]["train"]["tokens"]
    assert passes > 4 and f"the data is read {passes:.1f} times" in text


def test_a_mixture_of_experts_keeps_its_size_and_gets_no_prediction(measured, choose):
    measured(1e9)
    config, plan, text = choose(4, *TINY_MODEL_FLAGS, "--use_moe")
    assert config.model["use_moe"] and config.model["dim"] == 32 and "no prediction for MoE" in text
    assert not plan["bits_per_byte"]


# ---- interruptions ---------------------------------------------------------------------------------------------------
def test_an_interrupted_run_keeps_its_size_and_steps_and_ends_with_equal_weights(monkeypatch, measured, pretrain):
    seen = measured(3e7)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        parts, stopped = pretrain("parts", "--minutes", "6")
    assert "predicted" not in stopped and last_step(parts) == 5
    del seen[:]
    measured(3e8)  # a choice made now would be another one
    _, resumed = pretrain("parts", "--minutes", "6")
    assert not seen and planned_steps(resumed) == planned_steps(stopped) > 20
    assert "an interrupted run of 6 minutes continues" in resumed and "resuming after step 5" in resumed
    assert re.search(r"^predicted .* reached", resumed, re.M)
    (path,) = parts.glob("*.pth")
    size = torch.load(path, weights_only=True)["config"]
    given = [f"--{name}={size[name]}" for name in dial.ladder_fields(TINY_LADDER[0])]
    whole, _ = pretrain("whole", "--max_steps", planned_steps(stopped), *given)
    mine, theirs = load_weights(path), load_weights(whole / path.name)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_other_minutes_do_not_resume_an_interrupted_run(monkeypatch, measured, pretrain):
    measured(3e7)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        pretrain("run", "--minutes", "4", *TINY_MODEL_FLAGS)
    with one_line_error("--minutes was 4", "is 5", "--resume never"):
        pretrain("run", "--minutes", "5", *TINY_MODEL_FLAGS)
    _, text = pretrain("run", "--minutes", "5", *TINY_MODEL_FLAGS, "--resume", "never")
    assert "5 minutes here" in text and "resuming" not in text


def test_a_machine_that_becomes_slower_ends_in_time_with_a_low_rate_and_says_what_is_missing(measured, pretrain):
    """The measurement states a speed that no machine has, so the minutes are over long before the steps."""
    measured(1e15)
    folder, text = pretrain("slow", "--minutes", "0.12", *TINY_MODEL_FLAGS, "--log_interval", "1")
    steps = planned_steps(text)
    last = [row for row in read_jsonl(folder / "pretrain_32.jsonl") if "lr" in row][-1]
    assert steps > 10**6 and last["step"] < steps / 10 and last["lr"] < 0.2 * 8e-3
    assert "training was slower than measured: 0% of the steps" in text
    assert f"the minutes are over at step {last['step']}" in text and "run again to resume" not in text
    assert not (folder / "pretrain_32.resume").exists(), "the next run of these minutes is a new one"


# ---- the command -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [["--minutes", "nan"], ["--minutes", "3", "--max_steps", "9"], ["--preset", "auto"]])
def test_an_invalid_command_ends_with_one_line_and_exit_code_2(monkeypatch, capsys, flags):
    ended = run_here(monkeypatch, capsys, "1-pretrain.py", *flags)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and not ended.stdout


def test_two_processes_measure_choose_and_train_the_same_run(pretrain_dir, tokenizer_dir, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    where = ["--data_path", pretrain_dir, "--tokenizer", tokenizer_dir, "--out_dir", tmp_path, "--device", "cpu"]
    flags = ["--minutes", "0.3", *TINY_MODEL_FLAGS, "--batch_size", "4", "--eval_tokens", "1024"]
    result = run_process(*torchrun, "1-pretrain.py", *where, *flags)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("0.3 minutes here") == result.stdout.count("predicted") == 1
    assert visible_names(tmp_path) == ["pretrain_32.jsonl", "pretrain_32.png", "pretrain_32.pth", "report.html"]
    entry = torch.load(tmp_path / "pretrain_32.pth", weights_only=True)["lineage"][-1]
    assert entry["steps"] >= 1 and json.dumps(entry)
