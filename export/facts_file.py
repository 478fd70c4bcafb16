"""Reads and writes lineage.json, the file of an exported folder that holds the facts about its model.

    {"stage": "dpo", "parameters": 26878464, "tokens": 2009894, "chain": [...], ...}   keys: model_facts.model_facts

Read next: model_facts.py (collects the facts), hf_import.py (reads stage and chain).
"""

import json
import re
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.metric_keys import with_current_metric_keys
from model.checkpoint_schema import escape_controls_in, lineage_problem, stage_problem
from model.config import ModelConfig

LINEAGE_FILE = "lineage.json"
LICENSE_PATTERN = r"[a-z0-9][a-z0-9.+-]*"  # an identifier of the hub or of SPDX, in lower case
_LANGUAGES = ("zh", "en")

Facts = dict[str, Any]


def read_facts(folder: Path) -> Facts | None:
    """The facts of an exported folder, None if it has no lineage.json. Raises UserError if the file is damaged."""
    try:
        content = json.loads((folder / LINEAGE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"cannot read {folder / LINEAGE_FILE} ({error}): export the model again, or delete this file"
        ) from None
    if invalid := invalid_fields(content):
        raise UserError(
            f"{folder / LINEAGE_FILE}: invalid fields: {invalid}: export the model again, or delete this file"
        )
    absent = dict.fromkeys(("license", "parent", "adapter"))
    content["chain"] = escape_controls_in(content["chain"])
    return {**absent, **content, **summarize_chain(content["chain"]), "file": folder.name}


def invalid_fields(content: Any) -> str:
    """The invalid fields of a lineage.json, joined by commas; "" if all are valid."""
    if not isinstance(content, dict):
        return "everything"
    texts, numbers = ("stage", "size", "chat_format"), ("parameters", "active_parameters")
    invalid = [name for name in texts if not isinstance(content.get(name), str)]
    invalid += ["stage"] if stage_problem(content.get("stage")) else []
    invalid += ["chain"] if content.get("chain") is None or lineage_problem(content["chain"]) else []
    scores = content.get("scores")
    invalid += ["scores"] if not isinstance(scores, list) or not all(map(is_score_entry, scores)) else []
    invalid += [name for name in numbers if type(content.get(name)) is not int]
    for name, kind in (("license", str), ("parent", str), ("adapter", dict)):
        if not isinstance(content.get(name), (kind, type(None))):
            invalid.append(name)
    if isinstance(content.get("license"), str) and not re.fullmatch(LICENSE_PATTERN, content["license"]):
        invalid.append("license")
    try:
        ModelConfig(**content["config"])
    except (TypeError, ValueError, KeyError, ArithmeticError):
        invalid.append("config")
    return ", ".join(invalid)


def is_score_entry(score: Any) -> bool:
    """Whether `score` is a valid entry of `scores` (see `model_facts.model_facts`)."""
    if not isinstance(score, dict) or not isinstance(score.get("name"), str):
        return False
    accuracy, num_questions = score.get("accuracy"), score.get("questions")
    return (
        isinstance(accuracy, dict)
        and isinstance(num_questions, dict)
        and all(type(value) in (int, float) for value in accuracy.values())
        and all(type(value) is int for value in num_questions.values())
    )


def facts_json(facts: Facts) -> str:
    """The text of lineage.json. The key "file" is left out: it is the name of the folder."""
    content = {name: value for name, value in facts.items() if name != "file"}
    return json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def summarize_chain(chain: list[dict[str, Any]]) -> Facts:
    """Tokens, pairs and seconds summed over the stages of a chain; loss and validation of the last stage."""
    last = chain[-1] if chain else {}
    validation = last.get("validation")
    validations = [entry.get("validation") for entry in chain]
    losses = [found.get("val_loss") for found in validations if isinstance(found, dict)]
    split = {name for found in losses if isinstance(found, dict) for name in found}
    return {
        **{name: sum(number_or_zero(entry.get(name)) for entry in chain) for name in ("tokens", "pairs", "seconds")},
        "loss": last.get("loss"),
        "validation": with_current_metric_keys(validation) if isinstance(validation, dict) else validation or {},
        "languages": [name for name in _LANGUAGES if name in split],
    }


def number_or_zero(value: Any) -> float:
    """`value` if it is a number, else 0."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else 0
