"""Provenance of training data: the curation steps (clean, dedup, decontaminate) that the rows went through.

    read_provenance(files)      -> [{"step": "clean", ...}, {"step": "decontaminate", "against": [...], ...}]
    format_provenance(history)  -> "cleaned by 19 rules; checked against ceval (13,866 questions, …)"

Every curation step writes a report.json beside its rows, with the list of all steps so far. data_process.py copies the
list into the meta.json of the dataset; training copies it from there into the training log. For several files, the list
contains only the steps that all of them went through.

Read next: ../curation/transform.py (writes report.json), prepare_text.py and prepare_chats.py (copy the list).
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import UserError
from corpus.dataset_meta import read_checked_meta

Provenance = list[dict[str, Any]]


def read_provenance(paths: Iterable[str | os.PathLike[str]]) -> Provenance:
    """Return the steps that all files went through, in order: [] if one of them has no valid report.json beside it."""
    common: Provenance | None = None
    for folder in dict.fromkeys(Path(path).resolve().parent for path in paths):
        try:
            steps = json.loads((folder / "report.json").read_text(encoding="utf-8"))["history"]
            steps = [entry for entry in steps if isinstance(entry, dict) and "step" in entry]
        except (OSError, ValueError, KeyError, TypeError):
            steps = []
        common = steps if common is None else [entry for entry in common if _is_same_step(entry, steps)]
    return common or []


def data_provenance(folder: str | os.PathLike[str]) -> Provenance:
    """Return the steps in the meta.json of a dataset; [] if it is missing or damaged."""
    try:
        steps = (read_checked_meta(folder) or {}).get("history", [])
        return [entry for entry in steps if isinstance(entry, dict) and "step" in entry]
    except (UserError, AttributeError, TypeError):
        return []


def _is_same_step(entry: dict[str, Any], others: Provenance) -> bool:
    """Whether `others` contains the step. Row counts are not compared."""
    counts = ("read", "kept")
    wanted = {key: value for key, value in entry.items() if key not in counts}
    return any(wanted == {key: value for key, value in other.items() if key not in counts} for other in others)


def format_provenance(history: Provenance) -> str:
    """The steps as one line for a log; "" for an empty history."""
    parts = []
    for entry in history:
        if entry["step"] == "clean":
            parts.append(f"cleaned by {len(entry.get('rules', []))} rules")
        elif entry["step"] == "dedup":
            parts.append("without exact duplicates" if entry.get("exact_only") else "without near-duplicates")
        elif entry["step"] == "decontaminate":
            against = ", ".join(entry.get("against", []))
            parts.append(f"checked against {against} ({entry.get('questions', 0):,} questions, {entry.get('ngram')})")
    return "; ".join(parts)
