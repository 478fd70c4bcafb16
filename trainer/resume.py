"""Going on where a run stopped: a second file beside the model, there only while the stage is unfinished.

    out/{stage}_{size}.resume = {progress, model, optimizers, scaler}

The step number alone decides data, learning rate and dropout, so nothing else needs saving; the number of processes may
change as long as a step keeps its rows. Where an adapter is trained, `model` is the adapter alone.
Read next: loop.py, batches.py.
"""

import argparse
import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from corpus.errors import UserError
from model.checkpoint import atomic_save, load_state, plain_state
from model.transformer import Transformer
from trainer.runtime import Run

if TYPE_CHECKING:
    from trainer.loop import Stage


@dataclass
class Progress:
    """How far a run is. `rows_per_step` and `identity` must stay what they are for the steps to stay what they are."""

    step: int = 0
    tokens: int = 0  # trained tokens
    seconds: float = 0.0
    loss: float = 0.0  # of the last step, per token
    validation: dict[str, Any] = field(default_factory=dict)
    rows_per_step: int = 0
    identity: dict[str, Any] = field(default_factory=dict)

    def advance(self, result: dict[str, float], seconds: float) -> None:
        self.step += 1
        self.tokens += int(result["tokens"])
        self.seconds = seconds
        self.loss = result["loss"] / max(result["tokens"], 1)


def resume_path(path: Path) -> Path:
    return path.with_suffix(".resume")


def read_resume(args: argparse.Namespace, path: Path) -> dict[str, Any] | None:
    """The resume file's content, or None when the run starts anew."""
    if args.resume == "never" or not resume_path(path).is_file():
        return None
    try:
        return torch.load(resume_path(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(
            f"cannot read {resume_path(path)} ({str(error)[:80]}): start anew with --resume never"
        ) from None


def global_batch(run: Run, args: argparse.Namespace, path: Path) -> int:
    """Rows per optimizer step. A resumed run keeps its number, whatever the number of processes is now."""
    rows = args.batch_size * run.world * args.accumulation_steps
    saved = read_resume(args, path)
    if saved is None or saved["progress"]["rows_per_step"] == rows:
        return rows
    rows = saved["progress"]["rows_per_step"]
    if rows % (args.batch_size * run.world):
        raise UserError(
            f"the interrupted run trained {rows} rows per step, which {run.world} processes of --batch_size "
            f"{args.batch_size} cannot share evenly: choose another --batch_size, or start anew with --resume never"
        )
    args.accumulation_steps = rows // (args.batch_size * run.world)
    run.say(f"the interrupted run trained {rows} rows per step: --accumulation_steps is now {args.accumulation_steps}")
    return rows


def run_identity(args: argparse.Namespace, stage: "Stage") -> dict[str, Any]:
    """What must not change between the parts of a run."""
    parent = hashlib.sha256(json.dumps(stage.lineage, sort_keys=True).encode()).hexdigest()[:16]
    return {
        "stage": stage.name,
        "config": stage.model.config.to_dict(),
        "tokenizer": stage.tokenizer.chat_fingerprint,
        "parent": parent if stage.lineage else "",
        "data rows": len(stage.data),
        "--optimizer": args.optimizer,
        "--seed": args.seed,
        "--mix": stage.mix or None,
        **{f"the adapter's {name}": value for name, value in stage.model.adapter.items() if name != "parent"},
    }


def load_progress(
    run: Run,
    args: argparse.Namespace,
    stage: "Stage",
    path: Path,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    rows_per_step: int,
) -> Progress:
    """Fill model, optimizers and scaler from the resume file if there is one; a fresh Progress otherwise.

    Raises UserError when the file belongs to a run with another model, tokenizer, data, optimizer or seed.
    """
    identity = run_identity(args, stage)
    saved = read_resume(args, path)
    if saved is None:
        return Progress(rows_per_step=rows_per_step, identity=identity)
    theirs = saved["progress"]["identity"]
    different = [name for name in identity if identity[name] != theirs.get(name)]
    if different:
        shown = "; ".join(f"{name} was {theirs.get(name)}, is {identity[name]}" for name in different)
        raise UserError(f"{resume_path(path)} belongs to another run ({shown[:300]}): use --resume never to start anew")
    load_state(stage.model, saved["model"], resume_path(path))
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    scaler.load_state_dict(saved["scaler"])
    progress = Progress(**saved["progress"])
    run.say(f"going on after step {progress.step} of an interrupted run (--resume never starts anew)")
    return progress


def save_progress(
    path: Path,
    model: Transformer,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    progress: Progress,
) -> None:
    content = {
        "progress": dataclasses.asdict(progress),
        "model": plain_state(model),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "scaler": scaler.state_dict(),
    }
    atomic_save(content, resume_path(path))
