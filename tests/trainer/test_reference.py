"""trainer/reference.py: interpolation by hand, the shipped curves, and what healthy and unhealthy runs print."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import PRESETS, ModelConfig
from model.parameters import count_parameters
from tests.helpers import EXACT_FLAGS, TINY_MODEL_FLAGS, read_jsonl, run_script, write_shards
from trainer import loop, reference
from trainer.reference import (
    MAX_STATEMENTS,
    REFERENCE_FILE,
    Reference,
    interpolate_sizes,
    interpolate_tokens,
    read_reference_curves,
    reference_for,
)

SMALL = np.array([[1e5, 2.0, 4.0, 8.0], [4e5, 1.0, 2.0, 4.0], [9e5, 0.5, 1.0, 2.0]])
LARGE = np.array([[1e5, 1.0, 1.0, 2.0], [4e5, 0.25, 0.5, 1.0]])
ADVICE = "look at the learning rate and the data"
FALLING = np.array([[t, *(b * (t / 1e5) ** -0.1 for b in (2.7, 3.0, 3.3))] for t in 1e5 * 2.0 ** np.arange(8)])


# ---- interpolation ---------------------------------------------------------------------------------------------------
def test_between_two_points_of_a_curve_logarithms_are_interpolated():
    assert interpolate_tokens(SMALL, 2e5) == pytest.approx((math.sqrt(2), math.sqrt(8), math.sqrt(32)))
    assert interpolate_tokens(SMALL, 1e5) == pytest.approx((2, 4, 8))
    assert interpolate_tokens(SMALL, 9e5) == pytest.approx((0.5, 1, 2))


def test_between_two_sizes_logarithms_are_interpolated_at_the_tokens_that_both_have():
    curves = {100: SMALL, 1600: LARGE}
    assert interpolate_sizes(curves, 400) == pytest.approx(
        np.array([[1e5, math.sqrt(2), 2, 4], [4e5, 0.5, 1, 2]]), rel=1e-12
    )
    assert interpolate_sizes(curves, 100) == pytest.approx(SMALL), "a measured size has all of its points"
    assert interpolate_sizes(curves, 1600) == pytest.approx(LARGE)
    assert interpolate_sizes(curves, 99) is None and interpolate_sizes(curves, 1601) is None


positive = st.floats(0.1, 10)


@given(st.lists(st.tuples(positive, positive), min_size=2, max_size=6), st.integers(100, 1600), st.floats(0, 1))
def test_an_interpolated_value_lies_between_its_neighbours(values, size, position):
    tokens = 1e5 * 2.0 ** np.arange(len(values))
    columns = np.array(values).T
    small, large = (np.stack([tokens, column / 2, column, column * 2], axis=1) for column in columns)
    found = interpolate_sizes({100: small, 1600: large}, size)
    assert np.all(found[:, 1:] >= np.minimum(small, large)[:, 1:] * (1 - 1e-9))
    assert np.all(found[:, 1:] <= np.maximum(small, large)[:, 1:] * (1 + 1e-9))
    place = position * (len(values) - 1)
    low, median, high = interpolate_tokens(found, 1e5 * 2.0**place)
    pair = found[[math.floor(place), math.ceil(place)], 2]
    assert min(pair) * (1 - 1e-9) <= median <= max(pair) * (1 + 1e-9) and low < median < high


def test_the_shipped_curves_are_ordered_and_fall():
    curves = [curve for tied in (False, True) for curve in read_reference_curves(REFERENCE_FILE, tied).values()]
    assert len(curves) >= 2
    for curve in curves:
        tokens, low, median, high = curve.T
        assert np.all(np.diff(tokens) > 0) and np.all(low < median) and np.all(median < high)
        assert np.all(np.diff(median) < 0) and low.min() > 1 and high.max() < 4


# ---- which runs have a reference -------------------------------------------------------------------------------------
def test_runs_that_are_not_comparable_have_a_reason_instead_of_a_curve():
    small = ModelConfig(**PRESETS["small"])
    assert reference_for(small, 4096, 20, "muon").curve is not None
    for config, step_tokens, optimizer, reason in (
        (ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2), 4096, "muon", "M parameters in their layers"),
        (small, 524_288, "muon", "4,096 tokens per step, this one 524,288"),
        (small, 1024, "muon", "4,096 tokens per step, this one 1,024"),
        (ModelConfig(**PRESETS["small"], use_moe=True), 4096, "muon", "dense"),
        (small, 4096, "adamw", "Muon"),
    ):
        found = reference_for(config, step_tokens, 0, optimizer)
        assert found.curve is None
        rows = [{"step": i, "loss": 5.0, "tokens": 10_000 * i, "train_bits_per_byte": 2.0} for i in range(1, 40)]
        texts = statements(found, rows)
        assert len(texts) == 1 and reason in texts[0] and texts[0].startswith("no reference curve")


# ---- statements about synthetic logs ---------------------------------------------------------------------------------
def statements(found, rows, start=0, total_steps=None):
    """What a run prints whose log begins with `start` rows of an earlier session."""
    ends = [i + 1 for i in range(start, len(rows)) if "loss" in rows[i]]
    texts = [found.statement(rows[:end], end == total_steps) for end in ends]
    return [text for text in texts if text]


def make_log(factor, steps=3500, noise=0.03):
    """A log with a row every 10 steps of 4,096 tokens, and validations between them."""
    random, rows = np.random.default_rng(0), []
    for step in range(10, steps + 1, 10):
        value = factor * 3 * (step * 4096 / 1e5) ** -0.1 * math.exp(noise * random.standard_normal())
        rows.append({"step": step, "loss": value, "tokens": step * 4096, "train_bits_per_byte": value})
        if step % 100 == 0:
            rows.append({"step": step, "tokens": step * 4096, "val_loss": {"zh": 1.0}, "bits_per_byte": {"zh": 1.0}})
    return rows


@pytest.mark.parametrize(
    "factor, verdict",
    [(1, "normal"), (1.05, "normal"), (0.95, "normal"), (1.2, "slower than 95 %"), (0.8, "below 95 %")],
)
def test_every_statement_names_the_side_of_the_band(factor, verdict):
    texts = statements(Reference(FALLING, "", 1e5), make_log(factor))
    assert 5 <= len(texts) <= MAX_STATEMENTS and all(verdict in text for text in texts)
    assert [text.endswith("; the reference for this size ends here") for text in texts] == [
        text is texts[-1] for text in texts
    ]


def test_a_statement_gives_the_smoothed_value_and_the_bounds_at_its_tokens():
    curve = np.array([[1e5, 2.7, 3, 3.3], [1e6, 2.7, 3, 3.3]])
    rows = [
        {"step": s, "loss": 5.0, "tokens": 100_000 * s, "train_bits_per_byte": v}
        for s, v in ((1, 9.0), (2, 3.0), (3, 3.12))
    ]
    assert Reference(curve, "", 3e5).statement(rows, False) == (
        "step 3: 3.06 bits per byte in training: normal "  # sqrt(3 * 3.12): of the rows above 150,000 tokens
        "(90 % of the reference runs lie between 2.70 and 3.30 at 0.3 M tokens)"
    )


def test_a_loss_of_guessing_is_never_normal():
    """Random tokens have few bits per byte where the tokens of a vocabulary have many bytes."""
    rows = make_log(1)
    for row in rows:
        row["loss"] = 8.3
    texts = statements(Reference(FALLING, "", 1e5, guessing=math.log(6400)), rows)
    assert len(texts) >= 5 and all("that of guessing, ln(vocabulary) = 8.76: look at" in text for text in texts)
    rows = [row | {"loss": 8.2} for row in rows if "loss" in row]
    assert ": normal (" in statements(Reference(FALLING, "", 1e5, guessing=math.log(6400)), rows)[0]


def test_nothing_is_printed_in_the_warm_up_and_beyond_the_reference():
    log = make_log(1)
    late = Reference(FALLING, "", 1e6)
    assert re.match(r"step (\d+)", statements(late, log)[0])[1] == "250"
    assert statements(Reference(FALLING, "", 2e7), log) == []
    assert statements(Reference(FALLING, "", 1e5), make_log(1, steps=20), total_steps=2) == []


def test_a_finished_run_ends_with_a_statement():
    rows = make_log(1.3, steps=70)
    texts = statements(Reference(FALLING, "", 1e5), rows, total_steps=len(rows))
    assert texts[-1].startswith("step 70: ") and "slower" in texts[-1]


def test_damaged_values_in_the_log_are_skipped():
    rows = make_log(1)
    expected = statements(Reference(FALLING, "", 1e5), rows)
    bad = [
        {"train_bits_per_byte": value, "loss": 2.0, "tokens": 5, "step": 1}
        for value in (None, "x", math.nan, math.inf, -1.0)
    ]
    assert statements(Reference(FALLING, "", 1e5), [*bad, {"step": 1, "loss": 1.0}, *rows]) == expected


@pytest.mark.parametrize("resumed_at", [1, 7, 8, 9, 50, 200])
def test_a_resumed_log_gives_the_same_statements(resumed_at):
    found, rows = Reference(FALLING, "", 1e5), make_log(1)
    assert statements(found, rows[:resumed_at]) + statements(found, rows, resumed_at) == statements(found, rows)


# ---- statements of runs ----------------------------------------------------------------------------------------------
@pytest.fixture
def pretrain(monkeypatch, pretrain_dir, tokenizer_dir, tmp_path, capsys):
    """Run 40 steps of 128 tokens. Returns the folder and the printed statements."""
    shorter = [*TINY_MODEL_FLAGS, *EXACT_FLAGS, "--batch_size", "4", "--max_steps", "40", "--warmup_iters", "4"]
    monkeypatch.setattr(reference, "FIRST_TOKENS", 600)
    monkeypatch.setattr(reference, "REFERENCE_STEP_TOKENS", 128)

    def run(*flags, out="out", data=pretrain_dir):
        where = ["--data_path", data, "--tokenizer", tokenizer_dir, "--out_dir", tmp_path / out]
        run_script(monkeypatch, "1-pretrain.py", *shorter, *where, "--save_interval", "10", *flags)
        printed = capsys.readouterr().out
        return tmp_path / out, [line for line in printed.splitlines() if "reference" in line or ADVICE in line]

    return run


@pytest.fixture
def healthy(monkeypatch, pretrain, tmp_path):
    """Makes a band of 15 % around a healthy run the reference. Returns the run's folder."""
    folder, texts = pretrain("--seed", "1", out="healthy")
    assert len(texts) == 1 and texts[0].startswith("no reference curve"), "the shipped one is of larger sizes"
    size = count_parameters(ModelConfig(272, 32, 2, 4, 2)).layer_matrices
    lines = ["size,tied,layer_matrices,tokens,low,median,high,runs"]
    for row in read_jsonl(folder / "pretrain_32.jsonl"):
        if value := row.get("train_bits_per_byte"):
            lines.append(f"tiny,1,{size},{row['tokens']},{value * 0.85},{value},{value * 1.15},1")
    path = tmp_path / "reference_curves.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(reference, "REFERENCE_FILE", path)
    return folder


def test_a_healthy_run_is_normal_and_one_with_a_low_learning_rate_is_not(healthy, pretrain):
    _, normal = pretrain("--seed", "2", out="normal")
    assert 3 <= len(normal) <= MAX_STATEMENTS + 1 and all(": normal (90 %" in text for text in normal)
    _, slow = pretrain("--learning_rate", "5e-4", out="slow")
    assert len(slow) == len(normal) and "slower than 95 %" in slow[-1] and all(ADVICE in text for text in slow)


def test_a_run_on_random_tokens_is_not_normal(healthy, pretrain, tokenizer, tmp_path):
    random = np.random.default_rng(0)
    splits = {name: [random.integers(20, 250, 2000).tolist()] for name in ("train", "val_zh")}
    _, texts = pretrain(data=write_shards(tmp_path / "random", "pretrain", tokenizer, splits))
    assert texts and all(ADVICE in text for text in texts)


@pytest.mark.parametrize("kill_at", [3, 15, 25, 39])
def test_a_killed_and_resumed_run_prints_the_same_statements(monkeypatch, healthy, pretrain, capsys, kill_at):
    _, expected = pretrain("--seed", "2", out="whole")
    real_step, done = loop.train_step, 0

    def step_then_die(*arguments):
        nonlocal done
        if done == kill_at:
            raise KeyboardInterrupt
        done += 1
        return real_step(*arguments)

    monkeypatch.setattr(loop, "train_step", step_then_die)
    with pytest.raises(KeyboardInterrupt):
        pretrain("--seed", "2", out="parts")
    before = [line for line in capsys.readouterr().out.splitlines() if "reference" in line or ADVICE in line]
    monkeypatch.setattr(loop, "train_step", real_step)
    _, after = pretrain("--seed", "2", out="parts")
    assert list(dict.fromkeys(before + after)) == expected, "steps after the last save run, and are printed, again"


def test_the_picture_shows_the_band_in_nats_per_token(curves, monkeypatch, healthy, pretrain):
    """One byte per token: 1 bit per byte is ln 2 nats per token, but for ends of documents, which have no byte."""
    from matplotlib.axes import Axes

    real, bands = Axes.fill_between, []
    record = lambda axes, *given, **options: bands.append(given) or real(axes, *given, **options)
    monkeypatch.setattr(Axes, "fill_between", record)
    folder, _ = pretrain("--seed", "2")
    assert (folder / "pretrain_32.png").is_file() and len(bands) == 2, "in the picture and on the page of the runs"
    tokens, low, high = bands[0]
    rows = [row for row in read_jsonl(healthy / "pretrain_32.jsonl") if "loss" in row]
    assert tokens == pytest.approx([row["tokens"] / 1e6 for row in rows])
    assert low == pytest.approx([0.85 * row["loss"] for row in rows], rel=0.1)
    assert high == pytest.approx([1.15 * row["loss"] for row in rows], rel=0.1)


def test_continued_pretraining_and_fine_tuning_are_not_compared(
    monkeypatch, healthy, pretrain_dir, tokenizer_dir, sft_dir, tmp_path, capsys
):
    monkeypatch.setattr(reference, "FIRST_TOKENS", 1)
    common = [
        "--init_from",
        healthy / "pretrain_32.pth",
        *EXACT_FLAGS,
        "--max_steps",
        "3",
        "--out_dir",
        tmp_path / "out",
    ]
    run_script(monkeypatch, "1-pretrain.py", *common, "--data_path", pretrain_dir, "--tokenizer", tokenizer_dir)
    run_script(monkeypatch, "3-full_sft.py", *common, "--data_path", sft_dir)
    assert "reference" not in capsys.readouterr().out


def test_the_log_has_the_training_loss_in_bits_per_byte(healthy, tokenizer):
    """One token of this tokenizer is one byte, but for the end of a document, which has none."""
    rows = [row for row in read_jsonl(healthy / "pretrain_32.jsonl") if "loss" in row]
    assert len(rows) == 40
    for row in rows:
        assert 1 <= row["train_bits_per_byte"] / (row["loss"] / math.log(2)) < 1.2
