"""Set-up of one or several processes, collectives, and graceful shutdown on signals.

The same script runs under `python`, `torchrun` and `deepspeed`: the launchers only set RANK, WORLD_SIZE and LOCAL_RANK.
Read next: loop.py, heartbeat.py, ../common/device.py.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

from common.device import autocast, keep_freed_memory, pick_device, pick_dtype
from common.signals import handle_signals, ignore_output_errors, ignore_termination


@dataclass
class DistContext:
    """This process: its rank, the number of processes, its device, and the autocast dtype."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    barrier_group: Any = None  # process group of `barrier`, without a time limit
    host_group: Any = None  # process group of `all_reduce_sum`; None: the default group
    step: int = 0  # the last completed step; the heartbeat sends it to the other ranks
    stop_requested: str = ""  # name of the stop signal that this process received

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def print0(self, text: str) -> None:
        """Print on rank 0 only."""
        if self.is_rank0:
            print(text, flush=True)

    @property
    def reads_late(self) -> bool:
        """Whether the loop reads the sums of a step after it has launched the next one, so that a GPU never idles."""
        return self.device.type not in ("cpu", "mps")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.device, self.dtype)

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Return the values summed over all processes, in float64, on the CPU: does not wait for the device."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(tensor, group=self.host_group)
        return tensor.tolist()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor summed over all processes, on this process's device. Does not wait for the device."""
        tensor = tensor.to(self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

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


class PendingSums:
    """Named sums that the device still computes: `sums[name]` is a scalar on the device, `read` waits for all.

    With CUDA they are copied to pinned memory behind an event, so that `read` does not wait for later work.
    """

    def __init__(self, names: list[str], values: torch.Tensor) -> None:
        self.names, self.values, self.event = names, values, None  # type: list[str], torch.Tensor, Any
        if values.device.type == "cuda":
            self.copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.copy.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.values[self.names.index(name)]

    def read(self) -> dict[str, float]:
        if self.event:
            self.event.synchronize()
        return dict(zip(self.names, (self.copy if self.event else self.values).tolist(), strict=True))


class MetricSums:
    """Sums of metrics, in float64 (MPS: float32). `reduce` sums them over all processes at once."""

    def __init__(self, dist: DistContext) -> None:
        self.dist, self.sums = dist, {}  # type: DistContext, dict[str, torch.Tensor | float]
        self.dtype = torch.float32 if dist.device.type == "mps" else torch.float64

    def number(self, value: float) -> torch.Tensor:
        """Return a number as a scalar on the device, without a copy from the host."""
        return torch.full((), value, dtype=self.dtype, device=self.dist.device)

    def add(self, **values: torch.Tensor | float) -> None:
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                value = value.detach().to(self.dist.device, self.dtype)
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def reduce(self) -> PendingSums:
        """Return the sums over all processes. One all-reduce; does not wait for the device."""
        values = [value if isinstance(value, torch.Tensor) else self.number(value) for value in self.sums.values()]
        return PendingSums([*self.sums], self.dist.all_reduce(torch.stack(values)))


DEFAULT_TIMEOUTS = {"cpu": 300.0, "cuda": 1800.0}  # default --dist_timeout, seconds


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
    if picked_device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(seed)
    ignore_output_errors()
    dist = DistContext(picked_device, pick_dtype(dtype, picked_device), rank, world_size)
    if world_size == 1:
        yield dist
        return
    from trainer.heartbeat import process_group  # only for several processes

    with process_group(dist, timeout or DEFAULT_TIMEOUTS.get(picked_device.type, DEFAULT_TIMEOUTS["cpu"])):
        yield dist
