"""Mixtures: every range of rows follows the weights, and each epoch of a component holds every row once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from corpus.dataset_meta import write_meta
from corpus.mixing import mix_components, parse_mix, unused_tokens
from tests.helpers import write_shards
from trainer.config import MixFlags
from trainer.mixing import (
    ROUND_ROWS,
    ComponentOrder,
    MixedDataset,
    balanced_languages,
    largest_remainder,
    read_mix_schedule,
)
from trainer.sampler import EpochOrder

SHARDS = [
    {"language": "zh", "source": "law", "tokens": 600},
    {"language": "zh", "source": "tale", "tokens": 200},
    {"language": "zh", "source": "tale", "tokens": 100},
    {"language": "en", "source": "law", "tokens": 100},
]


def mix_weights(text, temperature=1.0):
    return {component.name: component.weight for component in mix_components(SHARDS, parse_mix(text), temperature)}


# ---- mix specifications ----------------------------------------------------------------------------------------------
def test_mix_spec_gives_weights_passes_and_sizes():
    assert mix_weights("zh=0.25,en=0.75") == {"zh": 0.25, "en": 0.75} == mix_weights("zh=1,en=3")
    assert mix_weights("zh=1x,en=9x") == {"zh": 0.5, "en": 0.5}
    assert mix_weights("language") == {"en": 0.1, "zh": 0.9}
    assert mix_weights("source") == {"law": 0.7, "tale": 0.3}
    assert mix_weights("law=1") == {"law": 1.0}
    components = mix_components(SHARDS, parse_mix("tale=1"))
    assert components[0].tokens == 300 and unused_tokens(SHARDS, components) == {"zh/law": 600, "en/law": 100}


@pytest.mark.parametrize(
    ("tokens", "weights"),
    [
        ({"zh": 1024 * 320, "en": 320}, None),  # English would be read 128 times as often
        ({"zh": 901, "en": 99}, None),
        ({"zh": 900}, None),
        ({"zh": 600, "en": 200}, {"en": 1.0, "zh": 1.390}),  # 3 ** 0.3
        ({"zh": 500, "en": 500, "": 10}, {"en": 1.0, "zh": 1.0}),
    ],
)
def test_minutes_mix_large_languages_by_a_power_of_their_tokens(monkeypatch, tokens, weights):
    shards = [{"language": name, "source": "", "tokens": count} for name, count in tokens.items()]
    monkeypatch.setattr("trainer.mixing.read_meta", lambda path: {"splits": {"train": {"shards": shards}}})
    spec = balanced_languages("data")
    assert (spec and {name: weight / spec.weights["en"] for name, weight in spec.weights.items()}) == (
        weights and pytest.approx(weights, abs=1e-3)
    )


def test_temperature_flattens_weights():
    """Sizes 9 : 1 become 3 : 1 at T = 2 and 1 : 1 for large T."""
    assert mix_weights("language", 2.0) == pytest.approx({"zh": 0.75, "en": 0.25})
    assert mix_weights("language", 1e6) == pytest.approx({"zh": 0.5, "en": 0.5}, abs=1e-4)
    assert mix_weights("zh=0.9,en=0.1", 2.0) == pytest.approx({"zh": 0.75, "en": 0.25})
    assert mix_weights("language", 0.5) == pytest.approx({"zh": 81 / 82, "en": 1 / 82})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("zh", "'zh' is not name=number"),
        ("zh=-1", "not name=number above 0"),
        ("zh=0,en=1", "above 0"),
        ("zh=1.2.3", "above 0"),
        ("zh=nan", "above 0"),
        ("zh=1,zh=2", "named twice"),
        ("zh=1x,en=2", "either fractions only or epochs only"),
        ("", "not name=number"),
        ("fr=1", "fr: is not in the data: there are en, law, tale, zh"),
        ("zh=1,law=1", "zh and law share data"),
        ("zh=1,en=0.00001", "weight of en is below"),
    ],
)
def test_invalid_mix_is_one_line(text, says):
    with pytest.raises(UserError, match=says):
        mix_components(SHARDS, parse_mix(text))


def test_mix_of_unlabelled_data_names_the_command():
    with pytest.raises(UserError, match=r"run `python data_process.py pretrain"):
        mix_components([{"file": "train_000", "tokens": 9}], parse_mix("zh=1"))
    unlabelled = [{"language": "zh", "source": "", "tokens": 9}]
    with pytest.raises(UserError, match="--source_key labels them"):
        mix_components(unlabelled, parse_mix("source"))
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="above 0"):
            mix_components(SHARDS, parse_mix("language"), temperature)


# ---- row order -------------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=150)
@given(n=st.integers(1, 300), seed=st.integers(0, 2**40), first=st.integers(0, 900), count=st.integers(0, 700))
def test_an_order_is_a_permutation_per_epoch_with_random_access(n, seed, first, count):
    epochs = [np.random.default_rng((seed, epoch)).permutation(n) for epoch in range((first + count) // n + 1)]
    rows = EpochOrder(n, seed).row_ids(first, count)
    assert rows.dtype == np.int64 and rows.tolist() == np.concatenate(epochs)[first : first + count].tolist()


def test_an_order_takes_four_bytes_per_row_and_is_computed_once_per_epoch():
    order = EpochOrder(1000, 42)
    rows = order.row_ids(0, 10)
    assert order.row_ids(990, 20).tolist()[10:] == order.row_ids(1000, 10).tolist() != rows.tolist()
    cached = order._rows
    order.row_ids(1500, 100)
    assert order._rows is cached and cached.nbytes == 4000


@settings(deadline=None, max_examples=40)
@given(
    weights=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=6),
    first=st.integers(0, 3 * ROUND_ROWS),
    count=st.integers(1, 500),
)
def test_every_range_of_rows_follows_the_weights(weights, first, count):
    fair = [weight / sum(weights) for weight in weights]
    order = ComponentOrder(fair, 1)
    component_ids = order.component_ids(first, count)
    assert len(component_ids) == count
    before, after = order.counts(first), order.counts(first + count)
    assert (after - before).tolist() == np.bincount(component_ids, minlength=len(fair)).tolist()
    assert after.sum() == first + count
    assert all(
        abs(n - weight * (first + count)) < 3 + (first + count) / ROUND_ROWS
        for n, weight in zip(after, fair, strict=True)
    )


@given(st.lists(st.floats(0.0001, 1.0), min_size=1, max_size=30), st.integers(100, 20_000))
def test_quotas_sum_to_the_rows(weights, rows):
    quotas = largest_remainder(weights, rows)
    assert quotas.sum() == rows and quotas.min() >= 1
    assert largest_remainder([0.25, 0.75], 10_000).tolist() == [2500, 7500]


# ---- sampler ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tokenizer, tmp_path):
    """zh: 40 rows of 8 tokens with id 1; en: 10 rows with id 2."""
    import json

    path = write_shards(tmp_path / "data", "pretrain", tokenizer, {"train_zh": [[1] * 321], "train_en": [[2] * 81]})
    meta = json.loads((path / "meta.json").read_text())
    shards = [
        {**meta["splits"][f"train_{language}"]["shards"][0], "language": language, "source": ""}
        for language in ("zh", "en")
    ]
    meta["splits"] = {"train": {"shards": shards, "tokens": 402, "documents": 2, "bytes": 402}}
    write_meta(path, meta)
    return path


def make_mix_sampler(folder, mix, stage2=None, at=0.0, steps=50, batch=4, temperature=1.0):
    flags = MixFlags(mix and parse_mix(mix), temperature, stage2 and parse_mix(stage2), at)
    return MixedDataset(str(folder), read_mix_schedule(str(folder), flags, steps, 1), 8).batch_sampler(batch, 42)


def test_mix_follows_weights_and_each_pass_holds_each_row_once(folder):
    sampler = make_mix_sampler(folder, "zh=0.25,en=0.75", steps=100)
    rows = np.concatenate([sampler.row_ids(step) for step in range(100)])
    chinese, english = rows[rows < 40], rows[rows >= 40] - 40
    assert abs(len(chinese) - 100) <= 2 and len(chinese) + len(english) == 400
    assert sampler.rows_consumed(100) == {"zh": len(chinese), "en": len(english)}
    for size, own in ((40, chinese), (10, english)):
        for start in range(0, len(own) - size + 1, size):
            assert sorted(own[start : start + size].tolist()) == list(range(size)), "each row once per epoch"
    batch = sampler.data.batch(np.array([0, 39, 40, 49]))
    assert batch["input_ids"][:, 0].tolist() == [1, 1, 2, 2] and batch["row_ids"].tolist() == [0, 39, 40, 49]


def test_mix_sampler_has_random_access_across_the_switch(folder):
    sampler = make_mix_sampler(folder, "zh=0.2,en=0.8", "zh=1", 0.5)
    whole = [sampler.row_ids(step).tolist() for step in range(50)]
    for step in (49, 0, 25, 24, 26):
        assert make_mix_sampler(folder, "zh=0.2,en=0.8", "zh=1", 0.5).row_ids(step).tolist() == whole[step]
    assert all(row < 40 for rows in whole[25:] for row in rows), "stage 2 has only Chinese rows"
    assert any(row >= 40 for row in whole[24])
    chinese = [row for rows in whole for row in rows if row < 40]
    assert sorted(chinese[:40]) == list(range(40)), "stage 2 continues the epoch of stage 1"
    assert (
        sampler.notice_before(25) == "stage 2 begins at step 26: zh 100.0%"
        and not sampler.notice_before(24)
        and not sampler.notice_before(26)
    )
    assert sampler.step_metrics(25)["mix"]["stage"] == 1 and sampler.step_metrics(26)["mix"]["stage"] == 2
    tokens = sampler.step_metrics(50)["mix"]["tokens"]
    assert tokens == {"zh": 8 * len(chinese), "en": 8 * (200 - len(chinese))}


def test_epoch_length_of_a_mix(folder):
    assert make_mix_sampler(folder, "zh=0.5,en=0.5", steps=0).total_steps == 13  # all 50 rows' worth
    assert make_mix_sampler(folder, "zh=1x,en=4x", steps=0).total_steps == 20  # 40 + 4 * 10 rows
    assert (
        "en" in (table := make_mix_sampler(folder, "zh=1x,en=5x", steps=0).summary()) and "many: repeated text" in table
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((None, "zh=1", 0.5), "need --mix"),
        (("zh=1", "en=1", 0.0), "give both"),
        (("zh=1", None, 0.5), "give both"),
        (("zh=1", "en=1", 50), "not inside the run of 50 steps"),
        (("zh=1", "en=1", 0.001), "not inside the run"),
    ],
)
def test_invalid_mix_stages_are_one_line(folder, arguments, says):
    with pytest.raises(UserError, match=says):
        make_mix_sampler(folder, *arguments)
