"""The process group of a run, and heartbeats between its ranks: a lost rank ends the run with one error line.

Once per second a thread of every rank writes [count, step, state, host, process] to the rendezvous store, which
torchrun or rank 0 hosts, and reads those of the other ranks. The count increases while the process runs, also while its
main thread trains, saves or waits, so long computations do not end the run. The run ends

    at once             if a rank was killed: a collective fails, and the count of that rank no longer changes
    --dist_timeout      if a rank is stopped, or runs without taking part: a collective times out
    15 s after that     if no collective fails: the thread calls os._exit
    launcher killed     the thread sends SIGTERM to its own process, as torchrun does: the loop saves and ends

Read next: distributed.py (the caller).
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed

from common.errors import UserError
from common.signals import Terminated, handle_signals, print_error

HEARTBEAT_INTERVAL = 1.0  # seconds between two heartbeats of a rank
SILENCE_LIMIT = 3.5 * HEARTBEAT_INTERVAL  # after a failed collective, a rank without a heartbeat for so long is lost
FAILURE_GRACE = 6.0  # seconds in which the other ranks can report that the collective failed for them, too
EXIT_DELAY = 15.0  # seconds between the timeout of collectives and os._exit
NO_TIMEOUT = timedelta(days=365)
RESUME_ADVICE = "the same command resumes from the last save"


class RankState(Protocol):
    """The attributes of `DistContext` (distributed.py) that the heartbeat uses."""

    device: torch.device
    rank: int
    world_size: int
    barrier_group: Any
    host_group: Any
    step: int
    stop_requested: str

    def barrier(self) -> None: ...


@contextlib.contextmanager
def process_group(dist: RankState, timeout: float) -> Iterator[None]:
    """Inside, the processes are connected by a process group and monitor each other by heartbeats."""
    heartbeat, state = None, "ended"
    try:
        if dist.device.type == "cuda":  # +60 s: the heartbeat's one-line error comes before NCCL's long one
            torch.distributed.init_process_group("nccl", timeout=timedelta(seconds=timeout + 60))
            dist.host_group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
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
        # After a failure NCCL would wait for the lost ranks.
        if torch.distributed.is_initialized() and not (failed and dist.device.type == "cuda"):
            torch.distributed.destroy_process_group()


class Heartbeat:
    """Heartbeat thread of one rank. Create it after the process group; call `stop` before destroying the group."""

    def __init__(self, dist: RankState, timeout: float) -> None:
        self.dist, self.timeout = dist, timeout
        self.state = ""  # "failed": a collective failed; "ended": this rank ends with its own error; "done": success
        self.launcher_pids = find_launcher_pids()
        self.address = (os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", 0)))
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = torch.distributed.TCPStore(
            *self.address, is_master=False, timeout=timedelta(seconds=max(10.0, 5 * HEARTBEAT_INTERVAL))
        )
        self.store = torch.distributed.PrefixStore(f"heartbeat/{restart}", store)
        self.count = time.time_ns()
        self.beats: dict[int, tuple[str, float]] = {}  # rank -> (last heartbeat, time at which it arrived)
        self.store_answered_at = time.monotonic()
        self.write_beat()
        dist.barrier()  # until every rank has written a heartbeat
        self.stop_event = threading.Event()
        self.thread = threading.Thread(target=self.run_loop, daemon=True, name="heartbeat")
        self.thread.start()

    def stop(self, state: str) -> None:
        """End the thread. Its last heartbeat reports `state` to the other ranks: "done" or "ended"."""
        self.state = self.state or state
        self.stop_event.set()
        self.thread.join(2 * HEARTBEAT_INTERVAL)

    # ---- the thread --------------------------------------------------------------------------------------------------
    def run_loop(self) -> None:
        last, orphaned = time.monotonic(), 0.0
        while not self.stop_event.wait(HEARTBEAT_INTERVAL):
            now = time.monotonic()
            if now - last > 10 * HEARTBEAT_INTERVAL:  # this process was stopped; the others may have been, too
                self.beats = {rank: (beat, now) for rank, (beat, _) in self.beats.items()}
                self.store_answered_at = now
            last = now
            if not orphaned and find_launcher_pids() != self.launcher_pids:
                orphaned = now
                if not self.dist.stop_requested:
                    os.kill(os.getpid(), signal.SIGTERM)
            if not orphaned:
                self.exchange_beats()
            elif now - orphaned > self.timeout:
                self.exit_process("the launcher was killed, and this run could not save in time")
            if not orphaned and not self.state:
                self.exit_if_ranks_lost(now)
        if not orphaned:  # else the store is gone with torchrun
            self.exchange_beats()

    def exchange_beats(self) -> None:
        """Write this rank's heartbeat and read those of the other ranks."""
        others = [rank for rank in range(self.dist.world_size) if rank != self.dist.rank]
        with suppress(RuntimeError):  # DistError: the store is gone
            self.write_beat()
            beats = self.store.multi_get([str(rank) for rank in others])
            self.store_answered_at = now = time.monotonic()
            for rank, beat in zip(others, beats, strict=True):
                if rank not in self.beats or self.beats[rank][0] != beat.decode():
                    self.beats[rank] = (beat.decode(), now)

    def write_beat(self) -> None:
        self.count += 1
        beat = [self.count, self.dist.step, self.state, socket.gethostname(), os.getpid()]
        self.store.set(str(self.dist.rank), json.dumps(beat))

    def exit_if_ranks_lost(self, now: float) -> None:
        """End the process if a rank or the store has been silent for longer than the limit."""
        limit = self.timeout + EXIT_DELAY
        if now - self.store_answered_at > limit:
            self.exit_process(
                f"the rendezvous at {self.address[0]}:{self.address[1]} has not answered for {limit:.0f} s"
            )
        if self.dist.stop_requested:  # by the launcher, which has noticed the lost rank
            limit = 2 * SILENCE_LIMIT
        if lost_ranks := self.silent_ranks(limit):
            self.exit_process(self.lost_ranks_message(lost_ranks), self.is_reporting_rank(lost_ranks))

    def exit_process(self, text: str, is_reporter: bool = True) -> None:
        if is_reporter:
            print_error(f"error: {text}; {RESUME_ADVICE}")
        os._exit(2)

    # ---- lost ranks --------------------------------------------------------------------------------------------------
    def last_beat(self, rank: int) -> list[Any]:
        found: list[Any] = json.loads(self.beats[rank][0])
        return found

    def rank_states(self) -> dict[int, str]:
        return {rank: self.last_beat(rank)[2] for rank in self.beats}

    def silent_ranks(self, seconds: float) -> list[int]:
        """Return the running ranks without a heartbeat for so many seconds, the longest silent one first."""
        now = time.monotonic()
        silent_since = sorted((when, rank) for rank, (_, when) in self.beats.items() if now - when > seconds)
        return [rank for _, rank in silent_since if self.last_beat(rank)[2] not in ("ended", "done")]

    def is_reporting_rank(self, lost_ranks: list[int]) -> bool:
        """Whether this rank prints the error: it is the lowest rank that is not lost."""
        return self.dist.rank == min(rank for rank in range(self.dist.world_size) if rank not in lost_ranks)

    def lost_ranks_message(self, lost_ranks: list[int]) -> str:
        rank = lost_ranks[0]
        _, step, _, host, process = self.last_beat(rank)
        more = f" and {len(lost_ranks) - 1} more" if len(lost_ranks) > 1 else ""
        seconds = time.monotonic() - self.beats[rank][1]
        return (
            f"rank {rank} (process {process} on {host}){more} has sent no heartbeat for {seconds:.0f} s, after "
            f"step {step}: it was killed or stopped, or its machine is lost"
        )

    def make_error(self, error: RuntimeError) -> BaseException:
        """Return the exception to raise after a failed collective.

        On one rank a UserError that names the lost or stuck rank, on the others SystemExit. SystemExit on all ranks if
        a rank ended with its own error, which it has printed.
        """
        self.state = "failed"
        until = time.monotonic() + FAILURE_GRACE
        while time.monotonic() < until:
            if "ended" in self.rank_states().values():
                return SystemExit(2)
            if lost_ranks := self.silent_ranks(SILENCE_LIMIT):
                break
            time.sleep(HEARTBEAT_INTERVAL / 4)
        if not lost_ranks and time.monotonic() - self.store_answered_at > SILENCE_LIMIT:
            rendezvous = f"the rendezvous at {self.address[0]}:{self.address[1]}"
            return UserError(
                f"the connection to the other ranks is lost ({short_message(error)}), and {rendezvous} does not answer"
            )
        stuck_ranks = [rank for rank, state in self.rank_states().items() if state not in ("failed", "done")]
        if not self.is_reporting_rank(lost_ranks or stuck_ranks):
            return SystemExit(2)
        if lost_ranks:
            return UserError(f"{self.lost_ranks_message(lost_ranks)}; {RESUME_ADVICE}")
        if stuck_ranks:
            _, step, _, host, process = self.last_beat(stuck_ranks[0])
            return UserError(
                f"rank {stuck_ranks[0]} (process {process} on {host}) is alive and has not taken part "
                f"for {self.timeout:g} s (--dist_timeout), after step {step}; {RESUME_ADVICE}"
            )
        return UserError(f"the ranks lost their connection ({short_message(error)}); {RESUME_ADVICE}")


def find_connection_error(error: BaseException | None) -> RuntimeError | None:
    """Return the error of a failed collective in `error` or its chain of contexts, or None."""
    while error is not None:
        text = str(error)
        if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in text):
            return error
        error = error.__context__
    return None


def short_message(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][-120:]


def find_launcher_pids() -> list[int]:
    """Return the pids of the launcher: torchrun, or deepspeed's launch.py and the `deepspeed` command above it.

    The parent of the launcher, such as a shell, is not included: it may end without ending the run.
    """
    found = [os.getppid()]
    with suppress(OSError, IndexError, ValueError):  # no /proc
        parent = Path(f"/proc/{found[0]}")
        above = int(parent.joinpath("stat").read_text().rpartition(")")[2].split()[1])
        commands = [path.joinpath("cmdline").read_bytes() for path in (parent, Path(f"/proc/{above}"))]
        if all(b"deepspeed" in command for command in commands):
            found.append(above)
    return found
