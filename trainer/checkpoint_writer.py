"""CheckpointWriter: saves checkpoints in background threads while training continues.

    save(train_state)    copy the tensors; threads write the copies: the .pth on rank 0, the step folder on all ranks
    wait()               wait until every process has written its files; remove older step folders
    finish(complete)     wait; if the stage is complete, remove the resume folder

A kill at any time leaves the newest complete step folder intact. Incomplete folders are ignored (train_state.py) and
removed by the next run.
Read next: train_state.py (step folders), state_files.py, loop.py.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from common.checksums import with_checksum
from common.errors import UserError
from common.files import remove, remove_leftovers, write_error, write_json
from common.locks import lock_output
from corpus.provenance import data_provenance, format_provenance
from model.checkpoint import atomic_save, build_checkpoint
from model.checkpoint_schema import Checkpoint
from trainer.config import TrainConfig
from trainer.distributed import DistContext
from trainer.engine import Engine
from trainer.loss_guard import NonFiniteGuard
from trainer.stage import Stage
from trainer.state_files import (
    DISK_SPACE_ADVICE,
    STATE_FORMAT,
    CopiedPiece,
    copy_to_cpu,
    host_copy,
    select_written_tensors,
    write_state,
)
from trainer.train_state import (
    TrainState,
    check_not_finished,
    complete_steps,
    resume_path,
    run_digest,
    step_folders,
)

Train = Callable[..., Path]  # (config, stage, dist, and more)


def with_run_lock(train: Train) -> Train:
    """Decorator: `train` holds a lock on its checkpoint path. Raises UserError in all processes if it is taken, or if
    the path holds the finished model of another run.

    Rank 0 takes the lock and removes temporary files of a killed run. A kill releases the lock.
    """

    @functools.wraps(train)
    def train_locked(config: TrainConfig, stage: Stage, dist: DistContext, *more: Any) -> Path:
        path = stage.checkpoint_path(config.out_dir)
        with contextlib.ExitStack() as stack:
            with shared_errors(dist, f"lock {path}"):
                if dist.is_rank0:
                    stack.enter_context(lock_output(path, "wait for it, or choose another --out_dir"))
                    check_not_finished(config, stage, path)
                    remove_leftovers(path.with_suffix(".*"))
                    remove_leftovers(resume_path(path) / "*")
            return train(config, stage, dist, *more)

    return train_locked


@contextlib.contextmanager
def shared_errors(dist: DistContext, what: str) -> Iterator[None]:
    """Inside, an error of one process raises UserError in all of them. All processes must enter it."""
    problem: Exception | None = None
    try:
        yield
    except (UserError, OSError) as error:
        problem = error
    dist.barrier()  # rank 0 may take longer than the time limit of `all_reduce_sum`
    if dist.all_reduce_sum([float(problem is not None)])[0]:
        raise problem or UserError(f"another process could not {what}: see its error message")


class CheckpointWriter:
    """Writes the .pth and the step folders of a run. is_resuming: whether the run resumes from a step folder."""

    def __init__(
        self, config: TrainConfig, stage: Stage, engine: Engine, guard: NonFiniteGuard, is_resuming: bool
    ) -> None:
        self.config, self.stage, self.engine, self.guard = config, stage, engine, guard
        self.dist, self.path = engine.dist, stage.checkpoint_path(config.out_dir)
        self.is_resuming = is_resuming
        self.is_postponed = False  # a save was due after a step that left no valid state
        self.threads = ThreadPoolExecutor(2)
        self.pending: list[Future[None]] = []
        self.copies: dict[str, CopiedPiece] = {}
        self.is_saving = False
        self.saved_step = next(complete_steps(resume_path(self.path)))[1].step if is_resuming else -1

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        """Wait up to 60 s for each write that is still in progress after an error, and ignore its errors."""
        for future in self.pending:
            with contextlib.suppress(BaseException):
                future.result(timeout=60)
        self.threads.shutdown(wait=False)

    def is_due(self, step: int) -> bool:
        return self.is_postponed or step % self.config.save_interval == 0

    def save(self, train_state: TrainState, final: bool = False) -> None:
        """Start saving the state. If it is not valid, postpone the save, or raise UserError if it is the final one."""
        self.wait()  # until the previous save is on disk
        self.dist.barrier()  # wait for rank 0, which writes the most
        self.engine.gather_weights()
        problem = self.guard.save_problem(self.engine, final)
        if problem and final:
            raise self.guard.make_error(problem)
        if problem and not self.is_postponed:
            text = f"step {train_state.step} is not saved: {problem}; the next valid step will be"
            self.guard.logger.print(text)
        self.is_postponed = bool(problem)
        if not problem:
            self.start_writing(train_state)
            self.guard.mark_saved()

    def start_writing(self, train_state: TrainState) -> None:
        """Copy the state and start the threads that write it."""
        folder, is_saved = resume_path(self.path) / f"step_{train_state.step:09d}", train_state.step == self.saved_step
        train_state.scaler = self.engine.scaler.state_dict()
        train_state.ranks = train_state.ranks if is_saved else self.dist.world_size
        with shared_errors(self.dist, f"write {folder}"):
            if self.dist.is_rank0:
                self.prepare_step_folder(folder, train_state, is_saved)
        self.is_saving = True
        if self.dist.is_rank0:
            lineage = [*self.stage.lineage, lineage_entry(self.config, self.stage, train_state)]
            content = build_checkpoint(self.stage.model, self.stage.name, self.stage.tokenizer, lineage)
            self.submit(atomic_save, clone_checkpoint(content), self.path)
        if not is_saved:
            written = select_written_tensors(
                self.engine.state_dict(), self.dist.rank, self.dist.world_size, self.engine.replicated
            )
            self.copies = copy_to_cpu(written, self.copies)
            self.submit(write_state, folder, self.dist.rank, self.copies)
            self.saved_step = train_state.step

    def submit(self, write: Callable[..., None], *given: Any) -> None:
        """Write in a thread, after the copies that a GPU has queued up to now. The loop does not wait for them."""
        copied = torch.cuda.Event() if self.dist.device.type == "cuda" else None
        if copied:
            copied.record()

        def run() -> None:
            if copied:
                copied.synchronize()
            write(*given)

        self.pending.append(self.threads.submit(run))

    def prepare_step_folder(self, folder: Path, train_state: TrainState, is_saved: bool) -> None:
        """Create the step folder with progress.json; if the step is saved already, only rewrite progress.json."""
        try:
            if not self.is_resuming:  # the folder of an earlier run
                remove(resume_path(self.path))
                self.is_resuming = True
            if not is_saved:  # an incomplete folder of a killed run
                remove(folder)
        except OSError as error:
            raise write_error(folder, error, DISK_SPACE_ADVICE) from error
        content = {"format": STATE_FORMAT, **dataclasses.asdict(train_state)}
        write_json(folder / "progress.json", with_checksum(content), indent=None)

    def wait(self) -> None:
        """Wait until all processes have written the last save, then remove older step folders.

        Raises UserError in all processes if one of them failed.
        """
        if not self.is_saving:
            return
        self.is_saving = False
        with shared_errors(self.dist, f"write {resume_path(self.path)}"):
            while self.pending:
                self.pending.pop().result()
        if self.dist.is_rank0:
            for step, folder in step_folders(resume_path(self.path)):
                if step != self.saved_step:
                    with contextlib.suppress(OSError):
                        remove(folder)

    def finish(self, complete: bool) -> None:
        """Wait for the last save. `complete`: the stage is finished, remove the resume folder."""
        self.wait()
        if complete and self.dist.is_rank0:
            with contextlib.suppress(OSError):
                remove(resume_path(self.path))


def clone_checkpoint(content: Checkpoint) -> Checkpoint:
    """Return `content` with its tensors on the CPU: a thread writes them while the optimizer changes the weights."""
    return {**content, "model": {name: host_copy(tensor) for name, tensor in content["model"].items()}}


def lineage_entry(config: TrainConfig, stage: Stage, train_state: TrainState) -> dict[str, Any]:
    """Return the entry of this stage in the lineage of its checkpoint."""
    unit_key = f"{stage.loss_unit}s"
    provenance = format_provenance(data_provenance(config.data_path))
    return {
        "stage": stage.name,
        "data": str(config.data_path),
        **stage.data.mixture,
        **({"data_history": provenance} if provenance else {}),
        "steps": train_state.step,
        unit_key: train_state.tokens,
        "seconds": train_state.seconds,
        "loss": train_state.loss,
        "validation": {name: value for name, value in train_state.validation.items() if name not in ("step", unit_key)},
        "learning_rate": config.learning_rate,
        "seed": config.seed,
        "run": run_digest(config, stage, train_state.identity),
        **({"stopped": train_state.objection} if train_state.objection else {}),
    }
