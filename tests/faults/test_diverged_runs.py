"""Promise: a run with non-finite losses or a diverging loss exits with code 2 and keeps the last valid checkpoint."""

import math
import re
import sys

import pytest
import torch

from common.cli import parse
from common.errors import UserError
from tests.helpers import ROOT, TINY_MODEL_FLAGS, load_weights, run_here, run_process, run_script
from trainer.config import TrainConfig

SHORT = [*TINY_MODEL_FLAGS, "--device", "cpu", "--dtype", "float32", "--batch_size", "4", "--log_interval", "1"]
SHORT += ["--max_steps", "8", "--save_interval", "2", "--eval_interval", "1000"]


@pytest.fixture
def run_flags(pretrain_dir, tokenizer_dir, tmp_path):
    return [*SHORT, "--data_path", pretrain_dir, "--tokenizer", tokenizer_dir, "--out_dir", tmp_path / "out"]


@pytest.fixture
def run_pretrain(monkeypatch, run_flags, tmp_path):
    def run(*more):
        run_script(monkeypatch, "1-pretrain.py", *run_flags, *more)
        return tmp_path / "out"

    return run


def replace_losses(monkeypatch, steps, value=math.nan):
    """Multiply the losses of these training steps (from 1) by `value`; returns a list that grows with each step."""
    from trainer import loop

    real, seen = loop.train_step, []

    def train_step(engine, micro_batches):
        seen.append(1)
        if len(seen) not in steps:
            return real(engine, micro_batches)
        forward_backward = engine.forward_backward

        def poisoned(batch, loss_scale, is_last):
            loss, metrics = forward_backward(batch, loss_scale, is_last)
            return loss * value, metrics

        engine.forward_backward = poisoned
        try:
            return real(engine, micro_batches)
        finally:
            engine.forward_backward = forward_backward

    monkeypatch.setattr(loop, "train_step", train_step)
    return seen


def saved_steps(out):
    return sorted(int(folder.name[5:]) for folder in out.glob("*.resume/step_*"))


def test_a_diverged_run_exits_with_2_and_saves_nothing(run_flags, num_attacks, record_attacks, monkeypatch, capsys):
    """Regression: such a run saved weights of 5e10 and exited with 0."""
    ended = 0
    for steps, optimizer in [(1, "muon"), (45, "adamw"), (2, "muon"), (8, "adamw"), (45, "muon")][: num_attacks(1, 5)]:
        command = [*run_flags, "--max_steps", steps, "--learning_rate", "1e3", "--optimizer", optimizer]
        result = run_here(monkeypatch, capsys, ROOT / "1-pretrain.py", *command)
        assert result.returncode == 2, result.stderr
        assert re.fullmatch(
            r"error: step \d+: the loss has risen to \S+, above 16.82 \(--max_loss_ratio 3; 0: off\): lower "
            r"--learning_rate; no step is saved: the same command starts anew\n",
            result.stderr,
        )
        assert not list(run_flags[-1].glob("*.pth")) and "saved" not in result.stdout
        ended += 1
    record_attacks("runs with --learning_rate 1e3", ended, ended_with_2=ended)


def test_two_ranks_stop_together_and_print_one_line(run_flags):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = run_process(*torchrun, ROOT / "1-pretrain.py", *run_flags, "--learning_rate", "1e3")
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "the loss has risen" in lines[0], result.stderr
    assert "exitcode  : 2" in result.stderr and not list(run_flags[-1].glob("*.pth"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_divergence_error_names_cause_step_and_remedy(value, monkeypatch, run_pretrain):
    replace_losses(monkeypatch, set(range(5, 99)), value)
    with pytest.raises(UserError) as caught:
        run_pretrain()
    assert re.fullmatch(
        r"step 8: the loss is not finite 4 steps in a row; the last batch held data rows \[\d+, \d+, \d+, \d+\]: "
        r"lower --learning_rate, check these data rows, or use --dtype float32; the same command resumes from step 4",
        str(caught.value),
    )


def test_five_skipped_steps_end_the_run_and_the_last_checkpoint_is_kept(
    monkeypatch, run_pretrain, capsys, tmp_path, num_attacks
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        replace_losses(patch, set(range(6, 99)))
        with pytest.raises(UserError, match=r"step 10: the loss is not finite 5 steps in a row; .* from step 4$"):
            run_pretrain("--max_steps", "20")
    before = load_weights(out / "pretrain_32.pth")
    assert saved_steps(out) == [4] and all(torch.isfinite(tensor).all() for tensor in before.values())
    for _ in range(num_attacks(2, 10)):
        capsys.readouterr()
        with monkeypatch.context() as patch:
            replace_losses(patch, set(range(2, 99)))
            with pytest.raises(UserError, match=r"step 10: .* from step 4$"):
                run_pretrain("--max_steps", "20")
        message = capsys.readouterr().out
        assert "resuming after step 4" in message and "saved" not in message.splitlines()[-1]
        assert "before: step 10: the loss is not finite 5 steps in a row" in message, "the next start prints the advice"
        assert saved_steps(out) == [4]
        assert all(torch.equal(before[name], tensor) for name, tensor in load_weights(out / "pretrain_32.pth").items())
    run_pretrain("--max_steps", "20")  # the losses are finite again
    assert not list(out.glob("*.resume"))
    assert any(not torch.equal(before[name], tensor) for name, tensor in load_weights(out / "pretrain_32.pth").items())


@pytest.mark.parametrize(
    ("skipped", "extra_flags"),
    [({1, 2, 3}, ["--max_steps", "3"]), ({8}, []), ({3}, ["--max_minutes", "0.0001", "--max_steps", "9"]), ({1}, [])],
    ids=["all 3 steps", "last step", "time limit", "signal"],
)
def test_ending_at_a_skipped_step_is_an_error(skipped, extra_flags, monkeypatch, run_pretrain, request):
    from trainer import loop

    if "time" in request.node.callspec.id:
        skipped = {1}  # the time limit allows only one step
    replace_losses(monkeypatch, skipped)
    if "signal" in request.node.callspec.id:
        read = loop.LaunchedStep.read
        monkeypatch.setattr(loop.LaunchedStep, "read", lambda step: {**read(step), "stop_requests": 1.0})
    with pytest.raises(UserError, match=r"the loss is not finite.*(starts anew|resumes from step 6)$"):
        run_pretrain(*extra_flags)


def test_a_run_of_skipped_steps_never_saves_the_parent_as_its_result(monkeypatch, tiny_parent, sft_dir, tmp_path):
    replace_losses(monkeypatch, {1, 2})
    command = ["--device", "cpu", "--init_from", tiny_parent, "--data_path", sft_dir, "--out_dir", tmp_path]
    with pytest.raises(UserError, match="no step is saved"):
        run_script(monkeypatch, "3-full_sft.py", *command, "--max_steps", "2", "--batch_size", "4")
    assert not (tmp_path / "full_sft_32.pth").exists()


def test_an_fp16_scaler_that_skips_every_step_saves_nothing(monkeypatch, run_pretrain, tmp_path):
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *given, **named: real(*given, init_scale=2.0**60, **named))
    with pytest.raises(UserError, match="the gradient is not finite 8 steps in a row"):
        run_pretrain("--dtype", "float16")
    assert not list((tmp_path / "out").glob("*.pth"))


def test_a_save_due_at_a_skipped_step_happens_at_the_next_good_step(monkeypatch, run_pretrain, capsys):
    from trainer.checkpoint_writer import CheckpointWriter

    save, saved = CheckpointWriter.start_writing, []

    def recorded_save(self, train_state, *more):
        saved.append(train_state.step)
        return save(self, train_state, *more)

    monkeypatch.setattr(CheckpointWriter, "start_writing", recorded_save)
    replace_losses(monkeypatch, {4, 5})
    run_pretrain()
    assert saved == [2, 6, 8, 8], "step 4 waits for step 6; the end is saved before and after the validation"
    assert "step 4 is not saved: the loss is not finite" in capsys.readouterr().out


@pytest.mark.parametrize("change", [math.inf, math.nan, 1e6], ids=["inf", "nan", "explodes"])
@pytest.mark.parametrize("step", [4, 8])
def test_a_state_that_diverged_in_its_last_step_is_not_saved(change, step, monkeypatch, run_pretrain, tmp_path):
    """The loss of a step belongs to the weights before it, so a save checks the weights and computes the loss again."""
    from trainer.engine import Engine

    real, steps, out = Engine.optimizer_step, [], tmp_path / "out"

    def bad_step(self, *given):
        real(self, *given)
        steps.append(1)
        if len(steps) == step:
            with torch.no_grad():
                self.model.model.layers[0].mlp.down_proj.weight.mul_(change)
                self.model.model.embed_tokens.weight.mul_(change)

    monkeypatch.setattr(Engine, "optimizer_step", bad_step)
    with pytest.raises(UserError, match=f"resumes from step {step - 2}$"):
        run_pretrain()
    assert saved_steps(out) == [step - 2]
    assert all(tensor.abs().max() < 100 for tensor in load_weights(out / "pretrain_32.pth").values())


def test_a_validation_that_is_not_finite_is_an_error(monkeypatch, run_pretrain, capsys):
    from trainer import loop

    real = loop.validate
    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", lambda *given: {**real(*given), "val_loss": {"zh": math.nan, "en": 1.0}})
        for _ in range(2):
            with pytest.raises(UserError, match=r"loss of zh is not finite: use --dtype float32; .* from step 8$"):
                run_pretrain()
    out = run_pretrain()
    assert "resuming after step 8" in capsys.readouterr().out and not list(out.glob("*.resume"))


def test_divergence_with_finite_losses_ends_the_run(monkeypatch, run_pretrain):
    with pytest.raises(UserError, match=r"the loss has risen to \d\d.*, above 16.82 .*the same command resumes"):
        run_pretrain("--learning_rate", "3", "--optimizer", "adamw", "--max_steps", "45")
    out = run_pretrain("--learning_rate", "3", "--optimizer", "adamw", "--max_steps", "45", "--max_loss_ratio", "0")
    assert (out / "pretrain_32.pth").exists(), "0 turns it off"


@pytest.mark.parametrize(
    ("unit", "lineage", "losses"),
    [("token", [], [5.6, 9, 14, 16, 12, 9, 7]),  # peak after a short warm-up
     ("token", [{}], [0.1, 6, 2, 8, 0.5, 7, 7, 7, 7, 7, 7]),  # batches of one chat, a new language, another mixture
     ("token", [{}], [9, 11, 10, 8]),  # a domain that is new to the parent
     ("token", [{}], [2.0] * 9 + [50] + [2.0] * 9),  # one damaged row
     ("pair", [{}], [0.69, 0.9, 3.0, 0.1, 5, 5]),  # DPO with few pairs per batch
     ("pair", [{}], [25.0, 40, 60, 20]),  # IPO with beta 0.1
     ("pair", [{}], [0.05, 0.3, 1.5, 4])],  # SimPO, whose first loss depends on the parent
)  # fmt: skip
def test_healthy_losses_do_not_end_a_run(unit, lineage, losses):
    guard = make_loss_guard(unit, lineage)
    for loss in losses:
        guard.train_state.loss = loss
        guard.check_step({"skipped": False, "loss": loss}, [])


def make_loss_guard(unit, lineage):
    import types

    from trainer.distributed import DistContext
    from trainer.loss_guard import NonFiniteGuard

    config = types.SimpleNamespace(vocab_size=272)
    stage = types.SimpleNamespace(model=types.SimpleNamespace(config=config), loss_unit=unit, lineage=lineage)
    stage.checkpoint_path = lambda out_dir: ROOT / "out" / "model.pth"
    return NonFiniteGuard(TrainConfig(), stage, None, None, DistContext(torch.device("cpu"), torch.float32))


def test_the_help_lists_the_divergence_limits(capsys):
    with pytest.raises(SystemExit):
        parse(TrainConfig, None, ["--help_all"])
    message = " ".join(capsys.readouterr().out.split())
    assert "mean loss of the last 10 steps exceeds this multiple of the first loss (0: off)" in message
    for bad in ("1", "-1", "nan", "inf"):
        with pytest.raises(UserError, match=r"0 \(off\) or a number of at least 1\.5"):
            parse(TrainConfig, None, ["--max_loss_ratio", bad])
