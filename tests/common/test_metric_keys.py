"""Metric keys of earlier versions are mapped to current ones when a log or lineage is read."""

import json
from pathlib import Path

import pytest

from common.metric_keys import OLD_METRIC_KEYS, current_metric_key, with_current_metric_keys
from demo_world.report import summarize_log
from export.model_card import validation_figures
from export.model_facts import summarize_chain
from tests.helpers import read_jsonl
from trainer.metrics import read_log_rows

OLD_LOG = Path(__file__).resolve().parent.parent / "data" / "before_renames" / "out" / "dpo_16.jsonl"
ACCURACY = {"zh": 0.94, "en": 0.97}


@pytest.mark.parametrize(
    ("old", "current"),
    [
        ("accuracy", "reward_accuracy"),
        ("val_accuracy", "val_reward_accuracy"),
        ("likelier_before", "chosen_preferred_before"),
        ("val_likelier_before", "val_chosen_preferred_before"),
        ("val_balance_loss", "val_aux_loss"),
        ("val_loss", "val_loss"),
        ("chosen_logp", "chosen_logp"),
        ("val_", "val_"),
    ],
)
def test_old_metric_keys_become_current_ones(old, current):
    assert current_metric_key(old) == current == current_metric_key(current)


def test_values_and_order_of_metrics_are_kept():
    old = {"step": 1, "accuracy": 0.5, "val_margin": {"zh": 1.0}}
    assert list(with_current_metric_keys(old).items()) == [
        ("step", 1), ("reward_accuracy", 0.5), ("val_reward_margin", {"zh": 1.0}),
    ]  # fmt: skip


def test_a_resumed_run_reads_its_old_log_under_current_keys():
    rows = read_log_rows(OLD_LOG, 10**6)
    assert [list(row.values()) for row in rows] == [list(row.values()) for row in read_jsonl(OLD_LOG)]
    assert {"reward_accuracy", "reward_margin", "chosen_logp_delta", "token_fraction"} <= rows[0].keys()
    assert not {*OLD_METRIC_KEYS, "val_accuracy"} & {key for row in rows for key in row}


def test_the_demo_reads_an_old_dpo_log_under_current_keys():
    log = summarize_log(OLD_LOG)
    names = {"val_reward_accuracy", "val_chosen_preferred", "val_chosen_preferred_before"}
    assert names <= log.keys() and "val_accuracy" not in log


@pytest.mark.parametrize("key", ["val_accuracy", "val_reward_accuracy"])
def test_a_lineage_of_any_version_shows_its_accuracy(key):
    entry = json.loads(json.dumps({"stage": "dpo", "validation": {"val_loss": {"zh": 0.5, "en": 0.5}, key: ACCURACY}}))
    assert summarize_chain([entry])["validation"]["val_reward_accuracy"] == ACCURACY
    assert validation_figures(entry["validation"]) == "en 97.0% ranked right, zh 94.0% ranked right"
