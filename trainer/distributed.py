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
import torch.distributed

from common.device import autocast, pick_device, pick_dtype
from common.errors import UserError
from common.signals import Terminated, handle_signals, ignore_output_errors, ignore_termination
from trainer.heartbeat import Heartbeat, find_connection_error, short_message


@dataclass
class DistContext:
    """The process we are: `rank` of `world`, on `device`, computing in `dtype`."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    barrier_group: Any = None  # of `barrier`, which has no time limit
    step: int = 0  # the last one done, as the others are told
    stop_requested: str = ""  # the name of the signal that asked this process to stop

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def print0(self, text: str) -> None:
        """Print once, whatever the number of processes."""
        if self.is_rank0:
            print(text, flush=True)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.device, self.dtype)

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """The values summed over all processes, in float64."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def all_reduce_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over all processes, in its own format, on the CPU."""
        if self.world_size > 1:
            tensor = tensor.to(self.device)
            torch.distributed.all_reduce(tensor)
        return tensor.cpu()

    @contextlib.contextmanager
    def rank0_first(self) -> Iterator[None]:
        """The first process does what is inside before the others do."""
        if not self.is_rank0:
            self.barrier()
        yield
        if self.is_rank0:
            self.barrier()

    def barrier(self) -> None:
        """Wait for all processes, however long one of them takes for what it alone does: it only has to be alive."""
        if self.world_size > 1:
            torch.distributed.barrier(group=self.barrier_group)

    @contextlib.contextmanager
    def graceful_shutdown(self) -> Iterator[None]:
        """Inside, Ctrl-C, SIGTERM and SIGHUP set `stop_requested`, for the loop to save and leave.

        A second Ctrl-C leaves now; a second SIGTERM or SIGHUP changes nothing: a closed terminal sends several.
        """

        def handle_signal(number: int, frame: Any) -> None:
            if self.stop_requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_requested = signal.Signals(number).name

        with handle_signals(handle_signal, signal.SIGINT):
            yield
        if self.stop_requested:  # a launcher passes on what the terminal has sent already
            ignore_termination()


DEFAULT_TIMEOUTS = {"cpu": 300.0, "cuda": 1800.0}  # seconds of --dist_timeout, where none is given
NO_TIMEOUT = timedelta(days=365)


@contextlib.contextmanager
def init_distributed(
    device: str = "auto", dtype: str = "auto", seed: int = 0, timeout: float = 0
) -> Iterator[DistContext]:
    """Open a run and close it again, in one process or in those that torchrun or deepspeed started.

    Sets the seed (the same on every process, so that all begin with the same weights). `timeout`: seconds that a
    process may keep the others waiting (0: see DEFAULT_TIMEOUTS). Raises UserError, on one of the processes, when one
    is lost.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    picked_device = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if picked_device.type == "cuda":
        torch.cuda.set_device(picked_device)
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(seed)
    ignore_output_errors()
    dist = DistContext(picked_device, pick_dtype(dtype, picked_device), rank, world_size)
    if world_size == 1:
        yield dist
        return
    with process_group(dist, timeout or DEFAULT_TIMEOUTS.get(picked_device.type, DEFAULT_TIMEOUTS["cpu"])):
        yield dist


@contextlib.contextmanager
def process_group(dist: DistContext, timeout: float) -> Iterator[None]:
    """Inside, the processes of a run are connected and watch each other."""
    heartbeat, state = None, "ended"
    try:
        if dist.device.type == "cuda":  # NCCL ends the process with pages of its own: it comes after the heartbeat
            torch.distributed.init_process_group("nccl", timeout=timedelta(seconds=timeout + 60))
        else:
            torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        dist.barrier_group = torch.distributed.new_group(backend="gloo", timeout=NO_TIMEOUT)
        heartbeat = Heartbeat(dist, timeout)
        yield
        dist.barrier()  # without it, a process that leaves early aborts the others now and then
        state = "done"
    except (RuntimeError, Terminated) as error:  # a launcher that notices a lost rank sends SIGTERM to the others
        connection_error = find_connection_error(error)
        if connection_error is None:
            raise
        if heartbeat is None:
            raise UserError(
                f"cannot connect the {dist.world_size} processes: {short_message(connection_error)}"
            ) from None
        with handle_signals(lambda number, frame: None):
            raise heartbeat.make_error(connection_error) from None
    finally:
        if heartbeat:
            heartbeat.stop(state)
        failed = heartbeat is not None and heartbeat.state == "failed"
        if torch.distributed.is_initialized() and not (
            failed and dist.device.type == "cuda"
        ):  # NCCL would wait for the lost ones
            torch.distributed.destroy_process_group()
