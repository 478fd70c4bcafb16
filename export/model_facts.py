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
import re
from pathlib import Path
from typing import Any

from common.errors import UserError
from model.checkpoint import Checkpoint, carried_tokenizer, read_checkpoint
from model.checkpoint_schema import as_printable, wrong_lineage, wrong_stage
from model.config import ModelConfig
from model.parameters import count

NOTE = "lineage.json"  # the file of an exported folder
LICENSE = r"[a-z0-9][a-z0-9.+-]*"  # an identifier of the hub or of SPDX, in small letters
LANGUAGES = ("zh", "en")
BIGGEST_REPORT = 64 * 2**20  # bytes; larger .json files beside a model are no reports

Facts = dict[str, Any]


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


def _foreign(folder: Path) -> Facts:
    """Somebody else's transformers folder: its size, and where it lies."""
    from export.hf_config import model_config
    from export.hf_import import describe_folder, read_json
    from model.tokenizer import load_tokenizer

    settings = read_json(folder, "config.json")
    config = model_config(folder, settings, bool(settings.get("tie_word_embeddings")))
    return describe(describe_folder(folder, settings, config, load_tokenizer(folder)), folder.name)
