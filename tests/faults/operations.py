"""The part of inject.py inside the child: counts file operations below some folders and triggers the fault at one.

Audit events (PEP 578) report open, rename, remove, mkdir, truncate and link. Files opened for writing get a FileIO
whose write and close count. os.write, os.sendfile and os.fsync are patched. Writes of native code are not counted.
"""

import builtins
import errno
import io
import mmap
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NEED_SPACE = ("open", "write", "fsync", "close", "mkdir", "link", "symlink")  # operations that fail on a full disk
SHARED_BYTES, HEADER = 1 << 23, struct.Struct("QQ")  # memory shared by forked processes; its header


@dataclass(frozen=True)
class Fault:
    """The fault of one run. The default has none: operations are only counted."""

    at: int = 0  # number of the operation, from 1
    error: str = ""  # name of the errno that the operation raises; empty: it sends `signal`
    signal: int = int(signal.SIGKILL)
    lasting: bool = False  # later operations fail too: all (EROFS, EACCES, EIO) or those that need space (ENOSPC)
    seconds: float = 0.0  # SIGKILL after this time
    file_size: int = 0  # largest size of a file in bytes
    only: str = ""  # regular expression: only operations on matching paths count


class FaultPlan:
    """Counts the operations below the folders in a child and its forked processes, and triggers the fault at one."""

    def __init__(self, folders: list[str], fault: Fault) -> None:
        self.folders, self.fault = tuple(folder.rstrip("/") for folder in folders), fault
        self.memory = mmap.mmap(-1, SHARED_BYTES)  # shared with forked processes: operations, bytes of text, text
        self.lock = threading.RLock()
        self.exists = os.path.lexists

    def operations(self) -> list[list[str]]:
        _, size = HEADER.unpack_from(self.memory)
        text = self.memory[HEADER.size : HEADER.size + size].decode(errors="surrogateescape")
        return [line.split("\t", 1) for line in text.splitlines()]

    def record_operation(self, kind: str, path: str) -> int:
        """Record an operation; returns its number, from 1."""
        with self.lock:
            number, size = HEADER.unpack_from(self.memory)
            line = f"{kind}\t{path}\n".encode(errors="surrogateescape")
            self.memory[HEADER.size + size : HEADER.size + size + len(line)] = line
            HEADER.pack_into(self.memory, 0, number + 1, size + len(line))
            return number + 1

    def path_below(self, path: Any) -> str:
        """The absolute path if it lies below one of the folders, else ''."""
        try:
            name = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 (rename and remove act on a link itself)
        except (TypeError, OSError):
            return ""
        return name if any(name == f or name.startswith(f + "/") for f in self.folders) else ""

    def trigger(self, kind: str, path: str, write_partial: Any = None) -> None:
        """Count an operation and apply the fault if it is its turn. `write_partial` writes half of the data first."""
        if not re.search(self.fault.only, path):
            return
        number = self.record_operation(kind, path)
        fault = self.fault
        if not fault.at or number < fault.at or (number > fault.at and not fault.lasting):
            return
        if fault.error == "ENOSPC" and kind not in NEED_SPACE:
            return
        if fault.error:  # no partial write: a real one would return a shorter count before it fails
            code = getattr(errno, fault.error)
            raise OSError(code, os.strerror(code), path)
        if fault.signal == signal.SIGKILL:
            if write_partial:
                write_partial()
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os.kill(os.getpid(), fault.signal)

    def install(self, run_forked: Callable[[list[str]], None]) -> None:
        """Install the hooks. `run_forked` runs a command in a forked process and exits."""
        if self.fault.file_size:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.fault.file_size, self.fault.file_size))
        sys.addaudithook(self.audit_hook)
        self.patch_open()
        self.patch_descriptors()
        subprocess.Popen = forking_popen(subprocess.Popen, run_forked)  # type: ignore[misc]

    def audit_hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, how = arguments
            if not isinstance(path, int) and how & WRITING and (name := self.path_below(path)):
                self.trigger("open", name)
        elif event == "os.rename":
            source, target = (self.resolve_path(arguments[i], arguments[i + 2]) for i in (0, 1))
            if (name := self.path_below(target) or self.path_below(source)) and self.exists(source):
                self.trigger("rename", name)
        elif event in ("os.remove", "os.rmdir", "os.truncate"):
            path = self.resolve_path(arguments[0], arguments[1] if event != "os.truncate" else -1)
            if (name := self.path_below(path)) and self.exists(path):
                self.trigger(event[3:], name)
        elif event == "os.mkdir":
            path = self.resolve_path(arguments[0], arguments[2])
            if (name := self.path_below(path)) and not self.exists(path):
                self.trigger("mkdir", name)
        elif event in ("os.link", "os.symlink") and (name := self.path_below(arguments[1])):
            self.trigger(event[3:], name)

    @staticmethod
    def resolve_path(path: Any, folder: int) -> Any:
        """The path of a file descriptor, or of a name relative to an open folder (dir_fd)."""
        if isinstance(path, int):
            return Path(f"/proc/self/fd/{path}").readlink()
        return path if folder == -1 else Path(f"/proc/self/fd/{folder}").readlink() / os.fsdecode(path)

    def patch_open(self) -> None:
        real, plan = io.open, self

        class CountedFile(io.FileIO):
            """A file below the folders whose writes and close count. A kill during a write leaves its first half."""

            def write(self, data: Any) -> int:
                view, real_write = memoryview(data).cast("B"), super().write
                plan.trigger("write", str(self.name), lambda: real_write(view[: len(view) // 2]))
                return real_write(data)

            def close(self) -> None:
                if self.closed:
                    return
                try:
                    plan.trigger("close", str(self.name))
                finally:
                    super().close()

        def counted_open(
            file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
            newline: Any = None, closefd: bool = True, opener: Any = None,
        ) -> Any:  # fmt: skip
            if isinstance(file, int) or not set(mode) & set("wax+") or not plan.path_below(file):
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
        """Patch os.write, os.sendfile (used by shutil.copyfile) and os.fsync, which raise no audit event."""
        for name, kind in (("write", "write"), ("sendfile", "write"), ("fsync", "fsync"), ("fdatasync", "fsync")):
            real = getattr(os, name)

            def counted(descriptor: Any, *args: Any, real: Any = real, kind: str = kind, **kwargs: Any) -> Any:
                number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
                if path := self.path_below(Path(f"/proc/self/fd/{number}").readlink()):
                    self.trigger(kind, path)
                return real(descriptor, *args, **kwargs)

            setattr(os, name, counted)


def forking_popen(real: Any, run_forked: Callable[[list[str]], None]) -> Any:
    """A Popen that forks for `[sys.executable, script, ...]` without pipes, so the child shares the counter."""

    class ForkedProcess:
        def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
            sys.stdout.flush()
            self.returncode: int | None = None
            if (child := os.fork()) == 0:
                os.environ.update(env)
                run_forked(list(command[1:]))
            self.pid = child

        def wait(self, timeout: float | None = None) -> int:
            if self.returncode is None:
                self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            return self.returncode

    class Popen(real):
        def __new__(cls, command: Any, *args: Any, **kwargs: Any) -> Any:
            if (
                not args
                and set(kwargs) <= {"cwd", "env", "stdout"}
                and kwargs.get("stdout") is None
                and isinstance(command, list)
                and command[0] == sys.executable
            ):
                return ForkedProcess(command, kwargs.get("env") or {})
            return super().__new__(cls)

    return Popen
