"""Going on where a run stopped: a folder beside the model, there only while the stage is unfinished.

    out/{stage}_{size}.resume/step_000200/progress.json              how far the run is, and which run it is
                                          *.distcp, .metadata        weights and optimizer state, each under its name

The tensors are written by torch.distributed.checkpoint, in the background while training goes on; every process writes
what it holds. `.metadata` comes last: a folder that has it is whole, and only then the older one goes. A tensor is its
name and its shape, however it was cut: a run may go on under another --parallel and with another number of processes,
as long as a step keeps its rows. The step number alone decides data, learning rate and dropout: nothing else needs
saving. Where an adapter is trained, the weights are the adapter's alone.
Read next: loop.py, parallel.py (what a state is), batches.py.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from common.errors import UserError
from model.checkpoint import Checkpoint, atomic_save
from model.config import ModelConfig
from trainer.runtime import Run

if TYPE_CHECKING:
    from trainer.loop import Stage
    from trainer.parallel import Engine, State

# One process alone is no mistake.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass
class Progress:
    """How far a run is. `rows_per_step` and `identity` must stay what they are for the steps to stay what they are."""

    step: int = 0
    tokens: int = 0  # trained tokens
    seconds: float = 0.0
    loss: float = 0.0  # of the last step, per token
    first_loss: float = 0.0  # of the first step that was not skipped; ln(vocabulary) where nothing was trained before
    validation: dict[str, Any] = field(default_factory=dict)
    rows_per_step: int = 0
    identity: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)  # of fp16 gradients

    def advance(self, result: dict[str, float], seconds: float) -> None:
        self.step += 1
        self.tokens += int(result["tokens"])
        self.seconds = seconds
        self.loss = result["loss"] / max(result["tokens"], 1)


def resume_path(path: Path) -> Path:
    return path.with_suffix(".resume")


def last_whole(path: Path) -> Path | None:
    """The newest complete step folder of the model at `path`."""
    whole = [file.parent for file in resume_path(path).glob("step_*/.metadata")]
    return max(whole, default=None, key=lambda folder: folder.name)


def read_progress(args: argparse.Namespace, path: Path) -> tuple[Path, Progress] | None:
    """The newest complete step folder and its progress, or None when the run starts anew."""
    if args.resume == "never" or not resume_path(path).exists():
        return None
    if resume_path(path).is_file():
        raise UserError(f"cannot read {resume_path(path)} (a file, not a folder): start anew with --resume never")
    folder = last_whole(path)
    if folder is None:  # killed before the first save was complete
        return None
    try:
        return folder, Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {folder} ({str(error)[:80]}): start anew with --resume never") from None


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
    run: Run, args: argparse.Namespace, stage: "Stage", path: Path, rows_per_step: int
) -> tuple[Progress, Path | None]:
    """Fill stage.model from the step folder if there is one; also returns that folder, for `Engine.load`.

    Raises UserError when the folder belongs to a run with another model, tokenizer, data, optimizer or seed.
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
        raise UserError(f"{resume_path(path)} belongs to another run ({shown[:300]}): use --resume never to start anew")
    weights = {f"model.{name}": p.detach() for name, p in stage.model.named_parameters() if p.requires_grad}
    load_tensors(run, folder, weights)
    run.say(f"going on after step {progress.step} of an interrupted run (--resume never starts anew)")
    return progress, folder


def load_tensors(run: Run, folder: Path, state: "State") -> None:
    """Fill the tensors in place, whole ones and pieces alike. Raises UserError when the folder does not hold them."""
    from torch.distributed import checkpoint

    try:
        checkpoint.load(state, storage_reader=checkpoint.FileSystemReader(folder), no_dist=True)
    except (checkpoint.CheckpointException, Exception) as error:
        raise UserError(f"cannot read {folder} ({last_line(error)}): start anew with --resume never") from None


def saved_names(folder: Path) -> set[str]:
    """The names of the tensors in a step folder."""
    from torch.distributed.checkpoint import FileSystemReader

    return set(FileSystemReader(folder).read_metadata().state_dict_metadata)


def last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


class Saver:
    """Writes the model (by the first process) and the step folder (by all) while training goes on."""

    def __init__(self, run: Run, path: Path, going_on: bool) -> None:
        self.run, self.path, self.going_on = run, path, going_on
        self.threads = ThreadPoolExecutor(1)
        self.pending: list[Future[Any]] = []
        self.saved_step = -1

    def begin(self, progress: Progress, engine: "Engine", content: Checkpoint | None) -> None:
        """Copy what is to be written, and return. `content`: the .pth, on the first process."""
        from torch.distributed import checkpoint

        self.finish()
        progress.scaler = engine.scaler.state_dict()
        folder, again = resume_path(self.path) / f"step_{progress.step:09d}", progress.step == self.saved_step
        if self.run.is_main:
            self.write_progress(folder, progress, again)
        if content is not None:
            self.pending.append(self.threads.submit(atomic_save, content, self.path))
        if again:
            return
        self.run.wait()
        future = checkpoint.async_save(
            engine.state(),
            storage_writer=checkpoint.FileSystemWriter(folder),
            process_group=self.run.save_group,
            no_dist=self.run.world == 1,
        )
        self.pending.append(future)  # type: ignore[arg-type]
        self.saved_step = progress.step

    def write_progress(self, folder: Path, progress: Progress, again: bool) -> None:
        try:
            if not self.going_on:  # what a run before this one left
                remove(resume_path(self.path))
                self.going_on = True
            if not again:  # what a kill left half written
                remove(folder)
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / "progress.json.tmp"
            temporary.write_text(json.dumps(dataclasses.asdict(progress)), encoding="utf-8")
            temporary.replace(folder / "progress.json")
        except OSError as error:
            raise cannot_write(folder, error) from error

    def finish(self) -> None:
        """Wait until what was begun is on the disk, then drop the older steps. Raises UserError when it failed."""
        from torch.distributed.checkpoint import CheckpointException

        if not self.pending:
            return
        try:
            while self.pending:
                self.pending.pop().result()
        except (CheckpointException, OSError, RuntimeError) as error:
            raise cannot_write(resume_path(self.path), error) from error
        if self.run.is_main:
            for folder in resume_path(self.path).glob("step_*"):
                if folder.name != f"step_{self.saved_step:09d}":
                    shutil.rmtree(folder, ignore_errors=True)

    def close(self, complete: bool) -> None:
        """Finish; of a complete stage nothing is left to go on with."""
        self.finish()
        if complete and self.run.is_main:
            shutil.rmtree(resume_path(self.path), ignore_errors=True)

    def abandon(self) -> None:
        """After an error: let what was begun come to its end, whatever that is."""
        for future in self.pending:
            with contextlib.suppress(BaseException):
                future.result(timeout=60)
        self.threads.shutdown(wait=False)


def remove(path: Path) -> None:
    """Remove a folder or a file, if it is there."""
    if path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def cannot_write(place: Path, error: BaseException) -> UserError:
    return UserError(f"cannot write {place}: {last_line(error)}: free some space or choose another --out_dir")


def detached(content: Checkpoint) -> Checkpoint:
    """The same .pth with tensors of its own, for a thread to write while the weights move on."""

    def own(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in state.items()}

    return {**content, "model": own(content["model"])}
