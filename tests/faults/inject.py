"""Fault injection: run a script of ours with a kill, a signal or an I/O error at its N-th file operation.

    injector = Injector()                                            one server process: torch is imported once
    done = injector.run(["1-pretrain.py", ...], [folder])            counts: done.operations, done.code, done.output
    injector.run(command, [folder], Fault(at=7))                     SIGKILL before operation 7
    injector.run(command, [folder], Fault(at=7, signal=SIGTERM))     another signal there
    injector.run(command, [folder], Fault(at=7, error="ENOSPC", lasting=True))      errors from operation 7 on
    injector.run(command, [folder], Fault(seconds=0.3))              SIGKILL after 0.3 seconds
    injector.run(command, [folder], Fault(file_size=1000))           no file may grow beyond 1,000 bytes (RLIMIT_FSIZE)

The server forks a child per run, so a run costs what the script does and not its imports. Operations are counted below
the given folders only: files opened for writing, written, closed, fsynced, renamed, removed, linked, truncated;
directories made and removed. Audit events (PEP 578) name most of them; files opened for writing there get a FileIO
whose write and close count. Native code (safetensors) writes without either: file_size and a small tmpfs reach that.
`subprocess.Popen([sys.executable, ...])` in a child forks again and shares the counter. Linux only.

After SQLite's test VFS (sqlite.org/testing.html, I/O error testing and crash testing).
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
    """How a run ended. code: the exit code, -N for signal N. operations: (kind, path) in their order."""

    code: int
    output: str  # stdout and stderr
    seconds: float
    operations: list[tuple[str, str]] = field(repr=False)


# ---- the side of the test --------------------------------------------------------------------------------------------
class Injector:
    """A server process that runs scripts. Close it in the end. `wrapper`: a command that runs the server."""

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
        """Run `command` (a script or "-m", a module; then its arguments) and wait for its end."""
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
    """Answer the requests on stdin. A forked child leaves this function with SystemExit."""
    for name in PRELOADED:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        scratch = Path(tempfile.mkdtemp())  # not TemporaryDirectory: a child would remove it at its exit
        answer = run_forked(request, scratch)
        shutil.rmtree(scratch)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def run_forked(request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    started, fault = time.monotonic(), Fault(**request["fault"])
    plan = FaultPlan(request["folders"], fault)
    output_read_fd, output_write_fd = os.pipe()  # not a file: that would have a limit too
    if (child := os.fork()) == 0:
        try:
            run_child(request["command"], scratch, plan, output_write_fd)
        finally:  # reached only by an error of this file
            traceback.print_exc()
            os._exit(70)
    os.close(output_write_fd)
    limits = [limit for limit in (fault.seconds, request["timeout"]) if limit]
    status, output = wait_for_child(child, output_read_fd, started, limits)
    modules = scratch / "modules"
    for name in modules.read_text().split() if modules.is_file() else ():
        with contextlib.suppress(Exception):  # only a matter of speed: the next child finds it imported
            importlib.import_module(name)
    return {
        "code": status,
        "output": output.decode("utf-8", "replace"),
        "seconds": time.monotonic() - started,
        "operations": plan.operations(),
    }


def wait_for_child(child: int, output_read_fd: int, started: float, limits: list[float]) -> tuple[int | None, bytes]:
    """(exit code, output) of a child. It is killed after each of `limits` in seconds; None: after the last one."""
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
            with contextlib.suppress(ProcessLookupError):  # it has no group of its own yet
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            limits = limits[1:]
    else:
        os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # processes that it left
    while piece := os.read(output_read_fd, 1 << 16):
        pieces.append(piece)
    os.close(end)
    os.close(output_read_fd)
    return code, b"".join(pieces)


def run_child(command: list[str], scratch: Path, plan: FaultPlan, output: int) -> None:
    """The child: run the script as the interpreter would, and exit."""
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
    """The exit code of `python command...` run in this process."""
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
    """What the interpreter does at its end, without taking torch apart."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve_requests()
