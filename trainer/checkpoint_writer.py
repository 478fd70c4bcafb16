"""CheckpointWriter: saves checkpoints in background threads while training continues.

    save(train_state, engine, content)    copy the tensors; threads write the copies: the .pth on rank 0, the step
                                          folder on all ranks
    wait()                                wait until every process has written its files; remove older step folders
    close(complete)                       wait; if the stage is complete, remove the resume folder

A kill at any time leaves the newest complete step folder intact. Incomplete folders are ignored (train_state.py) and
removed by the next run.
Read next: train_state.py (step folders), state_files.py, loop.py.
"""

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from common.checksums import with_checksum
from common.errors import UserError
from common.files import remove, remove_leftovers, write_error, write_json
from common.locks import lock_output
from model.checkpoint import atomic_save
from model.checkpoint_schema import Checkpoint
from trainer.distributed import DistContext
from trainer.engine import Engine
from trainer.stage import Stage
from trainer.state_files import (
    DISK_SPACE_ADVICE,
    STATE_FORMAT,
    CopiedPiece,
    copy_to_cpu,
    select_written_tensors,
    write_state,
)
from trainer.train_state import TrainState, complete_steps, resume_path, step_folders

Train = Callable[[DistContext, argparse.Namespace, Stage], Path]


def with_run_lock(train: Train) -> Train:
    """Decorator: `train` holds a lock on its checkpoint path. Raises UserError in all processes if it is taken.

    Rank 0 takes the lock and removes temporary files of a killed run. A kill releases the lock.
    """

    @functools.wraps(train)
    def train_locked(dist: DistContext, args: argparse.Namespace, stage: Stage) -> Path:
        path = stage.checkpoint_path(args.out_dir)
        with contextlib.ExitStack() as stack:
            with shared_errors(dist, f"lock {path}"):
                if dist.is_rank0:
                    stack.enter_context(lock_output(path, "wait for it, or choose another --out_dir"))
                    remove_leftovers(path.with_suffix(".*"))
                    remove_leftovers(resume_path(path) / "*")
            return train(dist, args, stage)

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
    """Writes the .pth and the step folders of a run. `is_resuming`: whether the run resumes from a step folder."""

    def __init__(self, dist: DistContext, path: Path, is_resuming: bool) -> None:
        self.dist, self.path, self.is_resuming = dist, path, is_resuming
        self.threads = ThreadPoolExecutor(2)
        self.pending: list[Future[None]] = []
        self.copies: dict[str, CopiedPiece] = {}
        self.is_saving = False
        self.saved_step = next(complete_steps(resume_path(path)))[1].step if is_resuming else -1

    def save(self, train_state: TrainState, engine: Engine, content: Checkpoint | None) -> None:
        """Copy the state, start writing it and return. `content`: the content of the .pth, on rank 0, else None."""
        self.wait()
        folder, is_saved = resume_path(self.path) / f"step_{train_state.step:09d}", train_state.step == self.saved_step
        train_state.scaler = engine.scaler.state_dict()
        train_state.ranks = train_state.ranks if is_saved else self.dist.world_size
        with shared_errors(self.dist, f"write {folder}"):
            if self.dist.is_rank0:
                self.prepare_step_folder(folder, train_state, is_saved)
        self.is_saving = True
        if content is not None:
            self.pending.append(self.threads.submit(atomic_save, content, self.path))
        if not is_saved:
            written = select_written_tensors(
                engine.state_dict(), self.dist.rank, self.dist.world_size, engine.replicated
            )
            self.copies = copy_to_cpu(written, self.copies)
            self.pending.append(self.threads.submit(write_state, folder, self.dist.rank, self.copies))
            self.saved_step = train_state.step

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

    def close(self, complete: bool) -> None:
        """Wait for the last save. `complete`: the stage is finished, remove the resume folder."""
        self.wait()
        if complete and self.dist.is_rank0:
            with contextlib.suppress(OSError):
                remove(resume_path(self.path))

    def abort(self) -> None:
        """After an error: wait up to 60 s for each write in progress and ignore its errors."""
        for future in self.pending:
            with contextlib.suppress(BaseException):
                future.result(timeout=60)
        self.threads.shutdown(wait=False)


def clone_checkpoint(content: Checkpoint) -> Checkpoint:
    """Return `content` with copies of its tensors: a thread writes them while the optimizer changes the weights."""

    def clone_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in state.items()}

    return {**content, "model": clone_tensors(content["model"])}
