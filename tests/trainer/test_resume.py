"""A killed and resumed run ends with exactly the weights of an uninterrupted one; invalid resume folders."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from common.checksums import with_checksum
from common.errors import UserError
from common.locks import lock_output
from corpus import dataset_meta
from corpus.dataset_meta import read_meta
from model.config import ModelConfig
from tests.helpers import (
    EXACT_FLAGS,
    ROOT,
    TINY_MODEL_FLAGS,
    load_weights,
    read_jsonl,
    run_process,
    run_script,
    write_shards,
)
from trainer.checkpoint_writer import shared_errors
from trainer.config import TrainConfig
from trainer.distributed import DistContext
from trainer.state_files import read_checked_json
from trainer.train_state import changed_settings, complete_steps, read_train_state

COMMON = [*TINY_MODEL_FLAGS, "--dropout", "0.1", "--batch_size", "4", "--accumulation_steps", "2", "--epochs", "3"]
COMMON += [*EXACT_FLAGS, "--eval_interval", "5", "--save_interval", "3"]
# 59 rows / 8 = 8 steps per epoch (the last one shorter), 24 in all; saves at steps 3, 6, 9, ...


@pytest.fixture
def arguments(pretrain_dir, tokenizer_dir):
    return [*COMMON, "--data_path", str(pretrain_dir), "--tokenizer", str(tokenizer_dir)]


@pytest.fixture(scope="module")
def uninterrupted(pretrain_dir, tokenizer_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        arguments = [*COMMON, "--data_path", pretrain_dir, "--tokenizer", tokenizer_dir, "--out_dir", out]
        run_script(patch, "1-pretrain.py", *arguments)
    return out


def assert_equal_to_the_bit(one, other):
    mine, theirs = load_weights(one / "pretrain_32.pth"), load_weights(other / "pretrain_32.pth")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    losses = [
        [(row["step"], row["loss"]) for row in read_jsonl(folder / "pretrain_32.jsonl") if "loss" in row]
        for folder in (one, other)
    ]
    assert losses[0] == losses[1], "the log has every step once"


class Killed(BaseException):
    """Simulates SIGKILL: no handler catches it."""


@pytest.mark.parametrize("kill_at", [2, 3, 7, 8, 9, 17])
def test_run_killed_between_steps_ends_with_equal_weights(monkeypatch, kill_at, uninterrupted, arguments, tmp_path):
    """Kills before the first save, right after a save, before, at and after the end of an epoch, in the third epoch."""
    from trainer import loop

    real_step, done = loop.train_step, 0

    def step_then_die(*positional):
        nonlocal done
        if done == kill_at:
            raise Killed
        done += 1
        return real_step(*positional)

    monkeypatch.setattr(loop, "train_step", step_then_die)
    with pytest.raises(Killed):
        run_script(monkeypatch, "1-pretrain.py", *arguments, "--out_dir", tmp_path)
    monkeypatch.setattr(loop, "train_step", real_step)
    assert (tmp_path / "pretrain_32.resume").exists() == (kill_at >= 3)
    run_script(monkeypatch, "1-pretrain.py", *arguments, "--out_dir", tmp_path)
    assert_equal_to_the_bit(uninterrupted, tmp_path)
    assert not (tmp_path / "pretrain_32.resume").exists(), "removed when the stage is complete"


def final_outputs(folder):
    """Return the weights and the log of a run, without times, speeds and memory."""
    volatile = ("seconds", "seconds_left", "tokens_per_second", "peak_memory_mb")
    rows = [{k: v for k, v in row.items() if k not in volatile} for row in read_jsonl(folder / "pretrain_32.jsonl")]
    return {name: tensor.tolist() for name, tensor in load_weights(folder / "pretrain_32.pth").items()}, rows


@pytest.mark.parametrize("ended_by", ["last step", "early stop"])
def test_run_killed_in_the_final_cleanup_ends_with_equal_outputs(monkeypatch, ended_by, arguments, tmp_path):
    """The same command then trains no further step and ends with the same weights and log."""
    from trainer import checkpoint_writer, loop

    if ended_by == "early stop":
        real = loop.train

        def train_with_early_stop(config, stage, dist):
            stage.early_stop = lambda row: "enough" if row["step"] >= 5 else ""
            return real(config, stage, dist)

        monkeypatch.setattr(loop, "train", train_with_early_stop)

    real_remove = checkpoint_writer.remove

    def die_at_the_end(path):
        if path.suffix == ".resume" and path.exists():
            raise Killed
        real_remove(path)

    run_script(monkeypatch, "1-pretrain.py", *arguments, "--max_steps", "7", "--out_dir", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint_writer, "remove", die_at_the_end)
        run_script(monkeypatch, "1-pretrain.py", *arguments, "--max_steps", "7", "--out_dir", tmp_path / "killed")
    assert (tmp_path / "killed" / "pretrain_32.resume").exists()
    run_script(monkeypatch, "1-pretrain.py", *arguments, "--max_steps", "7", "--out_dir", tmp_path / "killed")
    assert final_outputs(tmp_path / "killed") == final_outputs(tmp_path / "whole")
    assert not (tmp_path / "killed" / "pretrain_32.resume").exists()


def start_and_wait_for_step(arguments, out, step):
    command = [sys.executable, ROOT / "1-pretrain.py", *arguments, "--out_dir", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*map(str, command)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log, deadline = out / "pretrain_32.jsonl", time.monotonic() + 60
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


def test_run_ended_by_sigkill_ends_with_equal_weights(monkeypatch, uninterrupted, arguments, tmp_path):
    process = start_and_wait_for_step(arguments, tmp_path, 10)
    process.kill()
    process.wait()
    leftovers = [path.name for path in tmp_path.iterdir() if path.name.endswith(".pth")]
    assert leftovers == ["pretrain_32.pth"]
    run_script(monkeypatch, "1-pretrain.py", *arguments, "--out_dir", tmp_path)
    assert_equal_to_the_bit(uninterrupted, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_before_exit(monkeypatch, number, uninterrupted, arguments, tmp_path):
    process = start_and_wait_for_step(arguments, tmp_path, 4)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err, err
    assert "run again to resume" in out
    (saved,) = [int(folder.name[5:]) for folder in (tmp_path / "pretrain_32.resume").iterdir()]
    logged = max(row["step"] for row in read_jsonl(tmp_path / "pretrain_32.jsonl"))
    assert saved == logged < 24, "no step is lost"
    run_script(monkeypatch, "1-pretrain.py", *arguments, "--out_dir", tmp_path)
    assert_equal_to_the_bit(uninterrupted, tmp_path)


def test_run_resumes_with_another_number_of_processes(uninterrupted, arguments, monkeypatch, tmp_path):
    """One process with 4 x 2 rows per step, resumed by two with 4 rows each: no row is lost or repeated."""
    stop_after(monkeypatch, 5)
    run_script(monkeypatch, "1-pretrain.py", *arguments, "--dropout", "0", "--out_dir", tmp_path / "parts")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = run_process(
        *torchrun, ROOT / "1-pretrain.py", *arguments, "--dropout", "0", "--out_dir", tmp_path / "parts"
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "an interrupted run, 8 rows per step" in result.stdout
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        run_script(patch, "1-pretrain.py", *arguments, "--dropout", "0", "--out_dir", tmp_path / "whole")
    parts, whole = (
        [
            (row["step"], row["tokens"], row["loss"])
            for row in read_jsonl(tmp_path / name / "pretrain_32.jsonl")
            if "loss" in row
        ]
        for name in ("parts", "whole")
    )
    assert [row[:2] for row in parts] == [row[:2] for row in whole]
    assert [row[2] for row in parts] == pytest.approx([row[2] for row in whole], rel=1e-3)


def stop_after(monkeypatch, steps):
    from trainer.loop import LaunchedStep

    real_read, done = LaunchedStep.read, 0

    def counting_read(step):
        nonlocal done
        done += 1
        return {**real_read(step), "stop_requests": float(done == steps)}

    monkeypatch.setattr(LaunchedStep, "read", counting_read)


def test_max_minutes_saves_and_resumes(monkeypatch, arguments, tmp_path, capsys):
    started = time.monotonic()
    boxed = [
        *arguments,
        "--epochs",
        "2000",
        "--max_minutes",
        "0.05",
        "--out_dir",
        tmp_path,
        "--eval_interval",
        "100000",
    ]
    run_script(monkeypatch, "1-pretrain.py", *boxed, "--log_interval", "10000", "--save_interval", "100000")
    assert time.monotonic() - started < 30
    assert "time limit of" in capsys.readouterr().out
    rows = read_jsonl(tmp_path / "pretrain_32.jsonl")
    last = [row for row in rows if "lr" in row][-1]
    assert last["lr"] < 0.1 * 8e-3, "the learning rate has decayed at the time limit"
    assert "bits_per_byte" in rows[-1] and (tmp_path / "pretrain_32.pth").exists()
    run_script(monkeypatch, "1-pretrain.py", *boxed, "--max_minutes", "0.02", "--save_interval", "100000")
    assert f"resuming after step {last['step']}" in capsys.readouterr().out
    assert max(row["step"] for row in read_jsonl(tmp_path / "pretrain_32.jsonl")) > last["step"]


def test_resume_folder_of_another_run_is_rejected(monkeypatch, arguments, tmp_path):
    stop_after(monkeypatch, 5)
    run_script(monkeypatch, "1-pretrain.py", *arguments, "--out_dir", tmp_path)
    for flags, named in ((["--seed", "7"], "--seed was 42, is 7"), (["--n_layers", "1"], r"\(n_layers was \d, is 1\)")):
        with pytest.raises(UserError, match=named):
            run_script(monkeypatch, "1-pretrain.py", *arguments, *flags, "--out_dir", tmp_path)
    run_script(
        monkeypatch,
        "1-pretrain.py",
        *arguments,
        "--seed",
        "7",
        "--resume",
        "never",
        "--max_steps",
        "2",
        "--out_dir",
        tmp_path,
    )
    assert not (tmp_path / "pretrain_32.resume").exists()


def write_equal_size_data(tokenizer, folder, seed):
    """Write random data; the number of rows does not depend on the seed."""
    random = np.random.default_rng(seed)
    splits = {
        name: [random.integers(10, 200, 64).tolist() for _ in range(n)]
        for name, n in (("train", 30), ("val_zh", 3), ("val_en", 3))
    }
    return write_shards(folder, "pretrain", tokenizer, splits)


def test_other_data_is_rejected_and_a_moved_folder_is_not(monkeypatch, tokenizer, tokenizer_dir, tmp_path, capsys):
    first, other = (write_equal_size_data(tokenizer, tmp_path / f"data{seed}", seed) for seed in (1, 2))
    command = [*COMMON, "--tokenizer", tokenizer_dir, "--max_steps", "4", "--out_dir", tmp_path / "out"]
    stop_after(monkeypatch, 2)
    run_script(monkeypatch, "1-pretrain.py", *command, "--data_path", first)
    with pytest.raises(UserError, match=r"another run \(the data's fingerprint was \w{16}, is \w{16}\)"):
        run_script(monkeypatch, "1-pretrain.py", *command, "--data_path", other)
    first.rename(tmp_path / "moved")
    run_script(monkeypatch, "1-pretrain.py", *command, "--data_path", tmp_path / "moved")
    assert "resuming after step 2" in capsys.readouterr().out


@pytest.mark.parametrize("changed", ["train_000.bin", "train_000.idx.npy"])
def test_fingerprint_without_checksums_uses_sizes_and_file_ends(tokenizer, tmp_path, changed, monkeypatch):
    folder = write_equal_size_data(tokenizer, tmp_path / "data", 1)
    meta = read_meta(folder)
    for shard in meta["splits"]["train"]["shards"]:
        shard.pop("checksums", None)
    monkeypatch.setattr(dataset_meta, "read_meta", lambda folder: meta)
    before = dataset_meta.data_fingerprint(folder)
    assert before == dataset_meta.data_fingerprint(folder) and len(before) == 16
    data = bytearray((folder / changed).read_bytes())
    for at in (0, len(data) - 1):
        (folder / changed).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert dataset_meta.data_fingerprint(folder) != before
    (folder / changed).write_bytes(data + b"x")
    assert dataset_meta.data_fingerprint(folder) != before


def test_second_run_of_the_same_model_is_rejected(monkeypatch, arguments, tmp_path):
    with (
        lock_output(tmp_path / "pretrain_32.pth"),
        pytest.raises(UserError, match=r"pretrain_32\.pth is being written by"),
    ):
        run_script(monkeypatch, "1-pretrain.py", *arguments, "--out_dir", tmp_path)
    run_script(monkeypatch, "1-pretrain.py", *arguments, "--max_steps", "1", "--out_dir", tmp_path)


def test_all_processes_end_when_one_fails():
    """All processes learn of the error by an all-reduce, so none waits forever."""
    dist = DistContext(torch.device("cpu"), torch.float32, rank=1, world_size=2)
    monkey = {"barrier": lambda: None, "all_reduce_sum": lambda values: [values[0] + 1.0]}
    for name, replacement in monkey.items():
        setattr(dist, name, replacement)
    with pytest.raises(UserError, match=r"another process could not lock m\.pth: see its error message"):
        with shared_errors(dist, "lock m.pth"):
            pass


def test_incomplete_step_folder_is_not_resumed(monkeypatch, arguments, tmp_path, capsys):
    stop_after(monkeypatch, 3)
    run_script(monkeypatch, "1-pretrain.py", *arguments, "--out_dir", tmp_path)
    (whole,) = (tmp_path / "pretrain_32.resume").iterdir()
    newer = whole.with_name("step_000000009")
    shutil.copytree(whole, newer)
    content = {**read_checked_json(newer / "progress.json"), "step": 9, "ranks": 2}
    (newer / "progress.json").write_text(json.dumps(with_checksum(content)))
    steps = complete_steps(whole.parent)
    assert [folder.name for folder, _ in steps] == [whole.name]
    shutil.copy(newer / "rank_00000.json", newer / "rank_00001.json")
    assert [folder.name for folder, _ in complete_steps(whole.parent)] == [newer.name, whole.name]
    (newer / "rank_00001.json").unlink()
    run_script(monkeypatch, "1-pretrain.py", *arguments, "--max_steps", "4", "--out_dir", tmp_path)
    assert "resuming after step 3" in capsys.readouterr().out
    assert not whole.parent.exists()


class RunsCodeWhenUnpickled:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_folder_of_an_earlier_version_is_rejected_and_never_unpickled(monkeypatch, arguments, tmp_path):
    folder = tmp_path / "pretrain_32.resume" / "step_000000003"
    folder.mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp", "rank_00000.safetensors"):
        (folder / name).write_bytes(pickle.dumps(RunsCodeWhenUnpickled(tmp_path / "executed")))
    (folder / "progress.json").write_text('{"step": 3}')
    with pytest.raises(UserError, match=r"format of an earlier version, .* finish the run with that version, or start"):
        run_script(monkeypatch, "1-pretrain.py", *arguments, "--out_dir", tmp_path)
    run_script(monkeypatch, "1-pretrain.py", *arguments, "--max_steps", "1", "--resume", "never", "--out_dir", tmp_path)
    assert not folder.exists() and not (tmp_path / "executed").exists()


ODD_PROGRESS = {
    "step": [4, -1, "3", True, None], "ranks": [0, 10**9, 1.0], "scaler": [{"scale": 1.0}, [], {"scale": "x"}],
    "identity": [{}, [], {"config": []}], "rows_per_step": [0, "8"], "validation": [None], "seconds": ["1"],
    "format": [1, None, 3],
}  # fmt: skip


def test_invalid_progress_file_is_one_line(monkeypatch, arguments, tmp_path):
    stop_after(monkeypatch, 3)
    run_script(monkeypatch, "1-pretrain.py", *arguments, "--out_dir", tmp_path)
    (folder,) = (tmp_path / "pretrain_32.resume").iterdir()
    content = read_checked_json(folder / "progress.json")
    for name, values in ODD_PROGRESS.items():
        for value in values:
            (folder / "progress.json").write_text(json.dumps(with_checksum({**content, name: value})))
            with pytest.raises(UserError, match=r"progress\.json .*: start anew with --resume never$"):
                read_train_state(TrainConfig(), tmp_path / "pretrain_32.pth")
    (folder / "progress.json").write_text(json.dumps(with_checksum(content)))
    assert read_train_state(TrainConfig(), tmp_path / "pretrain_32.pth")


def test_damaged_resume_file_is_one_line(monkeypatch, arguments, tmp_path):
    (tmp_path / "pretrain_32.resume").write_bytes(b"half a fi")
    with pytest.raises(UserError, match="--resume never"):
        run_script(monkeypatch, "1-pretrain.py", *arguments, "--out_dir", tmp_path)


def test_incomplete_checkpoint_never_has_the_final_name(monkeypatch, tmp_path):
    from model import checkpoint

    (tmp_path / "model.pth").write_bytes(b"the old one")

    def full_disk(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.atomic_save({}, tmp_path / "model.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]
    assert (tmp_path / "model.pth").read_bytes() == b"the old one"


def test_run_of_an_earlier_version_has_the_same_fingerprint():
    """Config fields that an earlier version did not save count as their defaults; other values are rejected."""
    config = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=100).to_dict()
    now = {"stage": "full_sft", "config": json.loads(json.dumps(config)), "--seed": 1}
    old = {name: value for name, value in config.items() if name not in ("head_dim", "qkv_bias", "rope_scaling")}
    assert changed_settings({**now, "config": old}, now) == []
    assert changed_settings({**now, "config": old}, {**now, "config": {**config, "qkv_bias": True}}) == [
        "qkv_bias was False, is True"
    ]
    assert changed_settings({**now, "--seed": 2, "config": {**old, "dim": 64, "head_dim": 16}}, now) == [
        "--seed was 2, is 1", "dim was 64, is 32", "head_dim was 16, is 8",
    ]  # fmt: skip
    assert changed_settings({**now, "config": {**config, "of_a_later_version": 1}}, now) == []
