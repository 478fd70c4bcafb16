"""benchmarks/reference_curves.py: the fit recovers known curves; the bands of the project are those of its runs."""

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import reference_curves
from benchmarks.reference_curves import (
    CSV,
    GRID,
    PICTURE,
    RUNS,
    SIZES,
    ReferenceConfig,
    fit_bands,
    read_runs,
    smooth,
    train_missing,
    write_runs,
)
from common.cli import parse
from tests.helpers import load_script, one_line_error
from trainer.reference import REFERENCE_FILE, REFERENCE_STEP_TOKENS

TOKENS = 4096.0 * np.arange(5, 201, 5)  # a row every 5 steps, up to 0.82 M tokens


def curve(level, effect=0.0, tokens=TOKENS):
    """A run whose bits per byte are a power of the tokens."""
    return [(t, level * math.exp(effect) * (t / 1e5) ** -0.2) for t in tokens]


def test_smoothing_keeps_a_power_of_the_tokens_and_ends_with_the_run():
    found = smooth(curve(3.0), GRID)
    inside = TOKENS[-1] >= GRID
    assert np.exp(found[inside]) == pytest.approx(3 * (GRID[inside] / 1e5) ** -0.2, rel=1e-9)
    assert np.isnan(found[~inside]).all() and inside.sum() == 8


def test_smoothing_averages_the_noise():
    random = np.random.default_rng(0)
    noisy = [(t, value * math.exp(0.03 * random.standard_normal())) for t, value in curve(3.0)]
    assert smooth(noisy, GRID[3:7]) == pytest.approx(np.log(3 * (GRID[3:7] / 1e5) ** -0.2), abs=0.03)


def test_the_fit_recovers_levels_and_the_spread_of_the_variations():
    effects = {"a": -0.06, "b": -0.02, "c": 0.0, "d": 0.08}
    bands, spread = fit_bands({("128x3", name): curve(3.0, effect) for name, effect in effects.items()})
    assert spread == pytest.approx(np.std([*effects.values()], ddof=1), rel=1e-6)
    assert [band.tokens for band in bands] == [round(t) for t in GRID[:8]] and {band.runs for band in bands} == {4}
    for band in bands:
        median = 3 * (band.tokens / 1e5) ** -0.2
        assert band.median == pytest.approx(median, abs=1e-4)
        assert band.low == pytest.approx(median * math.exp(-1.645 * spread * math.sqrt(1.25)), abs=1e-4)
        assert band.high == pytest.approx(median * math.exp(1.645 * spread * math.sqrt(1.25)), abs=1e-4)


def test_one_run_of_a_size_is_corrected_for_its_variation_and_a_longer_run_extends_the_curve():
    """The run of the larger size has the slowest variation; the level of its size is that without it."""
    effects = {"a": -0.06, "b": -0.02, "c": 0.0, "d": 0.08}
    runs = {("128x3", name): curve(3.0, effect) for name, effect in effects.items()}
    runs["128x3", "a"] = curve(3.0, -0.06, 4096.0 * np.arange(5, 601, 5))
    bands, _ = fit_bands(runs | {("small", "d"): curve(2.0, 0.08, TOKENS[:10])})
    small = [band for band in bands if band.size == "small"]
    assert [band.tokens for band in small] == [round(t) for t in GRID[:4]] and {band.runs for band in small} == {1}
    for band in bands:
        level = {"128x3": 3.0, "small": 2.0}[band.size]
        assert band.median == pytest.approx(level * (band.tokens / 1e5) ** -0.2, abs=2e-4)
    assert max(band.tokens for band in bands) > 2e6


def test_every_run_is_one_of_the_lesson_with_the_tokens_per_step_of_its_variation():
    assert len({(run.size, run.variation) for run in RUNS}) == len(RUNS)
    for run in RUNS:
        config = parse(load_script("1-pretrain.py").PretrainConfig, "", run.flags)
        step_tokens = config.batch_size * config.model_config(6400).max_seq_len
        assert step_tokens == run.batch * REFERENCE_STEP_TOKENS
        assert config.max_steps * step_tokens == run.steps * REFERENCE_STEP_TOKENS
        assert config.learning_rate == pytest.approx(8e-3 * run.learning_rate)


def test_finished_runs_are_not_run_again(monkeypatch, tmp_path):
    trained = []

    def train(config, run):
        trained.append(run)
        return curve(3.0)[:4]

    monkeypatch.setattr(reference_curves, "train_run", train)
    config = ReferenceConfig(points=str(tmp_path / "runs.csv"), only=("128x3", "small"))
    first = next(run for run in RUNS if run.size == "128x3")
    write_runs(Path(config.points), {(first.size, first.variation): curve(3.0)})
    train_missing(config)
    assert trained == [run for run in RUNS if run.size in ("128x3", "small") and run != first]
    runs = read_runs(Path(config.points))
    assert len(runs) == len(trained) + 1
    assert np.array(runs["small", "both lr x1 batch x1 constant seed 42"]) == pytest.approx(
        np.array(curve(3.0)[:4]), abs=1e-4
    )
    train_missing(config)
    assert len(trained) == len(runs) - 1


def test_an_unknown_size_is_an_error_of_one_line():
    with one_line_error("--only huge: choose from 128x3, 384x6"):
        ReferenceConfig(only=("huge",))


def test_the_bands_of_the_project_are_those_of_its_runs():
    bands, spread = fit_bands(read_runs(CSV))
    lines = [",".join(map(str, band)) for band in bands]
    assert REFERENCE_FILE.read_text(encoding="utf-8").splitlines()[1:] == lines
    assert PICTURE.is_file() and 0.02 < spread < 0.15
    assert {band.size for band in bands} <= SIZES.keys() and {band.size for band in bands} >= {"128x3", "small"}
