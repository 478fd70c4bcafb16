"""The estimate of the demo's time: the reference's seconds times the slowdown, corrected by each finished training."""

from pathlib import Path

import pytest

import demo
from demo_world import speed
from demo_world.report import TRAINING
from demo_world.rl_steps import rl_steps
from demo_world.texts import DemoTexts
from demo_world.timing import REFERENCE_SECONDS, RL_REFERENCE_SECONDS, Estimate, minutes_text


@pytest.fixture
def steps():
    return demo.make_steps(Path("out/demo"), seed=0, max_steps=0)


def test_every_step_has_a_reference_time_of_seven_minutes_in_all(steps):
    assert [step.name for step in steps] == list(REFERENCE_SECONDS)
    assert sum(REFERENCE_SECONDS.values()) < 420


def test_every_further_step_has_a_reference_time_of_five_minutes_in_all():
    names = [step.name for step in rl_steps(Path("out/demo"), 256, seed=0, max_steps=0)]
    assert names == list(RL_REFERENCE_SECONDS) and not RL_REFERENCE_SECONDS.keys() & REFERENCE_SECONDS.keys()
    assert sum(RL_REFERENCE_SECONDS.values()) < 300


def test_a_slow_machine_takes_longer_and_is_told_so():
    total = sum(REFERENCE_SECONDS.values())
    fast, slow = Estimate(1.0, REFERENCE_SECONDS, {}), Estimate(3.0, REFERENCE_SECONDS, {})
    assert fast.seconds_left() == pytest.approx(total) and slow.seconds_left() == pytest.approx(3 * total)
    assert fast.describe(DemoTexts()) == f"This will take {minutes_text(total, DemoTexts())}."
    assert "3.0 times as long" in slow.describe(DemoTexts()) and "--fast" in slow.describe(DemoTexts())


def test_a_finished_training_corrects_the_estimate():
    estimate = Estimate(1.0, ["pretrain", "score_pretrain", "full_sft"], {})
    estimate.finish("pretrain", 2 * REFERENCE_SECONDS["pretrain"])
    assert estimate.seconds_left() == pytest.approx(
        2 * (REFERENCE_SECONDS["score_pretrain"] + REFERENCE_SECONDS["full_sft"])
    )
    estimate.finish("score_pretrain", 1000)  # not a training: says nothing about the speed
    assert estimate.seconds_left() == pytest.approx(2 * REFERENCE_SECONDS["full_sft"])


def test_fast_bounds_the_trainings_on_any_machine():
    limits = {stage: 60 * minutes for stage, minutes in demo.FAST_MINUTES.items()}
    estimate = Estimate(1000.0, TRAINING, limits)
    assert estimate.seconds_left() == sum(limits.values()) and "less text" in estimate.describe(DemoTexts())
    estimate.finish("pretrain", limits["pretrain"])
    assert estimate.slowdown == 1000.0, "a training that ends by time says nothing about the speed"
    assert limits.keys() == TRAINING.keys()


def test_trainings_end_by_steps_and_with_fast_by_time(steps):
    for step in steps:
        assert "--max_minutes" not in " ".join(demo.with_recipe(step.command)), step.name
    fast = {step.name: step.command for step in demo.make_steps(Path("out"), seed=0, max_steps=0, fast=True)}
    for stage, minutes in demo.FAST_MINUTES.items():
        assert fast[stage][fast[stage].index("--max_minutes") + 1] == str(minutes)


def test_the_slowdown_is_measured(monkeypatch):
    monkeypatch.setattr(speed, "MEASURED_STEPS", 1)
    monkeypatch.setattr(speed, "ROWS", 1)
    assert 0 < speed.measure_demo_step() < 1000 * speed.REFERENCE_STEP


def test_the_slowdown_is_measured_on_the_model_of_the_recipe():
    recipe = (demo.PROJECT_FOLDER / "recipes" / "demo-pretrain.args").read_text(encoding="utf-8")
    assert f"--hidden_dim {speed.MODEL.hidden_dim}\n--qk_norm\n--tie_embeddings false\n" in recipe
    assert f"--batch_size {speed.ROWS}\n" in recipe
    assert f"--vocab_size {speed.MODEL.vocab_size}" == demo.FLAGS["tokenizer"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 second"), (90, "90 seconds"), (150, "2 minutes"), (394, "7 minutes")]
)
def test_minutes_text(seconds, text):
    assert minutes_text(seconds, DemoTexts()).startswith(f"about {text}")
