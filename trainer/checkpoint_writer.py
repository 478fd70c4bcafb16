"""Saving in the background: the model by the first process, the step folder by all, while training continues.

    save(train_state, engine, content)    copy, and have a thread write the copies
    wait()                            wait until every process has written its part; remove the older step folders
    close(complete)                     wait; of a complete stage the whole resume folder is removed

A kill at any moment leaves a complete step folder, or none when none was complete: what is incomplete or being removed
is not taken for one (train_state.py), and the next run removes it.
Read next: train_state.py (what a step folder is), state_files.py, loop.py.
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
    """Let `train` run only while no other run trains the same model. Raises UserError in all processes otherwise.

    The first process takes the lock, which the system releases at a kill, and removes what a killed run left.
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
    """Inside, an error of one process ends all of them. All must come here."""
    problem: Exception | None = None
    try:
        yield
    except (UserError, OSError) as error:
        problem = error
    dist.barrier()  # for the first process, which may have more to do; `all_reduce_sum` has a time limit
    if dist.all_reduce_sum([float(problem is not None)])[0]:
        raise problem or UserError(f"another process could not {what}: its message says why")


class CheckpointWriter:
    """Writes the model and the step folders of a run. `is_resuming`: whether the run resumes a saved step."""

    def __init__(self, dist: DistContext, path: Path, is_resuming: bool) -> None:
        self.dist, self.path, self.is_resuming = dist, path, is_resuming
        self.threads = ThreadPoolExecutor(2)
        self.pending: list[Future[None]] = []
        self.copies: dict[str, CopiedPiece] = {}
        self.is_saving = False
        self.saved_step = next(complete_steps(resume_path(path)))[1].step if is_resuming else -1

    def save(self, train_state: TrainState, engine: Engine, content: Checkpoint | None) -> None:
        """Copy what is to be written, and return. `content`: the .pth, on the first process."""
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
        """Make the step folder with its progress.json. `is_saved`: a complete one gets a new progress.json."""
        try:
            if not self.is_resuming:  # what a run before this one left
                remove(resume_path(self.path))
                self.is_resuming = True
            if not is_saved:  # what a kill left incomplete
                remove(folder)
        except OSError as error:
            raise write_error(folder, error, DISK_SPACE_ADVICE) from error
        content = {"format": STATE_FORMAT, **dataclasses.asdict(train_state)}
        write_json(folder / "progress.json", with_checksum(content), indent=None)

    def wait(self) -> None:
        """Wait until what was begun is on the disk, in all processes; then remove the older steps.

        Raises UserError in all processes when one of them failed.
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
        """Finish; of a complete stage nothing is left to resume."""
        self.wait()
        if complete and self.dist.is_rank0:
            with contextlib.suppress(OSError):
                remove(resume_path(self.path))

    def abort(self) -> None:
        """After an error: let what was begun come to its end, whatever that is."""
        for future in self.pending:
            with contextlib.suppress(BaseException):
                future.result(timeout=60)
        self.threads.shutdown(wait=False)


def clone_checkpoint(content: Checkpoint) -> Checkpoint:
    """The same .pth with tensors of its own, for a thread to write while the weights change."""

    def clone_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in state.items()}

    return {**content, "model": clone_tensors(content["model"])}
