"""A run whose numbers are no longer finite, or that diverges, ends with exit code 2 and keeps the last good save."""

import math
import re
import sys

import pytest
import torch

from common.errors import UserError
from tests.helpers import ROOT, TINY_MODEL, run_process, run_script, weights

SHORT = [*TINY_MODEL, "--device", "cpu", "--dtype", "float32", "--batch_size", "4", "--log_interval", "1"]
SHORT += ["--max_steps", "8", "--save_interval", "2", "--eval_interval", "1000"]


@pytest.fixture
def flags(pretrain_dir, tokenizer_dir, tmp_path):
    return [*SHORT, "--data_path", pretrain_dir, "--tokenizer", tokenizer_dir, "--out_dir", tmp_path / "out"]


@pytest.fixture
def pretrain(monkeypatch, flags, tmp_path):
    def run(*more):
        run_script(monkeypatch, "1-pretrain.py", *flags, *more)
        return tmp_path / "out"

    return run


def poison(monkeypatch, steps, value=math.nan):
    """From here on make the losses of these training steps `value`, counted from 1; returns the steps counted."""
    from trainer import loop

    real, seen = loop.train_step, []

    def train_step(run, args, engine, stage, batches):
        seen.append(1)
        if len(seen) not in steps:
            return real(run, args, engine, stage, batches)
        learn = engine.learn

        def poisoned(batch, share, last):
            loss, count, extras = learn(batch, share, last)
            return loss * value, count, extras

        engine.learn = poisoned
        try:
            return real(run, args, engine, stage, batches)
        finally:
            engine.learn = learn

    monkeypatch.setattr(loop, "train_step", train_step)
    return seen


def saved_steps(out):
    return sorted(int(folder.name[5:]) for folder in out.glob("*.resume/step_*"))


def test_a_rate_of_1000_ends_with_2_and_saves_nothing(flags, scaled, attacks):
    """Weights of 5e10 and exit code 0, before. As often as it is started."""
    ended = 0
    for steps, optimizer in [(1, "muon"), (45, "adamw"), (2, "muon"), (8, "adamw"), (45, "muon")][: scaled(1, 5)]:
        command = [*flags, "--max_steps", steps, "--learning_rate", "1e3", "--optimizer", optimizer]
        result = run_process(sys.executable, ROOT / "1-pretrain.py", *command)
        assert result.returncode == 2, result.stderr
        assert re.fullmatch(
            r"error: step \d+: the loss has risen to \S+, above 16.82 \(--max_loss_ratio 3; 0: off\): lower "
            r"--learning_rate; no step is saved: the same command starts anew\n",
            result.stderr,
        )
        assert not list(flags[-1].glob("*.pth")) and "saved" not in result.stdout
        ended += 1
    attacks("runs with --learning_rate 1e3", ended, ended_with_2=ended)


def test_two_processes_decide_alike_and_print_one_line(flags):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = run_process(*torchrun, ROOT / "1-pretrain.py", *flags, "--learning_rate", "1e3")
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "the loss has risen" in lines[0], result.stderr
    assert "exitcode  : 2" in result.stderr and not list(flags[-1].glob("*.pth"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_line_says_what_where_and_what_to_do(value, monkeypatch, pretrain):
    poison(monkeypatch, set(range(5, 99)), value)
    with pytest.raises(UserError) as caught:
        pretrain()
    assert re.fullmatch(
        r"step 8: the loss is not finite 4 steps in a row; the last batch held data rows \[\d+, \d+, \d+, \d+\]: "
        r"lower --learning_rate, look at these data rows, or use --dtype float32; the same command resumes from step 4",
        str(caught.value),
    )


def test_five_skipped_steps_end_the_run_and_the_last_save_stays(monkeypatch, pretrain, capsys, tmp_path, scaled):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        poison(patch, set(range(6, 99)))
        with pytest.raises(UserError, match=r"step 10: the loss is not finite 5 steps in a row; .* from step 4$"):
            pretrain("--max_steps", "20")
    before = weights(out / "pretrain_32.pth")
    assert saved_steps(out) == [4] and all(torch.isfinite(tensor).all() for tensor in before.values())
    for _ in range(scaled(2, 10)):
        capsys.readouterr()
        with monkeypatch.context() as patch:
            poison(patch, set(range(2, 99)))
            with pytest.raises(UserError, match=r"step 10: .* from step 4$"):
                pretrain("--max_steps", "20")
        said = capsys.readouterr().out
        assert "going on after step 4" in said and "saved" not in said.splitlines()[-1]
        assert "before: step 10: the loss is not finite 5 steps in a row" in said, "the next start has the advice"
        assert saved_steps(out) == [4]
        assert all(torch.equal(before[name], tensor) for name, tensor in weights(out / "pretrain_32.pth").items())
    pretrain("--max_steps", "20")  # the losses are numbers again
    assert not list(out.glob("*.resume"))
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(out / "pretrain_32.pth").items())


@pytest.mark.parametrize(
    ("skipped", "flags_of_it"),
    [({1, 2, 3}, ["--max_steps", "3"]), ({8}, []), ({3}, ["--max_minutes", "0.0001", "--max_steps", "9"]), ({1}, [])],
    ids=["all of 3 steps", "the last step", "the time is over", "a signal"],
)
def test_an_end_at_a_skipped_step_is_no_success(skipped, flags_of_it, monkeypatch, pretrain, request):
    from trainer import loop

    if "time" in request.node.callspec.id:
        skipped = {1}  # one more step would not fit: the first is the last
    poison(monkeypatch, skipped)
    if "signal" in request.node.callspec.id:
        step = loop.train_step
        monkeypatch.setattr(loop, "train_step", lambda *given: {**step(*given), "stop": 1.0})
    with pytest.raises(UserError, match=r"the loss is not finite.*(starts anew|resumes from step 6)$"):
        pretrain(*flags_of_it)


def test_skipped_steps_never_give_out_the_parent_as_a_result(monkeypatch, tiny_parent, sft_dir, tmp_path):
    poison(monkeypatch, {1, 2})
    command = ["--device", "cpu", "--init_from", tiny_parent, "--data_path", sft_dir, "--out_dir", tmp_path]
    with pytest.raises(UserError, match="no step is saved"):
        run_script(monkeypatch, "3-full_sft.py", *command, "--max_steps", "2", "--batch_size", "4")
    assert not (tmp_path / "full_sft_32.pth").exists()


def test_an_fp16_scaler_that_skips_every_step_saves_nothing(monkeypatch, pretrain, tmp_path):
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *given, **named: real(*given, init_scale=2.0**60, **named))
    with pytest.raises(UserError, match="the gradient is not finite 8 steps in a row"):
        pretrain("--dtype", "float16")
    assert not list((tmp_path / "out").glob("*.pth"))


def test_a_save_that_is_due_at_a_bad_step_is_made_at_the_next_good_one(monkeypatch, pretrain, capsys):
    from trainer.checkpoint_writer import Saver

    begin, saved = Saver.begin, []
    monkeypatch.setattr(Saver, "begin", lambda self, progress, *more: saved.append(progress.step) or begin(
        self, progress, *more))  # fmt: skip
    poison(monkeypatch, {4, 5})
    pretrain()
    assert saved == [2, 6, 8, 8], "step 4 waits for step 6; the end is saved before and after the validation"
    assert "step 4 is not saved: the loss is not finite" in capsys.readouterr().out


@pytest.mark.parametrize("change", [math.inf, math.nan, 1e6], ids=["inf", "nan", "explodes"])
@pytest.mark.parametrize("step", [4, 8])
def test_a_state_that_went_bad_in_its_last_step_is_not_saved(change, step, monkeypatch, pretrain, tmp_path):
    """The loss of a step is that of the weights before it: they are looked at, and the loss is measured again."""
    from trainer.engine import Engine

    real, steps, out = Engine.step, [], tmp_path / "out"

    def bad_step(self, *given):
        norm = real(self, *given)
        steps.append(1)
        if len(steps) == step:
            with torch.no_grad():
                self.model.model.layers[0].mlp.down_proj.weight.mul_(change)
                self.model.model.embed_tokens.weight.mul_(change)
        return norm

    monkeypatch.setattr(Engine, "step", bad_step)
    with pytest.raises(UserError, match=f"resumes from step {step - 2}$"):
        pretrain()
    assert saved_steps(out) == [step - 2]
    assert all(tensor.abs().max() < 100 for tensor in weights(out / "pretrain_32.pth").values())


def test_a_validation_that_is_not_finite_is_no_success(monkeypatch, pretrain, capsys):
    from trainer import loop

    real = loop.validate
    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", lambda *given: {**real(*given), "val_loss": {"zh": math.nan, "en": 1.0}})
        for _ in range(2):
            with pytest.raises(UserError, match=r"loss of zh is not finite: use --dtype float32; .* from step 8$"):
                pretrain()
    out = pretrain()
    assert "going on after step 8" in capsys.readouterr().out and not list(out.glob("*.resume"))


def test_divergence_that_stays_finite_ends_the_run(monkeypatch, pretrain):
    with pytest.raises(UserError, match=r"the loss has risen to \d\d.*, above 16.82 .*the same command resumes"):
        pretrain("--learning_rate", "3", "--optimizer", "adamw", "--max_steps", "45")
    out = pretrain("--learning_rate", "3", "--optimizer", "adamw", "--max_steps", "45", "--max_loss_ratio", "0")
    assert (out / "pretrain_32.pth").exists(), "0 turns it off"


@pytest.mark.parametrize(
    ("unit", "lineage", "losses"),
    [("token", [], [5.6, 9, 14, 16, 12, 9, 7]),  # the hump of a short warm-up
     ("token", [{}], [0.1, 6, 2, 8, 0.5, 7, 7, 7, 7, 7, 7]),  # batches of one chat; a new language; another mixture
     ("token", [{}], [9, 11, 10, 8]),  # a domain that the parent does not know
     ("token", [{}], [2.0] * 9 + [50] + [2.0] * 9),  # one damaged row
     ("pair", [{}], [0.69, 0.9, 3.0, 0.1, 5, 5]),  # DPO with few pairs per batch
     ("pair", [{}], [25.0, 40, 60, 20]),  # IPO with beta 0.1
     ("pair", [{}], [0.05, 0.3, 1.5, 4])],  # SimPO, whose first loss depends on the parent
)  # fmt: skip
def test_healthy_losses_do_not_end_a_run(unit, lineage, losses):
    watch = make_watch(unit, lineage)
    for loss in losses:
        watch.progress.loss = loss
        watch.check({"skipped": 0.0, "loss": loss})


def make_watch(unit, lineage):
    import types

    from trainer.distributed import Run
    from trainer.loss_guard import Watch

    config = types.SimpleNamespace(vocab_size=272)
    stage = types.SimpleNamespace(model=types.SimpleNamespace(config=config), unit=unit, lineage=lineage)
    stage.path = lambda out_dir: ROOT / "out" / "model.pth"
    args = types.SimpleNamespace(max_loss_ratio=3.0, out_dir="out")
    return Watch(Run(torch.device("cpu"), torch.float32), args, stage, None, None)


def test_the_limits_are_in_the_help(capsys):
    from trainer.config import make_parser

    with pytest.raises(SystemExit):
        make_parser(None, {"muon": 1.0}).parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "mean loss of the last 10 steps is above so many times the first loss (0: off)" in said
    for bad in ("1", "-1", "nan", "inf"):
        with pytest.raises(UserError, match=r"0 \(off\) or a number of at least 1\.5"):
            make_parser(None, {"muon": 1.0}).parse_args(["--max_loss_ratio", bad])
