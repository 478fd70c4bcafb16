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

import torch.distributed as dist

from common.errors import UserError
from common.signals import print_error

INTERVAL = 1.0  # seconds between two signs of life
SILENT = 3.5 * INTERVAL  # after a failed collective, a rank without one for so long is lost
PATIENCE = 6.0  # seconds in which ranks are given the time to say that a collective failed for them too
LATER = 15.0  # seconds after the collectives' own timeout
ADVICE = "the same command resumes from the last save"


class Rank(Protocol):
    """What the heartbeat reads of a process's run (`Run` in distributed.py)."""

    rank: int
    world: int
    step: int
    stop_asked: str

    def wait(self) -> None: ...


class Heartbeat:
    """The thread of one rank. Start it when the process group is there; `stop` it before that is destroyed."""

    def __init__(self, run: Rank, timeout: float) -> None:
        self.run, self.timeout = run, timeout
        self.state = ""  # "failed": a collective did; "ended": this rank has said why it ends; "done": all is well
        self.parents = launchers()
        self.address = (os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", 0)))
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.TCPStore(*self.address, is_master=False, timeout=timedelta(seconds=max(10.0, 5 * INTERVAL)))
        self.store = dist.PrefixStore(f"heartbeat/{restart}", store)
        self.count = time.time_ns()
        self.beats: dict[int, tuple[str, float]] = {}  # of every other rank: the newest sign, and when it was new
        self.answered = time.monotonic()  # when the store last did
        self.write()
        run.wait()  # now every rank has written one
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True, name="heartbeat")
        self.thread.start()

    def stop(self, state: str) -> None:
        """End the thread; its last sign of life tells the others the state: "done" or "ended"."""
        self.state = self.state or state
        self.ending.set()
        self.thread.join(2 * INTERVAL)

    # ---- the thread --------------------------------------------------------------------------------------------------
    def watch(self) -> None:
        last, orphaned = time.monotonic(), 0.0
        while not self.ending.wait(INTERVAL):
            now = time.monotonic()
            if now - last > 10 * INTERVAL:  # this process itself was stopped: the others may have been, too
                self.beats = {rank: (sign, now) for rank, (sign, _) in self.beats.items()}
                self.answered = now
            last = now
            if not orphaned and launchers() != self.parents:
                orphaned = now
                if not self.run.stop_asked:
                    os.kill(os.getpid(), signal.SIGTERM)
            if not orphaned:
                self.exchange()
            elif now - orphaned > self.timeout:
                self.exit("the launcher was killed, and this run could not save and leave")
            if not orphaned and not self.state:
                self.judge(now)
        if not orphaned:  # else the store is gone with torchrun
            self.exchange()

    def exchange(self) -> None:
        """Write this rank's sign of life and read the others'."""
        others = [rank for rank in range(self.run.world) if rank != self.run.rank]
        with suppress(RuntimeError):  # DistError: the store is gone
            self.write()
            signs = self.store.multi_get([str(rank) for rank in others])
            self.answered = now = time.monotonic()
            for rank, sign in zip(others, signs, strict=True):
                if rank not in self.beats or self.beats[rank][0] != sign.decode():
                    self.beats[rank] = (sign.decode(), now)

    def write(self) -> None:
        self.count += 1
        sign = [self.count, self.run.step, self.state, socket.gethostname(), os.getpid()]
        self.store.set(str(self.run.rank), json.dumps(sign))

    def judge(self, now: float) -> None:
        """End the process when a rank, or the store, has been silent for too long."""
        limit = self.timeout + LATER
        if now - self.answered > limit:
            self.exit(f"the rendezvous at {self.address[0]}:{self.address[1]} has not answered for {limit:.0f} s")
        if self.run.stop_asked:  # by a launcher that has noticed it already
            limit = 2 * SILENT
        if lost := self.silent(limit):
            self.exit(self.describe(lost), self.is_first_of_the_others(lost))

    def exit(self, text: str, prints: bool = True) -> None:
        if prints:
            print_error(f"error: {text}; {ADVICE}")
        os._exit(2)

    # ---- who is lost -------------------------------------------------------------------------------------------------
    def sign(self, rank: int) -> list[Any]:
        found: list[Any] = json.loads(self.beats[rank][0])
        return found

    def states(self) -> dict[int, str]:
        return {rank: self.sign(rank)[2] for rank in self.beats}

    def silent(self, seconds: float) -> list[int]:
        """The ranks that have not ended and gave no sign of life for so many seconds, the longest silent one first."""
        now = time.monotonic()
        quiet = sorted((when, rank) for rank, (_, when) in self.beats.items() if now - when > seconds)
        return [rank for _, rank in quiet if self.sign(rank)[2] not in ("ended", "done")]

    def is_first_of_the_others(self, lost: list[int]) -> bool:
        """Whether this rank is the one that speaks."""
        return self.run.rank == min(rank for rank in range(self.run.world) if rank not in lost)

    def describe(self, lost: list[int]) -> str:
        rank = lost[0]
        _, step, _, host, process = self.sign(rank)
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        seconds = time.monotonic() - self.beats[rank][1]
        return (
            f"rank {rank} (process {process} on {host}){more} has given no sign of life for {seconds:.0f} s, after "
            f"step {step}: it was killed or stopped, or its machine is lost"
        )

    def explain(self, error: RuntimeError) -> BaseException:
        """What to raise after a failed collective: a UserError that names the rank, on one rank; SystemExit elsewhere.

        A rank that ended by an error of its own has printed it, so that the others end without a word.
        """
        self.state = "failed"
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if "ended" in self.states().values():
                return SystemExit(2)
            if lost := self.silent(SILENT):
                break
            time.sleep(INTERVAL / 4)
        if not lost and time.monotonic() - self.answered > SILENT:
            place = f"the rendezvous at {self.address[0]}:{self.address[1]}"
            return UserError(f"the connection to the other ranks is lost ({first_line(error)}), and {place} is gone")
        stuck = [rank for rank, state in self.states().items() if state not in ("failed", "done")]
        if not self.is_first_of_the_others(lost or stuck):
            return SystemExit(2)
        if lost:
            return UserError(f"{self.describe(lost)}; {ADVICE}")
        if stuck:
            _, step, _, host, process = self.sign(stuck[0])
            return UserError(
                f"rank {stuck[0]} (process {process} on {host}) is alive and has not taken part for {self.timeout:g} s "
                f"(--dist_timeout), after step {step}; {ADVICE}"
            )
        return UserError(f"the ranks lost their connection ({first_line(error)}); {ADVICE}")


def lost_connection(error: BaseException | None) -> RuntimeError | None:
    """The error of a collective whose peer is gone or late, if that is what `error` is or what it came on top of."""
    while error is not None:
        text = str(error)
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text):
            return error
        error = error.__context__
    return None


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][-120:]


def launchers() -> list[int]:
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
