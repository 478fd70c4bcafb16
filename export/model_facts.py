"""Where a model comes from: its stages, data, tokens, losses and scores, read out of the files that training left.

    facts("out/dpo_512.pth")  ->  {"stage": "dpo", "parameters": 26878464, "tokens": 2009894, "chain": [...], ...}

The checkpoint carries one entry per stage (trainer/loop.py writes them). Beside it may lie the log of its own stage
(.jsonl, for what an entry does not say) and reports of `2-eval.py --json` or an exam: a .json that names the file as
its "checkpoint" and is not older than it. An exported folder carries all of this as lineage.json.

Used by model_card.py (the model card) and by whatever shows a list of models. Reads only; no weight is loaded.
Read next: model_card.py, ../model/checkpoint.py.
"""

import json
import os
from pathlib import Path
from typing import Any

from export.facts_file import Facts, read_note, summary
from export.hf_config import model_config
from export.hf_import import describe_folder, read_json
from model.checkpoint import carried_tokenizer, read_checkpoint
from model.checkpoint_schema import Checkpoint
from model.config import ModelConfig
from model.parameters import count
from model.tokenizer import load_tokenizer

BIGGEST_REPORT = 64 * 2**20  # bytes; larger .json files beside a model are no reports


def facts(path: str | os.PathLike[str]) -> Facts:
    """What is known about a .pth, or about an exported folder. Every key is there, None or empty where nothing is said.

    file, stage, size (`512`, `512_moe`), config, chat_format
    parameters, active_parameters   both with the parent's where the file is an adapter
    tokens, pairs, seconds          trained on and spent, summed over the chain
    loss                            the last training loss of the last stage
    validation                      of the last stage: {"val_loss": {"zh": nats}, "bits_per_byte": {"zh": bits}, ...}
    languages                       those of the validation sets
    scores                          [{"name", "accuracy": {"zh": share}, "questions": {"zh": number}}]
    chain                           an entry for each stage, the oldest first: stage, data, steps, tokens or pairs,
                                    seconds, loss, validation, learning_rate, ...; a first entry of stage
                                    "transformers" names the foreign model that was started from
    parent, adapter                 of an adapter: the parent's file name; rank, alpha, dropout, targets
    license                         of an exported folder, where it was stated

    Raises UserError when the file is missing, damaged or not a model.
    """
    path = Path(path)
    if path.is_dir():
        return read_note(path) or _foreign(path)
    checkpoint = read_checkpoint(path, weights=False)
    known = describe(checkpoint, path.name)
    if known["chain"]:
        known["chain"][-1] = _from_log(path.with_suffix(".jsonl"), known["chain"][-1])
    return {**known, **summary(known["chain"]), "scores": _scores(path)}


def describe(checkpoint: Checkpoint, file: str) -> Facts:
    """The facts that a checkpoint holds itself."""
    config, tokenizer = ModelConfig(**checkpoint["config"]), carried_tokenizer(checkpoint, file)
    parameters = count(config)
    adapter = checkpoint.get("adapter") or {}
    chain = [public(entry) for entry in checkpoint.get("lineage") or []]
    return {
        "file": file,
        "stage": checkpoint["stage"],
        "size": config.name,
        "config": config.to_dict(),
        "chat_format": tokenizer.format_name,
        "parameters": parameters.total,
        "active_parameters": parameters.active,
        **summary(chain),
        "scores": [],
        "chain": chain,
        "parent": Path(adapter["parent"]).name if adapter.get("parent") else None,
        "adapter": {name: adapter[name] for name in ("rank", "alpha", "dropout", "targets") if name in adapter} or None,
        "license": checkpoint.get("license"),
    }


def public(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of a lineage without the names of the folders of somebody's machine."""

    def last_part(value: str) -> str:
        return Path(value).name if Path(value).is_absolute() or ".." in Path(value).parts else value

    return {name: last_part(v) if name in ("data", "source") and isinstance(v, str) else v for name, v in entry.items()}


def _from_log(log: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """The entry, completed by the last rows of its stage's log where it says less."""
    found: dict[str, Any] = {}
    try:
        lines = log.read_text(encoding="utf-8").splitlines() if not entry.get("validation") else []
    except (OSError, UnicodeDecodeError):
        return entry
    for line in lines:
        try:
            row = json.loads(line)
            if "loss" in row:
                found |= {"steps": row["step"]} | {
                    n: row[n] for n in ("tokens", "pairs", "seconds", "loss") if n in row
                }
            elif "val_loss" in row:
                found["validation"] = {n: v for n, v in row.items() if n not in ("step", "tokens", "pairs")}
        except (ValueError, TypeError, KeyError):  # the line that a kill cut short
            continue
    return {**found, **{name: value for name, value in entry.items() if value or name not in found}}


def _scores(path: Path) -> list[dict[str, Any]]:
    """What the reports beside a model say about it; those older than the model were made of another one."""
    scores = []
    for report in sorted(path.parent.glob("*.json")):
        try:
            about = report.stat()
            if about.st_size > BIGGEST_REPORT or about.st_mtime < path.stat().st_mtime:
                continue
            content = json.loads(report.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        named = content.get("checkpoint") if isinstance(content, dict) else None
        if not isinstance(named, str) or Path(named).name != path.name:
            continue
        accuracy, counts = content.get("accuracy"), content.get("counts")
        if isinstance(accuracy, (int, float)):
            accuracy = {"all": accuracy}
        if not isinstance(accuracy, dict) or not all(isinstance(value, (int, float)) for value in accuracy.values()):
            continue
        counts = counts if isinstance(counts, dict) else {}
        asked = {
            name: c["questions"]
            for name, c in counts.items()
            if isinstance(c, dict) and type(c.get("questions")) is int
        }
        scores.append({"name": report.stem, "accuracy": accuracy, "questions": asked})
    return scores


def _foreign(folder: Path) -> Facts:
    """Somebody else's transformers folder: its size, and where it lies."""
    settings = read_json(folder, "config.json")
    config = model_config(folder, settings, bool(settings.get("tie_word_embeddings")))
    return describe(describe_folder(folder, settings, config, load_tokenizer(folder)), folder.name)
