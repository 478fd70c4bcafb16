"""What was done to a set of rows before: cleaned by which rules, deduplicated, checked against which exams.

Every step of data_process.py leaves a report.json beside its rows, with a list of what was done so far. Steps that
read those rows carry the list on, into the meta.json of the training data and from there into the training log.

    history_of(files)  -> [{"step": "clean", ...}, {"step": "decontaminate", "against": [...], ...}]
    history_in_words(history)  -> "cleaned by 19 rules; checked against ceval (13,866 questions, …)"

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

History = list[dict[str, Any]]


def history_of(paths: Iterable[str | os.PathLike[str]]) -> History:
    """The steps that all of these files went through, in order. A file without a report went through none."""
    common: History | None = None
    for folder in dict.fromkeys(Path(path).resolve().parent for path in paths):
        try:
            found = json.loads((folder / "report.json").read_text(encoding="utf-8"))["history"]
            found = [entry for entry in found if isinstance(entry, dict) and "step" in entry]
        except (OSError, ValueError, KeyError, TypeError):
            found = []
        common = found if common is None else [entry for entry in common if _alike(entry, found)]
    return common or []


def history_of_data(folder: str | os.PathLike[str]) -> History:
    """What was done to the rows of a folder of training data, from its meta.json; [] where that is damaged."""
    try:
        found = (read_checked_meta(folder) or {}).get("history", [])
        return [entry for entry in found if isinstance(entry, dict) and "step" in entry]
    except (UserError, AttributeError, TypeError):
        return []


def _alike(entry: dict[str, Any], others: History) -> bool:
    """The same was done; how many rows it was done to may differ."""
    counts = ("read", "kept")
    wanted = {key: value for key, value in entry.items() if key not in counts}
    return any(wanted == {key: value for key, value in other.items() if key not in counts} for other in others)


def history_in_words(history: History) -> str:
    """One line for a log; empty when nothing is known."""
    said = []
    for entry in history:
        if entry["step"] == "clean":
            said.append(f"cleaned by {len(entry.get('rules', []))} rules")
        elif entry["step"] == "dedup":
            said.append("without exact duplicates" if entry.get("exact_only") else "without near-duplicates")
        elif entry["step"] == "decontaminate":
            against = ", ".join(entry.get("against", []))
            said.append(f"checked against {against} ({entry.get('questions', 0):,} questions, {entry.get('ngram')})")
    return "; ".join(said)
