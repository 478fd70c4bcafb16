"""Set-up of one or several processes, collectives, and graceful shutdown on signals.

The same script runs under `python`, `torchrun` and `deepspeed`: the launchers only set RANK, WORLD_SIZE and LOCAL_RANK.
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
    """This process: its rank, the number of processes, its device, and the autocast dtype."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    barrier_group: Any = None  # process group of `barrier`, without a time limit
    step: int = 0  # the last completed step; the heartbeat sends it to the other ranks
    stop_requested: str = ""  # name of the stop signal that this process received

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def print0(self, text: str) -> None:
        """Print on rank 0 only."""
        if self.is_rank0:
            print(text, flush=True)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.device, self.dtype)

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Return the values summed over all processes, in float64."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def all_reduce_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor summed over all processes, in its dtype, on the CPU."""
        if self.world_size > 1:
            tensor = tensor.to(self.device)
            torch.distributed.all_reduce(tensor)
        return tensor.cpu()

    @contextlib.contextmanager
    def rank0_first(self) -> Iterator[None]:
        """Rank 0 runs the body first, then all other ranks."""
        if not self.is_rank0:
            self.barrier()
        yield
        if self.is_rank0:
            self.barrier()

    def barrier(self) -> None:
        """Wait for all processes without a time limit. The heartbeat ends the run if one of them is lost."""
        if self.world_size > 1:
            torch.distributed.barrier(group=self.barrier_group)

    @contextlib.contextmanager
    def graceful_shutdown(self) -> Iterator[None]:
        """Inside, SIGINT (Ctrl-C), SIGTERM and SIGHUP set `stop_requested`; the loop then saves and ends.

        A second SIGINT raises KeyboardInterrupt. A second SIGTERM or SIGHUP has no effect: a closed terminal sends
        several.
        """

        def handle_signal(number: int, frame: Any) -> None:
            if self.stop_requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_requested = signal.Signals(number).name

        with handle_signals(handle_signal, signal.SIGINT):
            yield
        if self.stop_requested:  # a launcher repeats the signal that the terminal has sent to all processes
            ignore_termination()


DEFAULT_TIMEOUTS = {"cpu": 300.0, "cuda": 1800.0}  # default --dist_timeout, seconds
NO_TIMEOUT = timedelta(days=365)


@contextlib.contextmanager
def init_distributed(
    device: str = "auto", dtype: str = "auto", seed: int = 0, timeout: float = 0
) -> Iterator[DistContext]:
    """Set up this process, and its process group under torchrun or deepspeed; clean up at the end.

    seed: the same on every process, so that all initialise the same weights. timeout: seconds that a process may keep
    the others waiting (0: DEFAULT_TIMEOUTS). Raises UserError, on one process, if a process is lost.
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
    """Inside, the processes are connected by a process group and monitor each other by heartbeats."""
    heartbeat, state = None, "ended"
    try:
        if dist.device.type == "cuda":  # +60 s: the heartbeat's one-line error comes before NCCL's long one
            torch.distributed.init_process_group("nccl", timeout=timedelta(seconds=timeout + 60))
        else:
            torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        dist.barrier_group = torch.distributed.new_group(backend="gloo", timeout=NO_TIMEOUT)
        heartbeat = Heartbeat(dist, timeout)
        yield
        dist.barrier()  # without it, a process that exits early sometimes aborts the others
        state = "done"
    except (RuntimeError, Terminated) as error:  # the launcher sends SIGTERM to the other ranks if one is lost
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
        ):  # NCCL would wait for the lost ranks
            torch.distributed.destroy_process_group()
