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
import re
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.metric_keys import with_current_metric_keys
from export.hf_config import Settings, convert_hf_config, read_hf_json
from model.checkpoint import load_carried_tokenizer, read_checkpoint
from model.checkpoint_schema import (
    CHECKPOINT_FORMAT,
    Checkpoint,
    config_problem,
    escape_controls_in,
    lineage_problem,
    stage_problem,
)
from model.config import ModelConfig
from model.parameters import count_parameters
from model.tokenizer import ChatTokenizer, load_tokenizer

LINEAGE_FILE = "lineage.json"  # of an exported folder: its facts
LICENSE_PATTERN = r"[a-z0-9][a-z0-9.+-]*"  # an identifier of the hub or of SPDX, in lower case
FOREIGN_STAGE = "transformers"  # stage of a folder without lineage.json
MAX_REPORT_BYTES = 64 * 2**20  # larger .json files beside a model are not reports
_LANGUAGES = ("zh", "en")
_UNITS = ("tokens", "pairs", "answers")  # of which a stage counts those that it was trained on

Facts = dict[str, Any]


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
                logged["steps"] = row["step"]
                logged |= {name: row[name] for name in (*_UNITS, "seconds", "loss") if name in row}
            elif "val_loss" in row or "val_reward" in row:
                logged["validation"] = {n: v for n, v in row.items() if n not in ("step", *_UNITS)}
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
        per_language = {name: count.get("questions") for name, count in counts.items() if isinstance(count, dict)}
        num_questions = {name: number for name, number in per_language.items() if type(number) is int}
        scores.append({"name": report.stem, "accuracy": accuracy, "questions": num_questions})
    return scores


def _foreign_facts(folder: Path) -> Facts:
    """The facts about a transformers folder without lineage.json."""
    settings = read_hf_json(folder, "config.json")
    config = convert_hf_config(folder, settings, bool(settings.get("tie_word_embeddings")))
    return checkpoint_facts(checkpoint_entries(folder, settings, config, load_tokenizer(folder)), folder.name)


# ---- lineage.json ----------------------------------------------------------------------------------------------------
def checkpoint_entries(folder: Path, settings: Settings, config: ModelConfig, tokenizer: ChatTokenizer) -> Checkpoint:
    """The entries of a checkpoint for a transformers folder, except the tensors.

    settings: its config.json. Stage and lineage are those in lineage.json if it exists.
    """
    facts = read_facts(folder) or {}
    foreign = [{"stage": FOREIGN_STAGE, "source": str(folder), "model_type": settings["model_type"]}]
    return {
        "format": CHECKPOINT_FORMAT,
        "stage": facts.get("stage", FOREIGN_STAGE),
        "config": config.to_dict(),
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "files": tokenizer.files},
        "lineage": facts.get("chain", foreign),
    }


def read_facts(folder: Path) -> Facts | None:
    """The facts of an exported folder, None if it has no lineage.json. Raises UserError if the file is damaged."""
    advice = "export the model again, or delete this file"
    try:
        content = json.loads((folder / LINEAGE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {folder / LINEAGE_FILE} ({error}): {advice}") from None
    if invalid := invalid_fields(content):
        raise UserError(f"{folder / LINEAGE_FILE}: invalid fields: {invalid}: {advice}")
    absent = dict.fromkeys(("license", "parent", "adapter"))
    content["chain"] = escape_controls_in(content["chain"])
    return {**absent, **content, **summarize_chain(content["chain"]), "file": folder.name}


def invalid_fields(content: Any) -> str:
    """The invalid fields of a lineage.json, joined by commas; "" if all are valid."""
    if not isinstance(content, dict):
        return "everything"
    get, scores, license = content.get, content.get("scores"), content.get("license")
    is_valid = {
        **{name: isinstance(get(name), str) for name in ("size", "chat_format")},
        "stage": not stage_problem(get("stage")),
        "chain": get("chain") is not None and not lineage_problem(get("chain")),
        "scores": isinstance(scores, list) and all(map(is_score_entry, scores)),
        **{name: type(get(name)) is int for name in ("parameters", "active_parameters")},
        "license": license is None or (isinstance(license, str) and re.fullmatch(LICENSE_PATTERN, license)),
        "parent": isinstance(get("parent"), (str, type(None))),
        "adapter": isinstance(get("adapter"), (dict, type(None))),
        "config": not config_problem(get("config")),
    }
    return ", ".join(name for name, valid in is_valid.items() if not valid)


def is_score_entry(score: Any) -> bool:
    """Whether `score` is a valid entry of `scores` (see `model_facts.model_facts`)."""
    if not isinstance(score, dict) or not isinstance(score.get("name"), str):
        return False
    accuracy, num_questions = score.get("accuracy"), score.get("questions")
    if not isinstance(accuracy, dict) or not isinstance(num_questions, dict):
        return False
    return {*map(type, accuracy.values())} <= {int, float} and {*map(type, num_questions.values())} <= {int}


def facts_json(facts: Facts) -> str:
    """The text of lineage.json. The key "file" is left out: it is the name of the folder."""
    content = {name: value for name, value in facts.items() if name != "file"}
    return json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def summarize_chain(chain: list[dict[str, Any]]) -> Facts:
    """Tokens, pairs and seconds summed over the stages of a chain; loss and validation of the last stage."""
    last = chain[-1] if chain else {}
    validation = last.get("validation")
    validations = [entry.get("validation") for entry in chain]
    losses = [
        found.get(name) for found in validations if isinstance(found, dict) for name in ("val_loss", "val_reward")
    ]
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
