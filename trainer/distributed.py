"""The processes of a run: how they start, what they sum, and how they are asked to stop.

One script serves `python`, `torchrun` and `deepspeed`: the launchers only set RANK, WORLD_SIZE and LOCAL_RANK.
Read next: loop.py, heartbeat.py, ../common/device.py.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from common.device import autocast, pick_device, pick_dtype
from common.errors import UserError
from common.signals import Terminated, handled_signals, ignore_termination, outlive_terminal
from trainer.heartbeat import Heartbeat, first_line, lost_connection


@dataclass
class Run:
    """The process we are: `rank` of `world`, on `device`, computing in `dtype`."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1
    patient_group: Any = None  # of `wait`, which has no time limit
    step: int = 0  # the last one done, as the others are told
    stop_asked: str = ""  # the name of the signal that asked this process to stop

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print once, whatever the number of processes."""
        if self.is_main:
            print(text, flush=True)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.device, self.dtype)

    def sum(self, values: list[float]) -> list[float]:
        """The values summed over all processes, in float64."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over all processes, in its own format, on the CPU."""
        if self.world > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor.cpu()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The first process does what is inside before the others do."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def wait(self) -> None:
        """Wait for all processes, however long one of them takes for what it alone does: it only has to be alive."""
        if self.world > 1:
            dist.barrier(group=self.patient_group)

    @contextlib.contextmanager
    def polite_stop(self) -> Iterator[None]:
        """Inside, Ctrl-C, SIGTERM and SIGHUP set `stop_asked`, for the loop to save and leave.

        A second Ctrl-C leaves now; a second SIGTERM or SIGHUP changes nothing: a closed terminal sends several.
        """

        def ask(number: int, frame: Any) -> None:
            if self.stop_asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_asked = signal.Signals(number).name

        with handled_signals(ask, signal.SIGINT):
            yield
        if self.stop_asked:  # a launcher passes on what the terminal has sent already
            ignore_termination()


TIMEOUTS = {"cpu": 300.0, "cuda": 1800.0}  # seconds of --dist_timeout, where none is given
FOR_EVER = timedelta(days=365)


@contextlib.contextmanager
def start(device: str = "auto", dtype: str = "auto", seed: int = 0, timeout: float = 0) -> Iterator[Run]:
    """Open a run and close it again, in one process or in those that torchrun or deepspeed started.

    Sets the seed (the same on every process, so that all begin with the same weights). `timeout`: seconds that a
    process may keep the others waiting (0: see TIMEOUTS). Raises UserError, on one of the processes, when one is lost.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(seed)
    outlive_terminal()
    run = Run(chosen, pick_dtype(dtype, chosen), rank, world)
    if world == 1:
        yield run
        return
    with connected(run, timeout or TIMEOUTS.get(chosen.type, TIMEOUTS["cpu"])):
        yield run


@contextlib.contextmanager
def connected(run: Run, timeout: float) -> Iterator[None]:
    """Inside, the processes of a run are connected and watch each other."""
    heartbeat, state = None, "ended"
    try:
        if run.device.type == "cuda":  # NCCL ends the process with pages of its own: it comes after the heartbeat
            dist.init_process_group("nccl", timeout=timedelta(seconds=timeout + 60))
        else:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        run.patient_group = dist.new_group(backend="gloo", timeout=FOR_EVER)
        heartbeat = Heartbeat(run, timeout)
        yield
        run.wait()  # without it, a process that leaves early aborts the others now and then
        state = "done"
    except (RuntimeError, Terminated) as error:  # a launcher that notices a lost rank sends SIGTERM to the others
        lost = lost_connection(error)
        if lost is None:
            raise
        if heartbeat is None:
            raise UserError(f"cannot connect the {run.world} processes: {first_line(lost)}") from None
        with handled_signals(lambda number, frame: None):
            raise heartbeat.explain(lost) from None
    finally:
        if heartbeat:
            heartbeat.stop(state)
        failed = heartbeat is not None and heartbeat.state == "failed"
        if dist.is_initialized() and not (failed and run.device.type == "cuda"):  # NCCL would wait for the lost ones
            dist.destroy_process_group()
