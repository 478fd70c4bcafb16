"""Fault injection: runs a script with a kill, a signal or an I/O error at its N-th file operation.

    injector = Injector()                                            one server process, which imports torch once
    done = injector.run(["1-pretrain.py", ...], [folder])            counts: done.operations, done.code, done.output
    injector.run(command, [folder], Fault(at=7))                     SIGKILL before operation 7
    injector.run(command, [folder], Fault(at=7, signal=SIGTERM))     another signal before operation 7
    injector.run(command, [folder], Fault(at=7, error="ENOSPC", lasting=True))      errors from operation 7 on
    injector.run(command, [folder], Fault(seconds=0.3))              SIGKILL after 0.3 seconds
    injector.run(command, [folder], Fault(file_size=1000))           files are limited to 1,000 bytes (RLIMIT_FSIZE)

The server forks a child per run, so a run does not repeat the imports. Only operations below the given folders count:
open for writing, write, close, fsync, rename, remove, link, truncate, mkdir, rmdir. Most of them are audit events (PEP
578); files opened for writing get a FileIO whose write and close count. Native code (safetensors) bypasses both; its
writes are tested with `file_size` and a small tmpfs. `subprocess.Popen([sys.executable, ...])` in a child forks again
and shares the counter. Linux only.

Modelled on SQLite's test VFS (sqlite.org/testing.html, I/O error testing and crash testing).
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.operations import Fault, FaultPlan

__all__ = ["Fault", "Injector", "RunResult"]
ROOT = Path(__file__).resolve().parent.parent.parent
PRELOADED = ("torch", "numpy", "tokenizers", "rich.progress", "rich.table", "rich.console", "jinja2")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass(frozen=True)
class RunResult:
    """Result of a run. code: the exit code, -N for signal N. operations: (kind, path), in order."""

    code: int
    output: str  # stdout and stderr
    seconds: float
    operations: list[tuple[str, str]] = field(repr=False)


# ---- the test process ------------------------------------------------------------------------------------------------
class Injector:
    """Starts the server process and sends it commands. `wrapper`: a command prefix for the server. Needs `close`."""

    def __init__(self, wrapper: Sequence[str] = ()) -> None:
        environment = {**os.environ, **dict.fromkeys(THREADS, "1"), "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        self.server = subprocess.Popen(
            [*wrapper, sys.executable, "-m", "tests.faults.inject"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(
        self, command: Sequence[Any], folders: Iterable[Any], fault: Fault | None = None, timeout: float = 120
    ) -> RunResult:
        """Run `command` (a script, or "-m" and a module; then arguments) and wait. Raises TimeoutError."""
        request = {"command": [*map(str, command)], "folders": [os.path.realpath(folder) for folder in folders]}
        request |= {"fault": asdict(fault or Fault()), "timeout": timeout}
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps(request).encode() + b"\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        if answer["code"] is None:
            raise TimeoutError(f"{request['command']} did not end within {timeout} s: {answer['output'][-2000:]}")
        answer["operations"] = [tuple(operation) for operation in answer["operations"]]
        return RunResult(**answer)

    def close(self) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait(timeout=30)


# ---- the server ------------------------------------------------------------------------------------------------------
def serve_requests() -> None:
    """Run the requests on stdin, one JSON line each, and print the results. Forked children never return here."""
    for name in PRELOADED:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        scratch = Path(tempfile.mkdtemp())  # a child would delete a TemporaryDirectory when it exits
        answer = run_forked(request, scratch)
        shutil.rmtree(scratch)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def run_forked(request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    started, fault = time.monotonic(), Fault(**request["fault"])
    plan = FaultPlan(request["folders"], fault)
    output_read_fd, output_write_fd = os.pipe()  # a file would be subject to file_size too
    if (child := os.fork()) == 0:
        try:
            run_child(request["command"], scratch, plan, output_write_fd)
        finally:  # reached only by an error in run_child
            traceback.print_exc()
            os._exit(70)
    os.close(output_write_fd)
    limits = [limit for limit in (fault.seconds, request["timeout"]) if limit]
    status, output = wait_for_child(child, output_read_fd, started, limits)
    modules = scratch / "modules"
    for name in modules.read_text().split() if modules.is_file() else ():
        with contextlib.suppress(Exception):  # an optimisation: later children do not import it again
            importlib.import_module(name)
    return {
        "code": status,
        "output": output.decode("utf-8", "replace"),
        "seconds": time.monotonic() - started,
        "operations": plan.operations(),
    }


def wait_for_child(child: int, output_read_fd: int, started: float, limits: list[float]) -> tuple[int | None, bytes]:
    """(exit code, output) of a child. Kills it after limits[0] seconds; the code is None after the last of `limits`."""
    end, pieces, code = os.pidfd_open(child), [], None
    watched = [end, output_read_fd]
    while limits:
        ready = select.select(watched, [], [], max(0, started + limits[0] - time.monotonic()))[0]
        if output_read_fd in ready:
            pieces.append(os.read(output_read_fd, 1 << 16))
            watched = watched if pieces[-1] else [end]
        elif end in ready:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            break
        elif not ready:
            with contextlib.suppress(ProcessLookupError):  # the child has not called setsid yet
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            limits = limits[1:]
    else:
        os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # processes that the child has started
    while piece := os.read(output_read_fd, 1 << 16):
        pieces.append(piece)
    os.close(end)
    os.close(output_read_fd)
    return code, b"".join(pieces)


def run_child(command: list[str], scratch: Path, plan: FaultPlan, output: int) -> None:
    """In the child: run the script like the interpreter and exit."""
    os.setsid()
    for number, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(number, target)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False, buffering=1) for n in (1, 2))  # noqa: SIM115
    before = set(sys.modules)
    plan.install(lambda command: exit_process(run_main(command)))
    code = run_main(command)
    if not plan.fault.file_size:
        (scratch / "modules").write_text("\n".join(name for name in sys.modules if name not in before))
    exit_process(code)


def run_main(command: list[str]) -> int:
    """Run `python command...` in this process; returns its exit code."""
    module = command[0] == "-m"
    sys.argv = command[1:] if module else list(command)
    try:
        if module:
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def exit_process(code: int) -> None:
    """Exit like the interpreter (threads, atexit, flush), but skip the slow teardown of torch."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve_requests()
