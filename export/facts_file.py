"""The file lineage.json of an exported folder: what is known about the model, as JSON, read and written.

    {"stage": "dpo", "parameters": 26878464, "tokens": 2009894, "chain": [...], ...}      the keys of model_facts.facts

Read next: model_facts.py (where the facts come from), hf_import.py (reads stage and chain).
"""

import json
import re
from pathlib import Path
from typing import Any

from common.errors import UserError
from model.checkpoint_schema import as_printable, wrong_lineage, wrong_stage
from model.config import ModelConfig

NOTE = "lineage.json"  # the file of an exported folder
LICENSE = r"[a-z0-9][a-z0-9.+-]*"  # an identifier of the hub or of SPDX, in small letters
LANGUAGES = ("zh", "en")

Facts = dict[str, Any]


def read_note(folder: Path) -> Facts | None:
    """The facts of an exported folder; None where it was not exported from here. Raises UserError when damaged."""
    try:
        content = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {folder / NOTE} ({error}): export the model again, or delete this file") from None
    if wrong := wrong_fields(content):
        raise UserError(f"{folder / NOTE}: {wrong} is wrong: export the model again, or delete this file")
    absent = dict.fromkeys(("license", "parent", "adapter"))
    content["chain"] = as_printable(content["chain"])
    return {**absent, **content, **summary(content["chain"]), "file": folder.name}


def wrong_fields(content: Any) -> str:
    """The names of the fields of a lineage.json that nobody could have written; "" if it is sound."""
    if not isinstance(content, dict):
        return "everything"
    texts, numbers = ("stage", "size", "chat_format"), ("parameters", "active_parameters")
    wrong = [name for name in texts if not isinstance(content.get(name), str)]
    wrong += ["stage"] if wrong_stage(content.get("stage")) else []
    wrong += ["chain"] if content.get("chain") is None or wrong_lineage(content["chain"]) else []
    scores = content.get("scores")
    wrong += ["scores"] if not isinstance(scores, list) or not all(map(is_score, scores)) else []
    wrong += [name for name in numbers if type(content.get(name)) is not int]
    for name, kind in (("license", str), ("parent", str), ("adapter", dict)):
        if not isinstance(content.get(name), (kind, type(None))):
            wrong.append(name)
    if isinstance(content.get("license"), str) and not re.fullmatch(LICENSE, content["license"]):
        wrong.append("license")
    try:
        ModelConfig(**content["config"])
    except (TypeError, ValueError, KeyError, ArithmeticError):
        wrong.append("config")
    return ", ".join(wrong)


def is_score(score: Any) -> bool:
    """Whether this is an entry of `scores`: see `facts`."""
    if not isinstance(score, dict) or not isinstance(score.get("name"), str):
        return False
    accuracy, asked = score.get("accuracy"), score.get("questions")
    return (
        isinstance(accuracy, dict)
        and isinstance(asked, dict)
        and all(type(value) in (int, float) for value in accuracy.values())
        and all(type(value) is int for value in asked.values())
    )


def note(known: Facts) -> str:
    """The text of an exported folder's lineage.json. What the folder is called is not part of it."""
    content = {name: value for name, value in known.items() if name != "file"}
    return json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def summary(chain: list[dict[str, Any]]) -> Facts:
    """The figures of a whole chain: sums over its stages, and the last stage's losses."""
    last = chain[-1] if chain else {}
    validations = [entry.get("validation") for entry in chain]
    losses = [found.get("val_loss") for found in validations if isinstance(found, dict)]
    split = {name for found in losses if isinstance(found, dict) for name in found}
    return {
        **{name: sum(number(entry.get(name)) for entry in chain) for name in ("tokens", "pairs", "seconds")},
        "loss": last.get("loss"),
        "validation": last.get("validation") or {},
        "languages": [name for name in LANGUAGES if name in split],
    }


def number(value: Any) -> float:
    """The number that an entry names; 0 for none, and for whatever else somebody wrote there."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else 0
