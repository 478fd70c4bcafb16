"""Collects the facts about a model (stages, data, tokens, losses, scores) from the files that training wrote.

    model_facts("out/dpo_512.pth")  ->  {"stage": "dpo", "parameters": 26878464, "tokens": 2009894, "chain": [...], ...}

The checkpoint has one entry per stage (written by trainer/loop.py). Files beside it add the log of its own stage
(.jsonl, for values that the entry lacks) and reports of `2-eval.py --json` or an exam: each .json that names the file
as its "checkpoint" and is not older than it. An exported folder has all of this in lineage.json.

Used by model_card.py and by lists of models. Reads files only and loads no weights.
Read next: model_card.py, ../model/checkpoint.py.
"""

import json
import os
from pathlib import Path
from typing import Any

from export.facts_file import Facts, read_facts, summarize_chain
from export.hf_config import convert_hf_config
from export.hf_import import checkpoint_entries, read_hf_json
from model.checkpoint import load_carried_tokenizer, read_checkpoint
from model.checkpoint_schema import Checkpoint
from model.config import ModelConfig
from model.parameters import count_parameters
from model.tokenizer import load_tokenizer

MAX_REPORT_BYTES = 64 * 2**20  # larger .json files beside a model are not reports


def model_facts(path: str | os.PathLike[str]) -> Facts:
    """The facts about a .pth file or an exported folder. Every key is present; an unknown value is None or empty.

    file, stage, size (`512`, `512_moe`), config, chat_format
    parameters, active_parameters   of an adapter: those of the merged model
    tokens, pairs, seconds          training data and time, summed over the chain
    loss                            the last training loss of the last stage
    validation                      of the last stage: {"val_loss": {"zh": nats}, "bits_per_byte": {"zh": bits}, ...}
    languages                       languages of the validation sets
    scores                          [{"name", "accuracy": {"zh": fraction}, "questions": {"zh": number}}]
    chain                           one entry per stage, the oldest first: stage, data, steps, tokens or pairs,
                                    seconds, loss, validation, learning_rate, ...; if training started from a foreign
                                    model, the first entry has stage "transformers" and names it
    parent, adapter                 of an adapter: the parent's file name; rank, alpha, dropout, targets
    license                         of an exported folder, if stated

    Raises UserError if the file is missing, damaged or not a model.
    """
    path = Path(path)
    if path.is_dir():
        return read_facts(path) or _foreign_facts(path)
    checkpoint = read_checkpoint(path, weights=False)
    facts = checkpoint_facts(checkpoint, path.name)
    if facts["chain"]:
        facts["chain"][-1] = _complete_from_log(path.with_suffix(".jsonl"), facts["chain"][-1])
    return {**facts, **summarize_chain(facts["chain"]), "scores": _read_scores(path)}


def checkpoint_facts(checkpoint: Checkpoint, file: str) -> Facts:
    """The facts in the checkpoint itself; `file` is its name."""
    config, tokenizer = ModelConfig(**checkpoint["config"]), load_carried_tokenizer(checkpoint, file)
    parameters = count_parameters(config)
    adapter = checkpoint.get("adapter") or {}
    chain = [without_local_paths(entry) for entry in checkpoint.get("lineage") or []]
    return {
        "file": file,
        "stage": checkpoint["stage"],
        "size": config.name,
        "config": config.to_dict(),
        "chat_format": tokenizer.format_name,
        "parameters": parameters.total,
        "active_parameters": parameters.active,
        **summarize_chain(chain),
        "scores": [],
        "chain": chain,
        "parent": Path(adapter["parent"]).name if adapter.get("parent") else None,
        "adapter": {name: adapter[name] for name in ("rank", "alpha", "dropout", "targets") if name in adapter} or None,
        "license": checkpoint.get("license"),
    }


def without_local_paths(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry, with data and source reduced to a file name where the path is absolute or contains ".."."""

    def last_part(value: str) -> str:
        return Path(value).name if Path(value).is_absolute() or ".." in Path(value).parts else value

    return {name: last_part(v) if name in ("data", "source") and isinstance(v, str) else v for name, v in entry.items()}


def _complete_from_log(log: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """The entry, with values that it lacks filled in from the last rows of its stage's log."""
    logged: dict[str, Any] = {}
    try:
        lines = log.read_text(encoding="utf-8").splitlines() if not entry.get("validation") else []
    except (OSError, UnicodeDecodeError):
        return entry
    for line in lines:
        try:
            row = json.loads(line)
            if "loss" in row:
                logged |= {"steps": row["step"]} | {
                    n: row[n] for n in ("tokens", "pairs", "seconds", "loss") if n in row
                }
            elif "val_loss" in row:
                logged["validation"] = {n: v for n, v in row.items() if n not in ("step", "tokens", "pairs")}
        except (ValueError, TypeError, KeyError):  # an incomplete last line of a killed run
            continue
    return {**logged, **{name: value for name, value in entry.items() if value or name not in logged}}


def _read_scores(path: Path) -> list[dict[str, Any]]:
    """The scores in the reports beside a model. A report older than the file describes an earlier model."""
    scores = []
    for report in sorted(path.parent.glob("*.json")):
        try:
            file_stat = report.stat()
            if file_stat.st_size > MAX_REPORT_BYTES or file_stat.st_mtime < path.stat().st_mtime:
                continue
            content = json.loads(report.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        checkpoint_name = content.get("checkpoint") if isinstance(content, dict) else None
        if not isinstance(checkpoint_name, str) or Path(checkpoint_name).name != path.name:
            continue
        accuracy, counts = content.get("accuracy"), content.get("counts")
        if isinstance(accuracy, (int, float)):
            accuracy = {"all": accuracy}
        if not isinstance(accuracy, dict) or not all(isinstance(value, (int, float)) for value in accuracy.values()):
            continue
        counts = counts if isinstance(counts, dict) else {}
        num_questions = {
            name: c["questions"]
            for name, c in counts.items()
            if isinstance(c, dict) and type(c.get("questions")) is int
        }
        scores.append({"name": report.stem, "accuracy": accuracy, "questions": num_questions})
    return scores


def _foreign_facts(folder: Path) -> Facts:
    """The facts about a transformers folder without lineage.json."""
    settings = read_hf_json(folder, "config.json")
    config = convert_hf_config(folder, settings, bool(settings.get("tie_word_embeddings")))
    return checkpoint_facts(checkpoint_entries(folder, settings, config, load_tokenizer(folder)), folder.name)
