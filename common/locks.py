"""One writer at a time: a lock per output, released by the system when its process ends, however it ends.

    with locked("dataset/pretrain"):     ...     another process that wants the same output ends with one line

The lock of `DIR/NAME` is the file `DIR/.NAME.lock`, which stays; `.NAME.lock.json` beside it says who holds it. The
library filelock takes it with flock (LockFileEx on Windows), which a kill releases.
Read next: files.py.
"""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from common.errors import UserError
from common.files import PathLike, cannot_write, remove_leftovers, write_json


@contextlib.contextmanager
def locked(path: PathLike, advice: str = "wait for it, or choose another output") -> Iterator[None]:
    """Hold the lock of an output (a file or a folder) and remove what a killed writer of it left.

    Raises UserError at once when another process holds it, with that process's number, command and start.
    """
    place = Path(path)
    place = place.resolve() if place.is_symlink() or place.name in ("", "..") else place
    lock_file, note = place.with_name(f".{place.name}.lock"), place.with_name(f".{place.name}.lock.json")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_file, timeout=0)
        lock.acquire()
    except Timeout:
        raise UserError(f"{path} is being written by {_holder(note)}: {advice}") from None
    except OSError as error:
        raise cannot_write(place, error) from None
    try:
        remove_leftovers(place)
        write_json(note, {"pid": os.getpid(), "host": socket.gethostname(), "command": _command(), "since": _now()})
        yield
    finally:
        with contextlib.suppress(OSError):
            note.unlink()
        lock.release()


def _holder(note: Path) -> str:
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        return f"`{found['command']}` (process {found['pid']} on {found['host']}, since {found['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _command() -> str:
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
