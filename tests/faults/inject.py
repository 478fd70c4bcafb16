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
import builtins
import contextlib
import errno
import importlib
import io
import json
import mmap
import os
import resource
import runpy
import select
import shutil
import signal
import struct
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

ROOT = Path(__file__).resolve().parent.parent.parent
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NEED_SPACE = ("open", "write", "fsync", "close", "mkdir", "link", "symlink")  # what fails on a full disk
PRELOADED = ("torch", "numpy", "tokenizers", "rich.progress", "rich.table", "rich.console", "jinja2")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass(frozen=True)
class Fault:
    """What happens to one run. The default is nothing: operations are only counted."""

    at: int = 0  # the operation, from 1
    error: str = ""  # name of an errno that the operation fails with; without one it gets the signal
    signal: int = int(signal.SIGKILL)
    lasting: bool = (
        False  # later operations fail as well: all of them (EROFS, EACCES, EIO), those that need space (ENOSPC)
    )
    seconds: float = 0.0  # SIGKILL after so long
    file_size: int = 0  # the largest file in bytes


@dataclass(frozen=True)
class Done:
    """How a run ended. code: the exit code, -N for signal N. operations: (kind, path) in their order."""

    code: int
    output: str  # stdout and stderr
    seconds: float
    operations: list[tuple[str, str]] = field(repr=False)


# ---- the side of the test --------------------------------------------------------------------------------------------
class Injector:
    """A server process that runs scripts. Close it in the end."""

    def __init__(self) -> None:
        environment = {**os.environ, **dict.fromkeys(THREADS, "1"), "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        self.server = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(
        self, command: Sequence[Any], folders: Iterable[Any], fault: Fault | None = None, timeout: float = 120
    ) -> Done:
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
        return Done(**answer)

    def close(self) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait(timeout=30)


# ---- the server ------------------------------------------------------------------------------------------------------
def serve() -> None:
    """Answer the requests on stdin. A forked child leaves this function with SystemExit."""
    for name in PRELOADED:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    sys.path[0] = str(ROOT)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        scratch = Path(tempfile.mkdtemp())  # not TemporaryDirectory: a child would remove it at its exit
        answer = run_forked(request, scratch)
        shutil.rmtree(scratch)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def run_forked(request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    started, fault = time.monotonic(), Fault(**request["fault"])
    plan = Plan(request["folders"], fault, scratch / "operations")
    if (child := os.fork()) == 0:
        try:
            play(request["command"], scratch, plan)
        finally:  # reached only by an error of this file
            traceback.print_exc()
            os._exit(70)
    end = os.pidfd_open(child)
    for limit in (fault.seconds, request["timeout"]) if fault.seconds else (request["timeout"],):
        if ended := select.select([end], [], [], limit)[0]:
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(end)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # processes that it left
    modules = scratch / "modules"
    for name in modules.read_text().split() if modules.is_file() else ():
        with contextlib.suppress(Exception):  # only a matter of speed: the next child finds it imported
            importlib.import_module(name)
    return {
        "code": status if ended else None,
        "output": (scratch / "output").read_text(encoding="utf-8", errors="replace"),
        "seconds": time.monotonic() - started,
        "operations": plan.operations(),
    }


def play(command: list[str], scratch: Path, plan: "Plan") -> None:
    """The child: run the script as the interpreter would, and exit."""
    os.setsid()
    devnull, output = os.open(os.devnull, os.O_RDONLY), os.open(scratch / "output", os.O_WRONLY | os.O_CREAT)
    for number, target in ((devnull, 0), (output, 1), (output, 2)):
        os.dup2(number, target)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False, buffering=1) for n in (1, 2))  # noqa: SIM115
    before = set(sys.modules)
    plan.install()
    code = run_main(command)
    (scratch / "modules").write_text("\n".join(name for name in sys.modules if name not in before))
    leave(code)


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


def leave(code: int) -> None:
    """What the interpreter does at its end, without taking torch apart."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---- counting and failing --------------------------------------------------------------------------------------------
class Plan:
    """Counts the operations below the folders, in a child and the processes that it forks, and strikes at one."""

    def __init__(self, folders: list[str], fault: Fault, trace: Path) -> None:
        self.folders = tuple(folder.rstrip("/") for folder in folders)
        self.fault, self.trace = fault, trace
        self.counter = mmap.mmap(-1, 8)  # shared with forked processes
        self.file = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.lock = threading.RLock()
        self.write = os.write  # before it is patched
        self.exists = os.path.lexists

    def operations(self) -> list[list[str]]:
        os.close(self.file)
        return [line.split("\t", 1) for line in self.trace.read_text(errors="surrogateescape").splitlines()]

    def below(self, path: Any) -> str:
        """The absolute path if it lies below one of the folders, else ''."""
        try:
            name = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 (a link is what is renamed or removed)
        except (TypeError, OSError):
            return ""
        return name if any(name == f or name.startswith(f + "/") for f in self.folders) else ""

    def strike(self, kind: str, path: str, tear: Any = None) -> None:
        """Count one operation; at the chosen one, fail. `tear` is called first: half of a write reaches the disk."""
        with self.lock:
            number = struct.unpack("q", self.counter[:8])[0] + 1
            self.counter[:8] = struct.pack("q", number)
            self.write(self.file, f"{kind}\t{path}\n".encode(errors="surrogateescape"))
        fault = self.fault
        if not fault.at or number < fault.at or (number > fault.at and not fault.lasting):
            return
        if fault.error == "ENOSPC" and kind not in NEED_SPACE:
            return
        if tear:
            tear()
        if fault.error:
            code = getattr(errno, fault.error)
            raise OSError(code, os.strerror(code), path)
        if fault.signal == signal.SIGKILL:
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os.kill(os.getpid(), fault.signal)

    def install(self) -> None:
        if self.fault.file_size:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.fault.file_size, self.fault.file_size))
        sys.addaudithook(self.hook)
        self.patch_open()
        self.patch_descriptors()
        subprocess.Popen = forking_popen(subprocess.Popen)  # type: ignore[misc]

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, how = arguments
            if not isinstance(path, int) and how & WRITING and (name := self.below(path)):
                self.strike("open", name)
        elif event == "os.rename":
            source, target = (self.at(arguments[i], arguments[i + 2]) for i in (0, 1))
            if (name := self.below(target) or self.below(source)) and self.exists(source):
                self.strike("rename", name)
        elif event in ("os.remove", "os.rmdir", "os.truncate"):
            path = self.at(arguments[0], arguments[1] if event != "os.truncate" else -1)
            if (name := self.below(path)) and self.exists(path):
                self.strike(event[3:], name)
        elif event == "os.mkdir":
            path = self.at(arguments[0], arguments[2])
            if (name := self.below(path)) and not self.exists(path):
                self.strike("mkdir", name)
        elif event in ("os.link", "os.symlink") and (name := self.below(arguments[1])):
            self.strike(event[3:], name)

    @staticmethod
    def at(path: Any, folder: int) -> Any:
        """The path that an operation on a name inside an open folder (dir_fd) means; of a descriptor, its file."""
        if isinstance(path, int):
            return Path(f"/proc/self/fd/{path}").readlink()
        return path if folder == -1 else Path(f"/proc/self/fd/{folder}").readlink() / os.fsdecode(path)

    def patch_open(self) -> None:
        real, plan = io.open, self

        class CountedFile(io.FileIO):
            """A file below the folders: each write and its close are operations. A torn write writes its first half."""

            def write(self, data: Any) -> int:
                view, real_write = memoryview(data).cast("B"), super().write
                plan.strike("write", str(self.name), lambda: real_write(view[: len(view) // 2]))
                return real_write(data)

            def close(self) -> None:
                if self.closed:
                    return
                try:
                    plan.strike("close", str(self.name))
                finally:
                    super().close()

        def counted_open(
            file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
            newline: Any = None, closefd: bool = True, opener: Any = None,
        ) -> Any:  # fmt: skip
            if isinstance(file, int) or not set(mode) & set("wax+") or not plan.below(file):
                return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw = CountedFile(os.fspath(file), mode.replace("b", "").replace("t", ""), closefd, opener)
            if buffering == 0:
                return raw
            size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
            buffer = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw, size)
            if "b" in mode:
                return buffer
            text = io.TextIOWrapper(buffer, encoding, errors, newline, line_buffering=buffering == 1)
            text.mode = mode  # type: ignore[misc]
            return text

        io.open = builtins.open = counted_open  # type: ignore[assignment]

    def patch_descriptors(self) -> None:
        """os.write, os.sendfile (of shutil.copyfile) and os.fsync make no audit event."""
        for name, kind in (("write", "write"), ("sendfile", "write"), ("fsync", "fsync"), ("fdatasync", "fsync")):
            real = getattr(os, name)

            def counted(descriptor: Any, *rest: Any, real: Any = real, kind: str = kind, **named: Any) -> Any:
                number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
                if path := self.below(Path(f"/proc/self/fd/{number}").readlink()):
                    self.strike(kind, path)
                return real(descriptor, *rest, **named)

            setattr(os, name, counted)


def forking_popen(real: Any) -> Any:
    """Popen for `[sys.executable, script, ...]` without pipes: a fork, which shares the counter; else the real one."""

    class Forked:
        def __init__(self, command: Sequence[str]) -> None:
            sys.stdout.flush()
            self.returncode: int | None = None
            if (child := os.fork()) == 0:
                leave(run_main(list(command[1:])))
            self.pid = child

        def wait(self, timeout: float | None = None) -> int:
            if self.returncode is None:
                self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            return self.returncode

    class Popen(real):
        def __new__(cls, command: Any, *rest: Any, **named: Any) -> Any:
            if not rest and set(named) <= {"cwd"} and isinstance(command, list) and command[0] == sys.executable:
                return Forked(command)
            return super().__new__(cls)

    return Popen


if __name__ == "__main__":
    serve()
