"""TrainState and the resume folder, from which an interrupted run continues. It exists until the stage is complete.

    out/{stage}_{size}.resume/step_000000200/progress.json                   TrainState: counters, identity of the run
                                             rank_00000.safetensors, .json   weights and optimizer state by name, one
                                                                             pair of files per process

The files are written in the background from copies while training continues. A step folder is complete when it has
progress.json and the json of every process; only then older ones are removed. Saved tensors do not depend on how they
were sharded: a run may resume with another --parallel and another number of processes, if the rows per step stay the
same. Data, learning rate and dropout depend only on the step number, so nothing else is saved. With LoRA only the
adapter's weights are saved. Every file has checksums, and none is read with pickle.
Read next: checkpoint_writer.py (writes the folder), state_files.py (the format), loop.py, engine.py (the state).
"""

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
from model.checkpoint import read_checkpoint
from model.config import ModelConfig
from trainer.config import TrainConfig
from trainer.distributed import DistContext
from trainer.stage import Stage
from trainer.state_files import DamagedStateFile, SavedState, rank_file_stem, read_checked_json

RESTART_ADVICE = "start anew with --resume never"
MAX_RANKS = 100_000
ROW_ORDER = "permutation"  # of rows of equal length; earlier versions had another order
# Keys of the state_dict of torch.amp.GradScaler.
SCALER_KEYS = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


# Settings that do not change the result of a run.
FREE_SETTINGS = frozenset(
    ("data_path", "init_from", "out_root", "run_name", "resume", "save_interval", "max_minutes", "device", "compile",
     "checkpoint_activations", "parallel", "dist_timeout", "num_workers", "local_rank", "log_interval", "eval_interval",
     "eval_tokens", "use_wandb", "wandb_project", "wandb_run_name", "tokenizer", "peft_dir")
)  # fmt: skip


@dataclass
class TrainState:
    """The progress of a run. A resumed run must have the same `rows_per_step` and `identity`."""

    step: int = 0
    tokens: int = 0  # trained tokens (or pairs)
    seconds: float = 0.0
    loss: float = 0.0  # of the last step, per token (or pair)
    first_loss: float = 0.0  # of the first step that was not skipped; ln(vocabulary) when training from scratch
    validation: dict[str, Any] = field(default_factory=dict)
    objection: str = ""  # reason of the stage's early stop
    rows_per_step: int = 0
    ranks: int = 0  # number of processes that wrote the step folder
    identity: dict[str, Any] = field(default_factory=dict)  # run_fingerprint
    scaler: dict[str, Any] = field(default_factory=dict)  # state of the fp16 gradient scaler

    def update(self, metrics: dict[str, float], seconds: float) -> None:
        """Count a step with these sums (train_step in loop.py)."""
        self.step += 1
        self.tokens += int(metrics["num_targets"])
        self.seconds = seconds
        self.loss = metrics["loss"] / max(metrics["num_targets"], 1)


def resume_path(path: Path) -> Path:
    return path.with_suffix(".resume")


def step_folders(resume: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of all step folders in a resume folder, complete or not, the newest first."""
    folders = (
        [entry for entry in resume.iterdir() if re.fullmatch(r"step_\d{1,18}", entry.name)] if resume.exists() else []
    )
    return sorted(((int(entry.name[5:]), entry) for entry in folders), reverse=True)


def complete_steps(resume: Path, before: float = math.inf) -> Iterator[tuple[Path, TrainState]]:
    """Yield the complete step folders below step `before`, the newest first. Raises DamagedStateFile."""
    for step, folder in step_folders(resume):
        if step >= before or has_earlier_format(folder) or not (folder / "progress.json").is_file():
            continue
        train_state = parse_train_state(folder, step)
        if all((folder / f"{rank_file_stem(rank)}.json").is_file() for rank in range(train_state.ranks)):
            yield folder, train_state


def has_earlier_format(folder: Path) -> bool:
    return (folder / ".metadata").exists()


def parse_train_state(folder: Path, step: int) -> TrainState:
    """Read and check progress.json of a step folder. Raises DamagedStateFile."""
    path = folder / "progress.json"
    content = read_checked_json(path)
    for name, default in dataclasses.asdict(TrainState()).items():
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if type(content.get(name)) not in kinds:
            raise DamagedStateFile(path, f"is damaged (it has no valid {name})")
    train_state = TrainState(**{entry.name: content[entry.name] for entry in dataclasses.fields(TrainState)})
    counts = (train_state.tokens, train_state.seconds, train_state.rows_per_step - 1, train_state.ranks - 1)
    if train_state.step != step or min(counts) < 0 or train_state.ranks > MAX_RANKS:
        raise DamagedStateFile(path, "is damaged (its numbers are out of range)")
    scaler = train_state.scaler
    if scaler and (scaler.keys() != SCALER_KEYS or not all(type(value) in (int, float) for value in scaler.values())):
        raise DamagedStateFile(path, "is damaged (scaler)")
    if not isinstance(train_state.identity.get("config"), dict):
        raise DamagedStateFile(path, "is damaged (identity)")
    return train_state


def read_train_state(config: TrainConfig, path: Path) -> tuple[Path, TrainState] | None:
    """Return the newest complete step folder and its TrainState, or None if the run starts anew.

    Raises UserError if the resume folder is damaged, unreadable or of an earlier format.
    """
    if config.resume == "never" or not resume_path(path).exists():
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
            f"{resume_path(path)} has the pickle format of an earlier version, which is not read because it may run "
            f"code: finish the run with that version, or {RESTART_ADVICE}"
        )
    return None


def recovery_advice(folder: Path) -> str:
    """Return what to do about a damaged step folder: use an older complete one, if there is one, or start anew."""
    with contextlib.suppress(DamagedStateFile, OSError):
        for _, train_state in complete_steps(folder.parent, before=int(folder.name[5:])):
            return f"remove {folder} to resume from step {train_state.step}, or {RESTART_ADVICE}"
    return RESTART_ADVICE


def resolve_global_batch_size(config: TrainConfig, path: Path, dist: DistContext) -> int:
    """Return the rows per optimizer step: those of the interrupted run, else --global_batch_size.

    Raises UserError if the processes cannot share them evenly.
    """
    given = config.global_batch_size or config.batch_size * dist.world_size * config.accumulation_steps
    saved = read_train_state(config, path)
    rows = saved[1].rows_per_step if saved else given
    if rows % dist.world_size:
        raise UserError(
            f"{dist.world_size} processes cannot share {rows} rows per step evenly: choose another number of processes"
            + (f", or {RESTART_ADVICE}" if saved else " or another --global_batch_size")
        )
    return rows


def micro_batch_size(config: TrainConfig, rows_per_step: int, world_size: int) -> int:
    """Return the rows of a micro-batch: at most --batch_size, and as few micro-batches per step as possible."""
    rows = rows_per_step // world_size
    return -(-rows // -(-rows // config.batch_size))


def run_fingerprint(config: TrainConfig, stage: Stage) -> dict[str, Any]:
    """Return the settings that a resumed run must share with the interrupted one."""
    parent = hashlib.sha256(json.dumps(stage.lineage, sort_keys=True).encode()).hexdigest()[:16]
    return {
        "stage": stage.name,
        "config": stage.model.config.to_dict(),
        "tokenizer": stage.tokenizer.rendering_fingerprint,
        "parent": parent if stage.lineage else "",
        "data rows": len(stage.data),
        "the data's fingerprint": stage.data.fingerprint(),
        "--optimizer": config.optimizer,
        "--seed": config.seed,
        **({"the order of the rows": ROW_ORDER} if stage.data.lengths() is None else {}),
        "--mix": stage.data.mixture or None,
        **({"--minutes": stage.plan["minutes"], "plan": dict(stage.plan)} if stage.plan else {}),
        **{f"the adapter's {name}": value for name, value in stage.model.adapter.items() if name != "parent"},
    }


def run_digest(config: TrainConfig, stage: Stage, identity: dict[str, Any]) -> str:
    """16 hex digits of all settings that change the result of a run: the same digest gives the same weights.

    identity: that of run_fingerprint. A parent that was trained again in another time is the same parent.
    """
    parents = [{name: value for name, value in entry.items() if name != "seconds"} for entry in stage.lineage]
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_SETTINGS}
    content = json.dumps([settings, {**identity, "parent": parents}], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def check_not_finished(config: TrainConfig, stage: Stage, path: Path) -> None:
    """Raise UserError if the run would replace the finished model of another run and --resume never is not given."""
    if config.resume == "never" or not path.exists() or resume_path(path).exists():
        return
    facts = ""
    with contextlib.suppress(UserError, LookupError, TypeError, ValueError):
        last = read_checkpoint(path, weights=False)["lineage"][-1]
        if last.get("run") == run_digest(config, stage, run_fingerprint(config, stage)):
            return
        facts = f" ({last['steps']:,} steps on {last['data']})"
    raise UserError(
        f"{path} is a finished run{facts}: --run_name NAME trains another one beside it, --resume never replaces it"
    )


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a text for each setting and each field of the model config that differs.

    Config fields that an earlier version did not save have their defaults.
    """
    try:
        config = ModelConfig(**before["config"]).to_dict()
    except (KeyError, TypeError, ValueError):  # saved by a later version
        config = before.get("config") or {}
    before, now = {**before, **json.loads(json.dumps(config))}, {**now, **now["config"]}
    names = [name for name in now if name != "config" and now[name] != before.get(name)]
    return [f"{name} was {before.get(name)}, is {now[name]}" for name in names]


def load_train_state(
    config: TrainConfig, stage: Stage, path: Path, dist: DistContext
) -> tuple[TrainState, SavedState | None]:
    """Load the weights of stage.model from the newest step folder, if there is one.

    Returns the TrainState and the SavedState from which Engine.load_optimizer reads the optimizer state, or a new
    TrainState and None. Raises UserError if the folder is damaged or belongs to a run with another model, tokenizer,
    data, optimizer or seed.
    """
    identity = json.loads(json.dumps(run_fingerprint(config, stage)))  # as read back from progress.json
    rows_per_step = resolve_global_batch_size(config, path, dist)
    found = read_train_state(config, path)
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
    dist.print0(
        f"resuming after step {train_state.step} of an interrupted run, {rows_per_step} rows per step "
        "(to start anew: --resume never)"
    )
    return train_state, saved
