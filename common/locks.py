"""One writer at a time: a lock per output, released by the system when its process ends, however it ends.

    with lock_output("dataset/pretrain"):     ...     another process that wants the same output ends with one line
    with lock_output(folder, wait=True):      ...     or says that it waits, and waits

The lock of `DIR/NAME` is the file `DIR/.NAME.lock`, which stays; `.NAME.lock.json` beside it says who holds it. The
library filelock takes it with flock (LockFileEx on Windows), which a kill releases. Where a file system has no flock
(some mounts of Lustre and NFS), one line says so and the command runs without a lock: there a lock that a kill does not
release would stop the next run for ever, and refusing would make such a disk useless.
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
    """Hold the lock of an output (a file or a folder) and remove what a killed writer of it left.

    When another process holds it, that process's number, command and start are named: in a UserError that ends in
    `advice`, or with `wait` in a line on stdout, after which this call waits. One process cannot lock an output twice.
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
    """The lock, held; None where the file system has none. Raises Timeout when another process holds it."""
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
        print(f"note: the file system of {path} has no locks: start no second command that writes it", file=sys.stderr)
        return None
    return lock


def _file_lock(path: Path) -> FileLock:
    try:  # filelock >= 3.21: no file as a substitute for flock, because a kill leaves it
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
