"""benchmarks/size_sweep.py: the fit recovers known laws; the points of the project and its law belong together."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import size_sweep
from benchmarks.size_sweep import (
    CSV,
    PICTURE,
    POINTS,
    Point,
    SweepConfig,
    fit_law,
    fit_points,
    read_points,
    run_missing,
)
from common.cli import parse
from model.parameters import count_parameters
from tests.helpers import load_script, one_line_error
from trainer.dial import STEP_TOKENS
from trainer.scaling_law import ScalingLaw, ladder_fields, read_law

SIZES = np.repeat([6e5, 1.2e6, 3e6, 7e6, 1e7, 2.4e7], 3)
TOKENS = np.tile([2e5, 6e5, 2e6], 6) * np.repeat([2, 1.5, 1, 0.8, 0.6, 0.5], 3)
KNOWN = {"E": 0.9, "A": 60, "alpha": 0.37, "B": 70, "beta": 0.29}


def scores(law, sizes=SIZES, tokens=TOKENS):
    return law["E"] + law["A"] / sizes ** law["alpha"] + law["B"] / tokens ** law["beta"]


# ---- the fit ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("changes", [{}, {"alpha": 0.26, "A": 15}, {"beta": 0.39, "B": 250}, {"E": 1.7}])
def test_the_fit_recovers_a_known_law_from_exact_points(changes):
    law = KNOWN | changes
    found, loss = fit_law(SIZES, TOKENS, scores(law))
    assert loss < 1e-8
    assert (found["alpha"], found["beta"]) == pytest.approx((law["alpha"], law["beta"]), abs=0.003)
    assert found["E"] == pytest.approx(law["E"], abs=0.03)
    assert scores(found, 5e7, 1e8) == pytest.approx(scores(law, 5e7, 1e8), rel=0.005), "also far from the points"


def test_noise_of_half_a_percent_and_one_failed_run_change_the_prediction_by_less_than_three_percent():
    random = np.random.default_rng(0)
    noisy = scores(KNOWN) * (1 + 0.005 * random.standard_normal(len(SIZES)))
    noisy[4] *= 1.4
    found, _ = fit_law(SIZES, TOKENS, noisy)
    for sizes, tokens in ((SIZES, TOKENS), (5e6, 9e6), (2e7, 3e7)):
        assert scores(found, sizes, tokens) == pytest.approx(scores(KNOWN, sizes, tokens), rel=0.03)


def test_coefficients_are_never_negative():
    """Points that do not depend on the size, and points that become worse with it."""
    found, _ = fit_law(SIZES, TOKENS, 1 + 50 / TOKENS**0.3)
    assert min(found.values()) >= 0 and scores(found, 1e7, 1e6) == pytest.approx(1 + 50 / 1e6**0.3, rel=0.01)
    rising, _ = fit_law(SIZES, TOKENS, 1 + SIZES**0.1 / 10)
    assert min(rising.values()) >= 0


def test_too_few_points_are_refused():
    with one_line_error("5 points"):
        fit_law(SIZES[:5], TOKENS[:5], scores(KNOWN)[:5])


def test_the_best_measure_of_the_size_is_chosen_and_runs_that_are_mostly_warm_up_do_not_count():
    points = [make_point(name, tokens) for name in POINTS for tokens in (250_000, 600_000, 2_000_000)]
    for measure in size_sweep.SIZE_MEASURES:
        law = ScalingLaw(measure, E=0.9, A=60, alpha=0.35, B=70, beta=0.3)
        exact = [make_point(p.size, p.tokens, law.bits_per_byte(p.config, p.tokens)) for p in points]
        found = fit_points([*exact, make_point("512x8", 59 * STEP_TOKENS, 9.9)])
        assert found.parameters == measure and found.flops == max(p.flops for p in points)


# ---- the runs --------------------------------------------------------------------------------------------------------
def make_point(name, tokens, score=2.0, seed=42):
    total = count_parameters(size_sweep.size_config(name)).total
    return Point(name, total, tokens, score, score, score, seed, "--mix zh=0.5,en=0.5")


def test_points_survive_a_file_and_only_missing_ones_run_and_each_is_saved_at_once(monkeypatch, tmp_path):
    file, ran = tmp_path / "points.csv", []

    def fake_run(config, name, steps):
        assert len(read_points(file)) == len(ran)
        ran.append((name, steps))
        return make_point(name, steps * STEP_TOKENS, 2.5, config.seed)

    monkeypatch.setattr(size_sweep, "run_point", fake_run)
    monkeypatch.setattr(size_sweep, "load_tokenizer", lambda _: SimpleNamespace(vocab_size=6400))
    names = [*POINTS][:2]
    run_missing(SweepConfig(only=tuple(names), points=str(file)))
    expected = {(name, size_sweep.point_steps(tokens)) for name in names for tokens in POINTS[name]}
    assert {*ran} == expected and len(ran) == len(expected)
    points = read_points(file)
    assert points[0] == make_point(names[0], points[0].tokens, 2.5) and points == sorted(
        points, key=size_sweep.point_key
    )
    run_missing(SweepConfig(only=tuple(names), points=str(file)))
    assert len(ran) == len(expected)
    run_missing(SweepConfig(only=(names[0],), points=str(file), seed=1))
    assert len(ran) == len(expected) + len(POINTS[names[0]])
    monkeypatch.setattr(size_sweep, "load_tokenizer", lambda _: SimpleNamespace(vocab_size=300))
    with one_line_error("6,400", "300"):
        run_missing(SweepConfig(points=str(file)))


def test_a_run_has_valid_flags_and_its_held_out_scores_are_read_from_its_log(monkeypatch):
    def fake_process(command, **_):
        config = parse(load_script("1-pretrain.py").PretrainConfig, None, command[2:])
        size = config.model_config(6400)
        assert size == size_sweep.size_config("192x3") and config.max_steps == 7 and config.seed == 3
        assert config.batch_size * size.max_seq_len == STEP_TOKENS and config.mix.weights == {"zh": 0.5, "en": 0.5}
        rows = [{"step": 7, "loss": 1.0}, {"step": 7, "val_loss": {}, "bits_per_byte": {"zh": 2.0, "en": 2.5}}]
        log = Path(config.out_dir) / "pretrain_192.jsonl"
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", fake_process)
    point = size_sweep.run_point(SweepConfig(seed=3), "192x3", 7)
    assert (point.zh, point.en, point.bits_per_byte, point.tokens) == (2.0, 2.5, 2.25, 7 * STEP_TOKENS)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="", stdout="no data"))
    with one_line_error("192x3", "no data"):
        size_sweep.run_point(SweepConfig(), "192x3", 7)


def test_an_unknown_size_is_refused():
    with one_line_error("--only 9x9", "128x3"):
        SweepConfig(only=("9x9",))


# ---- what lies in the project ----------------------------------------------------------------------------------------
def test_the_law_of_the_project_is_the_fit_of_its_points():
    points = read_points(CSV)
    assert (
        len({point.size for point in points}) >= 6 and {*ladder_fields((64, 1, 1, 1))} <= vars(points[0].config).keys()
    )
    fitted, law = fit_points(points), read_law()
    assert (fitted.parameters, fitted.text) == (law.parameters, law.text)
    assert len(size_sweep.fitted_points(points)) >= 6
    for point in size_sweep.fitted_points(points):
        assert law.bits_per_byte(point.config, point.tokens) == pytest.approx(
            fitted.bits_per_byte(point.config, point.tokens), rel=1e-3
        )
        assert law.bits_per_byte(point.config, point.tokens) == pytest.approx(point.bits_per_byte, rel=0.05)
        assert count_parameters(point.config).total == point.parameters


def test_the_picture_is_drawn_from_the_points_and_small(tmp_path):
    size_sweep.draw(read_law(), read_points(CSV), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert max((tmp_path / "curves.png").stat().st_size, PICTURE.stat().st_size) < 150_000
