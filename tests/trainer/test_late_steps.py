"""Steps that are read one step late, as on a GPU: same results, skipped steps, stops and resumed runs."""

import types

import pytest
import torch

from common.errors import UserError
from tests.helpers import EXACT_FLAGS, TINY_MODEL_FLAGS, load_script, load_weights, read_jsonl, run_script, tiny_model
from trainer import loop
from trainer.config import TrainConfig
from trainer.distributed import DistContext
from trainer.engine import DDPEngine

FLAGS = [*TINY_MODEL_FLAGS, *EXACT_FLAGS, "--batch_size", "4", "--dropout", "0.1", "--max_steps", "12"]
FLAGS += ["--eval_interval", "4", "--save_interval", "3", "--accumulation_steps", "2"]
VOLATILE = ("seconds", "seconds_left", "tokens_per_second", "peak_memory_mb")


@pytest.fixture
def pretrain(pretrain_dir, tokenizer_dir, tmp_path):
    """Run 1-pretrain.py; `late`: whether it reads one step late. Returns its weights and its log without times."""

    def run(*flags, late=True, out="late", **patches):
        folder = tmp_path / out
        paths = ["--data_path", pretrain_dir, "--tokenizer", tokenizer_dir, "--out_dir", folder]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DistContext, "reads_late", late)
            for target, value in patches.items():
                patch.setattr(*{"train_step": (loop, target), "read": (loop.LaunchedStep, target)}[target], value)
            run_script(patch, "1-pretrain.py", *FLAGS, *paths, *flags)
        rows = [{k: v for k, v in row.items() if k not in VOLATILE} for row in read_jsonl(folder / "pretrain_32.jsonl")]
        return load_weights(folder / "pretrain_32.pth"), rows

    return run


def assert_equal_to_the_bit(one, other):
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0]) and one[1] == other[1]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_late_reads_change_no_result(pretrain, optimizer):
    assert_equal_to_the_bit(pretrain("--optimizer", optimizer), pretrain("--optimizer", optimizer, late=False, out="o"))


def test_a_step_is_read_after_the_next_launch_unless_it_is_due(pretrain):
    """Steps 3, 6, 9 and 12 are followed by a save, 4, 8 and 12 by a validation: they are read at once."""
    real_step, real_read, events = loop.train_step, loop.LaunchedStep.read, []
    launch = lambda *given: events.append("launch") or real_step(*given)
    pretrain(train_step=launch, read=lambda step: events.append("read") or real_read(step))
    pairs = "".join(event[0] for event in events)
    assert pairs == "llrlrrlrllrrllrrlrllrlrr"


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_that_is_not_finite_moves_nothing(monkeypatch, optimizer):
    monkeypatch.setattr(DistContext, "reads_late", True)
    compute_loss = load_script("1-pretrain.py").compute_loss
    stage = types.SimpleNamespace(model=tiny_model(), compute_loss=compute_loss)
    dist = DistContext(torch.device("cpu"), torch.float32)
    engine = DDPEngine(TrainConfig(optimizer=optimizer), stage, dist)
    ids = torch.randint(0, 272, (4, 32), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids, "token_mask": ids >= 0, "num_targets": 128, "num_tokens": 128}
    loop.train_step(engine, [batch])
    before = {name: tensor.clone() for name, tensor in engine.state_dict().items()}
    norm = stage.model.model.norm.weight
    for poison in (float("nan"), float("inf")):
        kept = norm.detach().clone()
        norm.data[3] = poison
        sums = loop.train_step(engine, [batch]).read()
        norm.data.copy_(kept)
        assert not torch.isfinite(torch.tensor(sums["grad_norm"]))
        after = engine.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
    loop.train_step(engine, [batch])
    after = engine.state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in before if name.startswith("model."))


def make_nan(steps):
    """A train_step whose sums have a NaN loss at these steps, from 1, which are skipped."""
    real, seen = loop.train_step, []

    def train_step(engine, micro_batches):
        seen.append(1)
        forward_backward = engine.forward_backward
        if len(seen) in steps:
            engine.forward_backward = lambda *given: (lambda loss, metrics: (loss * float("nan"), metrics))(
                *forward_backward(*given)
            )
        try:
            return real(engine, micro_batches)
        finally:
            engine.forward_backward = forward_backward

    return train_step


def test_skipped_steps_are_the_same_steps(pretrain, capsys):
    late = pretrain("--optimizer", "adamw", train_step=make_nan({2, 6}))
    text = capsys.readouterr().out
    assert "step 2 skipped" in text and "step 6 skipped" in text and "step 6 is not saved" in text
    at_once = pretrain("--optimizer", "adamw", late=False, out="at_once", train_step=make_nan({2, 6}))
    assert str(late[1]) == str(at_once[1]), "as text, because NaN is not equal to NaN"
    assert all(torch.equal(late[0][name], at_once[0][name]) for name in late[0])


def test_five_skipped_steps_end_the_run(pretrain):
    with pytest.raises(UserError, match=r"^step 7: the loss is not finite 5 steps in a row; .* resumes from step 2$"):
        pretrain("--optimizer", "adamw", "--save_interval", "2", train_step=make_nan(range(3, 13)))


@pytest.mark.parametrize(("stop", "last"), [(5, 6), (3, 3), (12, 12)])
def test_a_stop_ends_the_run_at_most_one_step_later(pretrain, stop, last, capsys):
    """Step 6 is launched when step 5 is read. Step 3 is followed by a save, so it is read at once."""
    real = loop.LaunchedStep.read
    reads = []

    def read(step):
        reads.append(1)
        return {**real(step), "stop_requests": float(len(reads) >= stop)}

    _, rows = pretrain(read=read)
    assert rows[-1]["step"] == last
    if last < 12:
        assert f"step {last} of 12; run again to resume" in capsys.readouterr().out
        assert_equal_to_the_bit(pretrain(), pretrain(late=False, out="whole"))


class Killed(BaseException):
    """Simulates SIGKILL: no handler catches it."""


@pytest.mark.parametrize("kill_at", [5, 8])
def test_a_killed_run_resumes_to_the_same_bits(pretrain, kill_at):
    real, done = loop.train_step, []

    def train_step(*given):
        if len(done) == kill_at:
            raise Killed
        done.append(1)
        return real(*given)

    with pytest.raises(Killed):
        pretrain(train_step=train_step)
    assert_equal_to_the_bit(pretrain(), pretrain(late=False, out="whole"))


def test_a_time_limit_ends_a_late_run(pretrain, capsys):
    weights, rows = pretrain("--max_minutes", "0.02", "--max_steps", "5000", "--save_interval", "5000")
    assert "time limit of" in capsys.readouterr().out and 2 <= rows[-1]["step"] < 5000 and weights
