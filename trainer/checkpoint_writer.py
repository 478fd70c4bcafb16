"""Saving in the background: the model by the first process, the step folder by all, while training continues.

    begin(progress, engine, content)    copy, and have a thread write the copies
    finish()                            wait until every process has written its part; remove the older step folders
    close(complete)                     finish; of a complete stage the whole resume folder is removed

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
from common.files import cannot_write, remove, remove_leftovers, write_json
from common.locks import locked
from model.checkpoint import atomic_save
from model.checkpoint_schema import Checkpoint
from trainer.distributed import Run
from trainer.engine import Engine
from trainer.stage import Stage
from trainer.state_files import ADVICE, FORMAT, Copied, copied, own_part, write_state
from trainer.train_state import Progress, complete_steps, resume_path, step_folders

Train = Callable[[Run, argparse.Namespace, Stage], Path]


def one_writer(train: Train) -> Train:
    """Let `train` run only while no other run trains the same model. Raises UserError in all processes otherwise.

    The first process takes the lock, which the system releases at a kill, and removes what a killed run left.
    """

    @functools.wraps(train)
    def alone(run: Run, args: argparse.Namespace, stage: Stage) -> Path:
        path = stage.path(args.out_dir)
        with contextlib.ExitStack() as stack:
            with together(run, f"lock {path}"):
                if run.is_main:
                    stack.enter_context(locked(path, "wait for it, or choose another --out_dir"))
                    remove_leftovers(path.with_suffix(".*"))
                    remove_leftovers(resume_path(path) / "*")
            return train(run, args, stage)

    return alone


@contextlib.contextmanager
def together(run: Run, what: str) -> Iterator[None]:
    """Inside, an error of one process ends all of them. All must come here."""
    problem: Exception | None = None
    try:
        yield
    except (UserError, OSError) as error:
        problem = error
    run.wait()  # for the first process, which may have more to do; `sum` has a time limit
    if run.sum([float(problem is not None)])[0]:
        raise problem or UserError(f"another process could not {what}: its message says why")


class Saver:
    """Writes the model and the step folders of a run. `going_on`: whether the run resumes a saved step."""

    def __init__(self, run: Run, path: Path, going_on: bool) -> None:
        self.run, self.path, self.going_on = run, path, going_on
        self.threads = ThreadPoolExecutor(2)
        self.pending: list[Future[None]] = []
        self.copies: dict[str, Copied] = {}
        self.begun = False
        self.saved_step = next(complete_steps(resume_path(path)))[1].step if going_on else -1

    def begin(self, progress: Progress, engine: Engine, content: Checkpoint | None) -> None:
        """Copy what is to be written, and return. `content`: the .pth, on the first process."""
        self.finish()
        folder, again = resume_path(self.path) / f"step_{progress.step:09d}", progress.step == self.saved_step
        progress.scaler = engine.scaler.state_dict()
        progress.ranks = progress.ranks if again else self.run.world
        with together(self.run, f"write {folder}"):
            if self.run.is_main:
                self.prepare(folder, progress, again)
        self.begun = True
        if content is not None:
            self.pending.append(self.threads.submit(atomic_save, content, self.path))
        if not again:
            mine = own_part(engine.state(), self.run.rank, self.run.world, engine.replicated)
            self.copies = copied(mine, self.copies)
            self.pending.append(self.threads.submit(write_state, folder, self.run.rank, self.copies))
            self.saved_step = progress.step

    def prepare(self, folder: Path, progress: Progress, again: bool) -> None:
        """Make the step folder with its progress.json. `again`: a complete one gets a new progress.json."""
        try:
            if not self.going_on:  # what a run before this one left
                remove(resume_path(self.path))
                self.going_on = True
            if not again:  # what a kill left incomplete
                remove(folder)
        except OSError as error:
            raise cannot_write(folder, error, ADVICE) from error
        content = {"format": FORMAT, **dataclasses.asdict(progress)}
        write_json(folder / "progress.json", with_checksum(content), indent=None)

    def finish(self) -> None:
        """Wait until what was begun is on the disk, in all processes; then remove the older steps.

        Raises UserError in all processes when one of them failed.
        """
        if not self.begun:
            return
        self.begun = False
        with together(self.run, f"write {resume_path(self.path)}"):
            while self.pending:
                self.pending.pop().result()
        if self.run.is_main:
            for step, folder in step_folders(resume_path(self.path)):
                if step != self.saved_step:
                    with contextlib.suppress(OSError):
                        remove(folder)

    def close(self, complete: bool) -> None:
        """Finish; of a complete stage nothing is left to resume."""
        self.finish()
        if complete and self.run.is_main:
            with contextlib.suppress(OSError):
                remove(resume_path(self.path))

    def abandon(self) -> None:
        """After an error: let what was begun come to its end, whatever that is."""
        for future in self.pending:
            with contextlib.suppress(BaseException):
                future.result(timeout=60)
        self.threads.shutdown(wait=False)


def detached(content: Checkpoint) -> Checkpoint:
    """The same .pth with tensors of its own, for a thread to write while the weights change."""

    def own(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in state.items()}

    return {**content, "model": own(content["model"])}
