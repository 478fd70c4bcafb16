"""Old and current names of metrics in logs and checkpoints. All readers of logs accept both.

    {"val_accuracy": {"zh": 0.9}, "val_likelier_before": …}  ->  {"val_reward_accuracy": {"zh": 0.9}, …}

Read next: ../trainer/metrics.py (the log), ../export/model_facts.py (the lineage).
"""

from typing import Any

# Old name -> current name. Also with the prefix val_ (validation data) and the suffix _before (before training).
OLD_METRIC_KEYS = {
    "real_token_share": "token_fraction",  # no password  # nosec B105
    "likelier": "chosen_preferred",
    "margin": "reward_margin",
    "accuracy": "reward_accuracy",
    "chosen_change": "chosen_logp_delta",
    "balance_loss": "aux_loss",
}


def current_metric_key(key: str) -> str:
    """Return the current name of a metric; current names stay unchanged."""
    prefix, suffix = "val_" if key.startswith("val_") else "", "_before" if key.endswith("_before") else ""
    metric = key.removeprefix(prefix).removesuffix(suffix)
    return f"{prefix}{OLD_METRIC_KEYS.get(metric, metric)}{suffix}"


def with_current_metric_keys(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the same values in the same order under their current names."""
    return {current_metric_key(key): value for key, value in metrics.items()}
