"""What was done to a set of rows before: cleaned by which rules, deduplicated, checked against which exams.

Every step of data_process.py leaves a report.json beside its rows, with a list of what was done so far. Steps that
read those rows carry the list on, into the meta.json of the training data and from there into the training log.

    read_provenance(files)  -> [{"step": "clean", ...}, {"step": "decontaminate", "against": [...], ...}]
    format_provenance(history)  -> "cleaned by 19 rules; checked against ceval (13,866 questions, …)"

Of several files only what was done to all of them is claimed.

Read next: ../curation/transform.py (who writes report.json), prepare_text.py and prepare_chats.py (who carry it on).
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
    """The steps that all of these files went through, in order. A file without a report went through none."""
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
    """What was done to the rows of a folder of training data, from its meta.json; [] where that is damaged."""
    try:
        steps = (read_checked_meta(folder) or {}).get("history", [])
        return [entry for entry in steps if isinstance(entry, dict) and "step" in entry]
    except (UserError, AttributeError, TypeError):
        return []


def _is_same_step(entry: dict[str, Any], others: Provenance) -> bool:
    """The same was done; how many rows it was done to may differ."""
    counts = ("read", "kept")
    wanted = {key: value for key, value in entry.items() if key not in counts}
    return any(wanted == {key: value for key, value in other.items() if key not in counts} for other in others)


def format_provenance(history: Provenance) -> str:
    """One line for a log; empty when nothing is known."""
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
