"""Going on where a run stopped: a folder beside the model, there only while the stage is unfinished.

    out/{stage}_{size}.resume/step_000000200/progress.json                   how far the run is, and which run it is
                                             rank_00000.safetensors, .json   weights and optimizer state by name, of
                                                                             each process what it holds

The files are written in the background while training continues, from copies. A folder with progress.json and the json
of every process is complete, and only then the older one is removed. A tensor is its name and its shape, however it was
cut: a run may continue under another --parallel and with another number of processes, as long as a step keeps its rows.
The step number alone decides data, learning rate and dropout: nothing else needs saving. Where an adapter is trained,
the weights are the adapter's alone. Every file has checksums, and none is read with pickle.
Read next: checkpoint_writer.py (who writes), state_files.py (the format), loop.py, engine.py (what a state is),
sampler.py.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError
from corpus.dataset_meta import fingerprint
from model.config import ModelConfig
from trainer.distributed import Run
from trainer.stage import Stage
from trainer.state_files import Damaged, SavedState, file_stem, read_json

ANEW = "start anew with --resume never"
MOST_RANKS = 100_000
SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}  # of torch's GradScaler


@dataclass
class Progress:
    """How far a run is. `rows_per_step` and `identity` must stay what they are for the steps to stay what they are."""

    step: int = 0
    tokens: int = 0  # trained tokens
    seconds: float = 0.0
    loss: float = 0.0  # of the last step, per token
    first_loss: float = 0.0  # of the first step that was not skipped; ln(vocabulary) where nothing was trained before
    validation: dict[str, Any] = field(default_factory=dict)
    objection: str = ""  # why the stage's guard ended the run
    rows_per_step: int = 0
    ranks: int = 0  # processes that wrote the step folder
    identity: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)  # of fp16 gradients

    def advance(self, result: dict[str, float], seconds: float) -> None:
        self.step += 1
        self.tokens += int(result["tokens"])
        self.seconds = seconds
        self.loss = result["loss"] / max(result["tokens"], 1)


def resume_path(path: Path) -> Path:
    return path.with_suffix(".resume")


def step_folders(resume: Path) -> list[tuple[int, Path]]:
    """The step folders in a resume folder, whether complete or not, the newest first."""
    found = (
        [entry for entry in resume.iterdir() if re.fullmatch(r"step_\d{1,18}", entry.name)] if resume.exists() else []
    )
    return sorted(((int(entry.name[5:]), entry) for entry in found), reverse=True)


def complete_steps(resume: Path, before: float = math.inf) -> Iterator[tuple[Path, Progress]]:
    """The complete step folders below step `before` with their progress, the newest first. Raises Damaged."""
    for step, folder in step_folders(resume):
        if step >= before or is_of_earlier_version(folder) or not (folder / "progress.json").is_file():
            continue
        progress = progress_of(folder, step)
        if all((folder / f"{file_stem(rank)}.json").is_file() for rank in range(progress.ranks)):
            yield folder, progress


def is_of_earlier_version(folder: Path) -> bool:
    return (folder / ".metadata").exists()


def progress_of(folder: Path, step: int) -> Progress:
    """What progress.json of a step folder says. Raises Damaged."""
    path = folder / "progress.json"
    content = read_json(path)
    for name, default in dataclasses.asdict(Progress()).items():
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if type(content.get(name)) not in kinds:
            raise Damaged(path, f"is damaged (it has no {name})")
    progress = Progress(**{entry.name: content[entry.name] for entry in dataclasses.fields(Progress)})
    counts = (progress.tokens, progress.seconds, progress.rows_per_step - 1, progress.ranks - 1)
    if progress.step != step or min(counts) < 0 or progress.ranks > MOST_RANKS:
        raise Damaged(path, "is damaged (its numbers are impossible)")
    scaler = progress.scaler
    if scaler and (scaler.keys() != SCALER or not all(type(value) in (int, float) for value in scaler.values())):
        raise Damaged(path, "is damaged (scaler)")
    if not isinstance(progress.identity.get("config"), dict):
        raise Damaged(path, "is damaged (identity)")
    return progress


def read_progress(args: argparse.Namespace, path: Path) -> tuple[Path, Progress] | None:
    """The newest complete step folder and its progress, or None when the run starts anew."""
    if args.resume == "never" or not resume_path(path).exists():
        return None
    if resume_path(path).is_file():
        raise UserError(f"cannot read {resume_path(path)} (a file, not a folder): {ANEW}")
    try:
        for found in complete_steps(resume_path(path)):
            return found
        earlier = any(is_of_earlier_version(folder) for _, folder in step_folders(resume_path(path)))
    except Damaged as error:
        raise UserError(f"{error}: {way_back(error.folder)}") from None
    except OSError as error:
        raise UserError(f"cannot read {resume_path(path)} ({error.strerror}): {ANEW}") from None
    if earlier:
        raise UserError(
            f"{resume_path(path)} is in the format of an earlier version, which is not read because it may run code: "
            f"finish the run with that version, or {ANEW}"
        )
    return None


def way_back(folder: Path) -> str:
    """What to do about a damaged step folder. The one before it is there until the next save."""
    with contextlib.suppress(Damaged, OSError):
        for _, progress in complete_steps(folder.parent, before=int(folder.name[5:])):
            return f"remove {folder} to resume from step {progress.step}, or {ANEW}"
    return ANEW


def global_batch(run: Run, args: argparse.Namespace, path: Path) -> int:
    """Rows per optimizer step. A resumed run keeps its number, whatever the number of processes is now."""
    rows = args.batch_size * run.world * args.accumulation_steps
    saved = read_progress(args, path)
    if saved is None or saved[1].rows_per_step == rows:
        return rows
    rows = saved[1].rows_per_step
    if rows % (args.batch_size * run.world):
        raise UserError(
            f"the interrupted run trained {rows} rows per step, which {run.world} processes of --batch_size "
            f"{args.batch_size} cannot share evenly: choose another --batch_size, or start anew with --resume never"
        )
    args.accumulation_steps = rows // (args.batch_size * run.world)
    run.say(f"the interrupted run trained {rows} rows per step: --accumulation_steps is now {args.accumulation_steps}")
    return rows


def run_identity(args: argparse.Namespace, stage: Stage) -> dict[str, Any]:
    """What must not change between the parts of a run."""
    parent = hashlib.sha256(json.dumps(stage.lineage, sort_keys=True).encode()).hexdigest()[:16]
    return {
        "stage": stage.name,
        "config": stage.model.config.to_dict(),
        "tokenizer": stage.tokenizer.chat_fingerprint,
        "parent": parent if stage.lineage else "",
        "data rows": len(stage.data),
        "the data's fingerprint": fingerprint(stage.data.folder),
        "--optimizer": args.optimizer,
        "--seed": args.seed,
        "--mix": stage.mix or None,
        **{f"the adapter's {name}": value for name, value in stage.model.adapter.items() if name != "parent"},
    }


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two identities, a text for each fact and for each field of the model's config.

    An earlier version saved a config without the fields that came later: those have their defaults.
    """
    try:
        config = ModelConfig(**before["config"]).to_dict()
    except (KeyError, TypeError, ValueError):  # of a later version
        config = before.get("config") or {}
    before, now = {**before, **json.loads(json.dumps(config))}, {**now, **now["config"]}
    names = [name for name in now if name != "config" and now[name] != before.get(name)]
    return [f"{name} was {before.get(name)}, is {now[name]}" for name in names]


def load_progress(
    run: Run, args: argparse.Namespace, stage: Stage, path: Path, rows_per_step: int
) -> tuple[Progress, SavedState | None]:
    """Fill stage.model from the newest step folder, if there is one; also returns what is saved, for `Engine.load`.

    Raises UserError when the folder is damaged or belongs to a run with another model, tokenizer, data, optimizer or
    seed.
    """
    identity = json.loads(json.dumps(run_identity(args, stage)))  # as it will be read again
    found = read_progress(args, path)
    step = found[1].step if found else -1
    if run.sum([float(step)])[0] != run.world * step:
        raise UserError(f"the processes do not see the same {resume_path(path)}: all machines must share --out_dir")
    if found is None:
        return Progress(rows_per_step=rows_per_step, identity=identity), None
    folder, progress = found
    if shown := "; ".join(changes(progress.identity, identity)):
        raise UserError(f"{resume_path(path)} belongs to another run ({shown[:300]}): {ANEW}")
    saved = SavedState(folder, progress.ranks, way_back(folder))
    saved.load({f"model.{name}": p for name, p in stage.model.named_parameters() if p.requires_grad})
    run.say(f"going on after step {progress.step} of an interrupted run (--resume never starts anew)")
    return progress, saved
