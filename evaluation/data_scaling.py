"""Data scaling of SFT: one model per fraction of the chats, one table, one plot (BELLE, arXiv:2303.14742).

    python 3-full_sft.py --recipe belle --data_fractions 0.1,0.3,0.5,1.0 --questions questions.jsonl

Subsets are nested: 0.1 is part of 0.3, which is part of 1.0. All models have the same parent, hyperparameters and
validation set. The number of epochs is the same, as in BELLE's study, so more data also means more steps.

Writes  out/data_study/data_study.md, .csv, .json, .png, and each model with its log in share_*/. A finished fraction is
not trained again; an interrupted one resumes.
Read next: ../trainer/loop.py (training), qa.py (how answers are scored).
"""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.files import atomic_write, write_text
from common.locks import lock_output
from evaluation.chat_model import open_chat_model
from evaluation.qa import chat_accuracy
from evaluation.qa_data import read_keyed_questions
from evaluation.tables import csv_text, table_row
from export.hf_import import open_model
from model.checkpoint import load_state, model_state_dict
from trainer.config import TrainConfig
from trainer.datasets import Batch, TokenDataset
from trainer.distributed import DistContext
from trainer.loop import train
from trainer.stage import Stage
from trainer.train_state import resume_path, run_fingerprint

# The settings that change the result. A saved result is reused where these, the model and the data are equal.
RESULT_FIELDS = (
    *("epochs", "max_steps", "batch_size", "global_batch_size", "accumulation_steps", "learning_rate", "schedule"),
    *("min_lr_ratio", "warmup", "weight_decay", "grad_clip", "eval_tokens"),
)


class DataSubset(TokenDataset):
    """The first `fraction` of the rows of one seeded shuffle, so smaller subsets are part of larger ones."""

    def __init__(self, data: TokenDataset, fraction: float, seed: int) -> None:
        self.data, self.folder = data, data.folder
        order = np.random.default_rng((seed, len(data))).permutation(len(data))
        self.rows = order[: max(1, round(fraction * len(data)))]

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self) -> np.ndarray | None:
        lengths = self.data.lengths()
        return None if lengths is None else lengths[self.rows]

    def batch(self, rows: np.ndarray) -> Batch:
        return self.data.batch(self.rows[np.asarray(rows)])


def run_data_scaling(
    config: TrainConfig, stage: Stage, dist: DistContext, fractions: Sequence[float], questions_path: str
) -> None:
    """Train and score one model per fraction of the chats, smallest first; write table and plot after each."""
    folder = Path(config.out_dir) / "data_study"
    questions = read_keyed_questions(questions_path) if questions_path else []
    parent = {name: tensor.clone() for name, tensor in model_state_dict(stage.model).items()}
    rows: list[dict[str, Any]] = []
    with lock_output(folder) if dist.is_rank0 else contextlib.nullcontext():
        for fraction in fractions:
            load_state(stage.model, parent, "the parent")  # every fraction starts from the parent's weights
            subset_stage = dataclasses.replace(stage, data=DataSubset(stage.data, fraction, config.seed))
            subset_config = dataclasses.replace(config, out_root=str(folder), run_name=f"share_{fraction:g}")
            row = train_and_score_subset(subset_config, subset_stage, dist, fraction, questions)
            if row is None:
                dist.print0("the data study is incomplete: run again to resume")
                return
            rows.append(row)
            if dist.is_rank0:
                write_scaling_results(folder, rows)
    dist.print0((folder / "data_study.md").read_text(encoding="utf-8") if dist.is_rank0 else "")
    dist.print0(f"written: {folder / 'data_study.md'}, .csv, .json and .png")


def read_saved_result(result_path: Path) -> dict[str, Any]:
    """The saved state of an earlier run of this fraction; {} where it is missing or unreadable."""
    try:
        saved = json.loads(result_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return saved if isinstance(saved, dict) and isinstance(saved.get("row", {}), dict) else {}


def train_and_score_subset(
    config: TrainConfig, stage: Stage, dist: DistContext, fraction: float, questions: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """The result row of one fraction, trained and scored unless it is saved. None when the training was interrupted."""
    path, result_path = stage.checkpoint_path(config.out_dir), Path(config.out_dir) / "study.json"
    job = {name: getattr(config, name) for name in RESULT_FIELDS} | run_fingerprint(config, stage)
    job = json.loads(json.dumps(job))  # the same types as in the file that it is compared with
    saved = read_saved_result(result_path) if config.resume != "never" else {}
    dist.barrier()  # all ranks have read before rank 0 writes
    if saved.get("job") != job:
        if saved:
            config = dataclasses.replace(config, resume="never")
        saved = {"job": job}
    if not resume_path(path).exists():  # a model without a saved result is trained again
        config = dataclasses.replace(config, resume="never")
    if "row" in saved and path.is_file():
        dist.print0(f"{percent(fraction)}: already trained")
    else:
        dist.print0(f"\n{percent(fraction)}: {len(stage.data):,} chats")
        if dist.is_rank0:
            write_text(result_path, json.dumps(saved))
        train(config, stage, dist)
        dist.barrier()
        if resume_path(path).exists():
            return None
        saved = {"job": job, "row": training_figures(path, fraction, len(stage.data))}
    question_set = [[question["question"], *question["keys"]] for question in questions]
    if dist.is_rank0:  # the other ranks wait: generation is short compared with training
        if question_set and saved.get("asked") != question_set:
            saved |= {"asked": question_set}
            saved["row"]["right"] = chat_accuracy(open_chat_model(path, dist.device, dist.dtype), questions)
        write_text(result_path, json.dumps(saved, ensure_ascii=False))
    dist.barrier()
    row: dict[str, Any] = saved["row"] if question_set else {**saved["row"], "right": {}}
    return row


def training_figures(path: Path, fraction: float, chats: int) -> dict[str, Any]:
    """Steps, tokens, seconds and losses, from the last lineage entry of the checkpoint."""
    entry = open_model(path)[2]["lineage"][-1]
    row = {"share": fraction, "chats": chats, "steps": entry["steps"], "tokens": entry["tokens"]}
    row |= {"seconds": round(entry["seconds"], 1), "loss": entry["loss"]}
    return {**row, **{name: entry["validation"].get(name, {}) for name in ("val_loss", "bits_per_byte")}, "right": {}}


# ---- table and plot --------------------------------------------------------------------------------------------------
def write_scaling_results(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows as Markdown, csv and json, and the plot."""
    splits = list(dict.fromkeys(split for row in rows for split in row["val_loss"]))
    languages = list(dict.fromkeys(lang for row in rows for lang in row["right"]))
    csv_rows, table = [], []
    for row in rows:
        columns = {name: row[name] for name in ("share", "chats", "steps", "tokens", "seconds")}
        for name in ("val_loss", "bits_per_byte"):
            columns |= {f"{name}_{split}": row[name].get(split) for split in splits}
        csv_rows.append(columns | {f"right_{lang}": row["right"].get(lang) for lang in languages})
        counts = [percent(row["share"]), *(f"{row[name]:,}" for name in ("chats", "steps", "tokens"))]
        losses = (f"{row['val_loss'][split]:.4f}" for split in splits)
        table.append(table_row(*counts, *losses, *(f"{row['right'][lang]:.1%}" for lang in languages)))
    headers = ["fraction", "chats", "steps", "trained tokens", *(f"held-out loss {split}" for split in splits)]
    headers += [f"accuracy {lang}" for lang in languages]
    page = ["# Data scaling", "", table_row(*headers), "|" + " --- |" * len(headers), *table]
    write_text(folder / "data_study.csv", csv_text(csv_rows))
    write_text(folder / "data_study.json", json.dumps({"rows": rows}, indent=1))
    write_text(folder / "data_study.md", "\n".join(page) + "\n")
    plot_scaling(rows, splits, languages, folder / "data_study.png")


def percent(fraction: float) -> str:
    return f"{100 * fraction:g} %"


def plot_scaling(rows: list[dict[str, Any]], splits: list[str], languages: list[str], path: Path) -> None:
    """Plot held-out loss, and accuracy where there are questions, over the number of chats (log scale)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [("held-out loss (nats per token)", "val_loss", splits, 1.0)]
    panels += [("accuracy on questions (%)", "right", languages, 100.0)] if languages else []
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False)
    for ax, (title, name, keys, scale) in zip(axes[0], panels, strict=True):
        for key in keys:
            style = f"C{sorted({*splits, *languages}).index(key)}o-"  # a language has the same colour in both panels
            ax.plot([row["chats"] for row in rows], [scale * row[name][key] for row in rows], style, label=key)
        ax.set_xscale("log")
        ax.set_xticks([row["chats"] for row in rows], [percent(row["share"]) for row in rows])
        ax.minorticks_off()
        ax.set_xlabel("fraction of the chats")
        ax.set_ylabel(title)
        ax.grid(alpha=0.3)
        ax.legend()
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
