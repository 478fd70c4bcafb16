"""Output locks: one writer per output; the operating system releases the lock when the process ends.

    with lock_output("dataset/pretrain"):     ...     UserError if another process holds the lock
    with lock_output(folder, wait=True):      ...     prints a line and waits

The lock of `DIR/NAME` is the file `DIR/.NAME.lock`, which is never removed; `DIR/.NAME.lock.json` describes the process
that holds it. The library filelock locks it with flock (LockFileEx on Windows), which is released even by a kill. On
file systems without flock (some mounts of Lustre and NFS) a note is printed and the command runs without a lock: a lock
that a kill does not release would block all later runs.
Read next: files.py.
"""

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from common.errors import UserError
from common.files import PathLike, remove_leftovers, write_error, write_json

NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
POLL_SECONDS = 0.2


@contextlib.contextmanager
def lock_output(
    path: PathLike, advice: str = "wait for it, or choose another output", wait: bool = False
) -> Iterator[None]:
    """Hold the lock of an output (a file or folder) and remove leftovers of killed writers.

    If another process holds it, raises a UserError with that process's id, command and start time, ending in `advice`;
    with `wait`, prints these and waits. A process cannot lock the same output twice.
    """
    output = Path(path)
    output = output.resolve() if output.is_symlink() or output.name in ("", "..") else output
    holder_file = output.with_name(f".{output.name}.lock.json")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire(output.with_name(f".{output.name}.lock"), path, wait)
    except Timeout:
        raise UserError(f"{path} is being written by {_describe_holder(holder_file)}: {advice}") from None
    except OSError as error:
        raise write_error(output, error) from None
    if lock is None:
        yield
        return
    try:
        remove_leftovers(output)
        remove_leftovers(holder_file)
        write_json(
            holder_file,
            {"pid": os.getpid(), "host": socket.gethostname(), "command": _command_line(), "since": _timestamp()},
        )
        yield
    finally:
        with contextlib.suppress(OSError):
            holder_file.unlink()
        lock.release()


def _acquire(lock_file: Path, path: PathLike, wait: bool) -> FileLock | None:
    """Acquire the lock; None if the file system has no locks. Raises Timeout if another process holds it."""
    lock = _file_lock(lock_file)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise
            holder = _describe_holder(lock_file.with_name(lock_file.name + ".json"))
            print(f"{path} is being written by {holder}: waiting for it", flush=True)
            lock.acquire(timeout=-1, poll_interval=POLL_SECONDS)
    except (NotImplementedError, OSError) as error:
        if isinstance(error, Timeout) or (isinstance(error, OSError) and error.errno not in NO_FLOCK):
            raise
        print(f"note: the file system of {path} has no locks: run only one command that writes it", file=sys.stderr)
        return None
    return lock


def _file_lock(path: Path) -> FileLock:
    try:  # filelock >= 3.21: no fallback to a plain lock file, which remains after a kill
        return FileLock(path, fallback_to_soft=False)
    except TypeError:
        return FileLock(path)


def _describe_holder(holder_file: Path) -> str:
    try:
        holder = json.loads(holder_file.read_text(encoding="utf-8"))
        return f"`{holder['command']}` (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _command_line() -> str:
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]


def _timestamp() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
