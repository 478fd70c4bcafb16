"""Signs of life between the processes of one run: a killed, stopped or stuck rank ends the run with one line.

Once a second a thread of every rank writes [count, step, state, host, process] into the rendezvous store that torchrun
or rank 0 hosts, and reads what the others wrote. The count changes as long as the process runs, also while its main
thread trains, saves or waits: work that takes long is no reason to end. The run ends

    at once             when a collective fails, because a rank was killed: its count no longer changes
    --dist_timeout      when a collective fails because a rank is stopped, or is alive and does not take part
    15 s after that     when no collective would ever fail: os._exit from the thread
    launcher killed     the thread sends SIGTERM to its own process: save and leave, as torchrun itself would have asked

Read next: distributed.py (who starts it).
"""

import json
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch.distributed

from common.errors import UserError
from common.signals import print_error

HEARTBEAT_INTERVAL = 1.0  # seconds between two signs of life
SILENCE_LIMIT = 3.5 * HEARTBEAT_INTERVAL  # after a failed collective, a rank without one for so long is lost
FAILURE_GRACE = 6.0  # seconds in which ranks are given the time to say that a collective failed for them too
EXIT_DELAY = 15.0  # seconds after the collectives' own timeout
RESUME_ADVICE = "the same command resumes from the last save"


class RankState(Protocol):
    """What the heartbeat reads of a process's run (`DistContext` in distributed.py)."""

    rank: int
    world_size: int
    step: int
    stop_requested: str

    def barrier(self) -> None: ...


class Heartbeat:
    """The thread of one rank. Start it when the process group is there; `stop` it before that is destroyed."""

    def __init__(self, dist: RankState, timeout: float) -> None:
        self.dist, self.timeout = dist, timeout
        self.state = ""  # "failed": a collective did; "ended": this rank has said why it ends; "done": all is well
        self.launcher_pids = find_launcher_pids()
        self.address = (os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", 0)))
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = torch.distributed.TCPStore(
            *self.address, is_master=False, timeout=timedelta(seconds=max(10.0, 5 * HEARTBEAT_INTERVAL))
        )
        self.store = torch.distributed.PrefixStore(f"heartbeat/{restart}", store)
        self.count = time.time_ns()
        self.beats: dict[int, tuple[str, float]] = {}  # of every other rank: the newest sign, and when it was new
        self.store_answered_at = time.monotonic()  # when the store last did
        self.write_beat()
        dist.barrier()  # now every rank has written one
        self.stop_event = threading.Event()
        self.thread = threading.Thread(target=self.run_loop, daemon=True, name="heartbeat")
        self.thread.start()

    def stop(self, state: str) -> None:
        """End the thread; its last sign of life tells the others the state: "done" or "ended"."""
        self.state = self.state or state
        self.stop_event.set()
        self.thread.join(2 * HEARTBEAT_INTERVAL)

    # ---- the thread --------------------------------------------------------------------------------------------------
    def run_loop(self) -> None:
        last, orphaned = time.monotonic(), 0.0
        while not self.stop_event.wait(HEARTBEAT_INTERVAL):
            now = time.monotonic()
            if now - last > 10 * HEARTBEAT_INTERVAL:  # this process itself was stopped: the others may have been, too
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
                self.exit_process("the launcher was killed, and this run could not save and leave")
            if not orphaned and not self.state:
                self.exit_if_ranks_lost(now)
        if not orphaned:  # else the store is gone with torchrun
            self.exchange_beats()

    def exchange_beats(self) -> None:
        """Write this rank's sign of life and read the others'."""
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
        """End the process when a rank, or the store, has been silent for too long."""
        limit = self.timeout + EXIT_DELAY
        if now - self.store_answered_at > limit:
            self.exit_process(
                f"the rendezvous at {self.address[0]}:{self.address[1]} has not answered for {limit:.0f} s"
            )
        if self.dist.stop_requested:  # by a launcher that has noticed it already
            limit = 2 * SILENCE_LIMIT
        if lost_ranks := self.silent_ranks(limit):
            self.exit_process(self.lost_ranks_message(lost_ranks), self.is_reporting_rank(lost_ranks))

    def exit_process(self, text: str, is_reporter: bool = True) -> None:
        if is_reporter:
            print_error(f"error: {text}; {RESUME_ADVICE}")
        os._exit(2)

    # ---- who is lost -------------------------------------------------------------------------------------------------
    def last_beat(self, rank: int) -> list[Any]:
        found: list[Any] = json.loads(self.beats[rank][0])
        return found

    def rank_states(self) -> dict[int, str]:
        return {rank: self.last_beat(rank)[2] for rank in self.beats}

    def silent_ranks(self, seconds: float) -> list[int]:
        """The ranks that have not ended and gave no sign of life for so many seconds, the longest silent one first."""
        now = time.monotonic()
        silent_since = sorted((when, rank) for rank, (_, when) in self.beats.items() if now - when > seconds)
        return [rank for _, rank in silent_since if self.last_beat(rank)[2] not in ("ended", "done")]

    def is_reporting_rank(self, lost_ranks: list[int]) -> bool:
        """Whether this rank is the one that speaks."""
        return self.dist.rank == min(rank for rank in range(self.dist.world_size) if rank not in lost_ranks)

    def lost_ranks_message(self, lost_ranks: list[int]) -> str:
        rank = lost_ranks[0]
        _, step, _, host, process = self.last_beat(rank)
        more = f" and {len(lost_ranks) - 1} more" if len(lost_ranks) > 1 else ""
        seconds = time.monotonic() - self.beats[rank][1]
        return (
            f"rank {rank} (process {process} on {host}){more} has given no sign of life for {seconds:.0f} s, after "
            f"step {step}: it was killed or stopped, or its machine is lost"
        )

    def make_error(self, error: RuntimeError) -> BaseException:
        """What to raise after a failed collective: a UserError that names the rank, on one rank; SystemExit elsewhere.

        A rank that ended by an error of its own has printed it, so that the others end without a word.
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
                f"the connection to the other ranks is lost ({short_message(error)}), and {rendezvous} is gone"
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
    """The error of a collective whose peer is gone or late, if that is what `error` is or what it came on top of."""
    while error is not None:
        text = str(error)
        if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in text):
            return error
        error = error.__context__
    return None


def short_message(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][-120:]


def find_launcher_pids() -> list[int]:
    """The processes that started this one: torchrun, or deepspeed's launch.py and the `deepspeed` command above it.

    What started the launcher, such as a shell, may end without ending the run.
    """
    found = [os.getppid()]
    with suppress(OSError, IndexError, ValueError):  # no /proc
        parent = Path(f"/proc/{found[0]}")
        above = int(parent.joinpath("stat").read_text().rpartition(")")[2].split()[1])
        commands = [path.joinpath("cmdline").read_bytes() for path in (parent, Path(f"/proc/{above}"))]
        if all(b"deepspeed" in command for command in commands):
            found.append(above)
    return found
