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
from corpus.dataset_meta import data_fingerprint
from model.config import ModelConfig
from trainer.distributed import DistContext
from trainer.stage import Stage
from trainer.state_files import DamagedStateFile, SavedState, rank_file_stem, read_checked_json

RESTART_ADVICE = "start anew with --resume never"
MAX_RANKS = 100_000
SCALER_KEYS = {
    "scale",
    "growth_factor",
    "backoff_factor",
    "growth_interval",
    "_growth_tracker",
}  # of torch's GradScaler


@dataclass
class TrainState:
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

    def update(self, result: dict[str, float], seconds: float) -> None:
        self.step += 1
        self.tokens += int(result["tokens"])
        self.seconds = seconds
        self.loss = result["loss"] / max(result["tokens"], 1)


def resume_path(path: Path) -> Path:
    return path.with_suffix(".resume")


def step_folders(resume: Path) -> list[tuple[int, Path]]:
    """The step folders in a resume folder, whether complete or not, the newest first."""
    folders = (
        [entry for entry in resume.iterdir() if re.fullmatch(r"step_\d{1,18}", entry.name)] if resume.exists() else []
    )
    return sorted(((int(entry.name[5:]), entry) for entry in folders), reverse=True)


def complete_steps(resume: Path, before: float = math.inf) -> Iterator[tuple[Path, TrainState]]:
    """The complete step folders below step `before` with their progress, the newest first. Raises Damaged."""
    for step, folder in step_folders(resume):
        if step >= before or has_earlier_format(folder) or not (folder / "progress.json").is_file():
            continue
        train_state = parse_train_state(folder, step)
        if all((folder / f"{rank_file_stem(rank)}.json").is_file() for rank in range(train_state.ranks)):
            yield folder, train_state


def has_earlier_format(folder: Path) -> bool:
    return (folder / ".metadata").exists()


def parse_train_state(folder: Path, step: int) -> TrainState:
    """What progress.json of a step folder says. Raises Damaged."""
    path = folder / "progress.json"
    content = read_checked_json(path)
    for name, default in dataclasses.asdict(TrainState()).items():
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if type(content.get(name)) not in kinds:
            raise DamagedStateFile(path, f"is damaged (it has no {name})")
    train_state = TrainState(**{entry.name: content[entry.name] for entry in dataclasses.fields(TrainState)})
    counts = (train_state.tokens, train_state.seconds, train_state.rows_per_step - 1, train_state.ranks - 1)
    if train_state.step != step or min(counts) < 0 or train_state.ranks > MAX_RANKS:
        raise DamagedStateFile(path, "is damaged (its numbers are impossible)")
    scaler = train_state.scaler
    if scaler and (scaler.keys() != SCALER_KEYS or not all(type(value) in (int, float) for value in scaler.values())):
        raise DamagedStateFile(path, "is damaged (scaler)")
    if not isinstance(train_state.identity.get("config"), dict):
        raise DamagedStateFile(path, "is damaged (identity)")
    return train_state


def read_train_state(args: argparse.Namespace, path: Path) -> tuple[Path, TrainState] | None:
    """The newest complete step folder and its progress, or None when the run starts anew."""
    if args.resume == "never" or not resume_path(path).exists():
        return None
    if resume_path(path).is_file():
        raise UserError(f"cannot read {resume_path(path)} (a file, not a folder): {RESTART_ADVICE}")
    try:
        for found in complete_steps(resume_path(path)):
            return found
        is_earlier_format = any(has_earlier_format(folder) for _, folder in step_folders(resume_path(path)))
    except DamagedStateFile as error:
        raise UserError(f"{error}: {recovery_advice(error.folder)}") from None
    except OSError as error:
        raise UserError(f"cannot read {resume_path(path)} ({error.strerror}): {RESTART_ADVICE}") from None
    if is_earlier_format:
        raise UserError(
            f"{resume_path(path)} is in the format of an earlier version, which is not read because it may run code: "
            f"finish the run with that version, or {RESTART_ADVICE}"
        )
    return None


def recovery_advice(folder: Path) -> str:
    """What to do about a damaged step folder. The one before it is there until the next save."""
    with contextlib.suppress(DamagedStateFile, OSError):
        for _, train_state in complete_steps(folder.parent, before=int(folder.name[5:])):
            return f"remove {folder} to resume from step {train_state.step}, or {RESTART_ADVICE}"
    return RESTART_ADVICE


def resolve_global_batch_size(dist: DistContext, args: argparse.Namespace, path: Path) -> int:
    """Rows per optimizer step. A resumed run keeps its number, whatever the number of processes is now."""
    rows = args.batch_size * dist.world_size * args.accumulation_steps
    saved = read_train_state(args, path)
    if saved is None or saved[1].rows_per_step == rows:
        return rows
    rows = saved[1].rows_per_step
    if rows % (args.batch_size * dist.world_size):
        raise UserError(
            f"the interrupted run trained {rows} rows per step, which {dist.world_size} processes of --batch_size "
            f"{args.batch_size} cannot share evenly: choose another --batch_size, or start anew with --resume never"
        )
    args.accumulation_steps = rows // (args.batch_size * dist.world_size)
    dist.print0(
        f"the interrupted run trained {rows} rows per step: --accumulation_steps is now {args.accumulation_steps}"
    )
    return rows


def run_fingerprint(args: argparse.Namespace, stage: Stage) -> dict[str, Any]:
    """What must not change between the parts of a run."""
    parent = hashlib.sha256(json.dumps(stage.lineage, sort_keys=True).encode()).hexdigest()[:16]
    return {
        "stage": stage.name,
        "config": stage.model.config.to_dict(),
        "tokenizer": stage.tokenizer.rendering_fingerprint,
        "parent": parent if stage.lineage else "",
        "data rows": len(stage.data),
        "the data's fingerprint": data_fingerprint(stage.data.folder),
        "--optimizer": args.optimizer,
        "--seed": args.seed,
        "--mix": stage.mix or None,
        **{f"the adapter's {name}": value for name, value in stage.model.adapter.items() if name != "parent"},
    }


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
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


def load_train_state(
    dist: DistContext, args: argparse.Namespace, stage: Stage, path: Path, rows_per_step: int
) -> tuple[TrainState, SavedState | None]:
    """Fill stage.model from the newest step folder, if there is one; also returns the saved state, for `Engine`.

    Raises UserError when the folder is damaged or belongs to a run with another model, tokenizer, data, optimizer or
    seed.
    """
    identity = json.loads(json.dumps(run_fingerprint(args, stage)))  # as it will be read again
    found = read_train_state(args, path)
    step = found[1].step if found else -1
    if dist.all_reduce_sum([float(step)])[0] != dist.world_size * step:
        raise UserError(f"the processes do not see the same {resume_path(path)}: all machines must share --out_dir")
    if found is None:
        return TrainState(rows_per_step=rows_per_step, identity=identity), None
    folder, train_state = found
    if changed := "; ".join(changed_settings(train_state.identity, identity)):
        raise UserError(f"{resume_path(path)} belongs to another run ({changed[:300]}): {RESTART_ADVICE}")
    saved = SavedState(folder, train_state.ranks, recovery_advice(folder))
    saved.load({f"model.{name}": p for name, p in stage.model.named_parameters() if p.requires_grad})
    dist.print0(f"going on after step {train_state.step} of an interrupted run (--resume never starts anew)")
    return train_state, saved
