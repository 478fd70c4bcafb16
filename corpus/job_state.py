"""Going on after a kill: a small file says which job is under way and how much of every growing file counts.

    {"job": what is made of which files, and how,  "state": how far it is,  "files": {name: bytes that count},
     "checksum": of these}

    progress = Progress(folder, job)          folder: where the result grows, <out_dir>.partial
    state = progress.load()                   of an earlier run of the same job: its files are cut to what counts; or {}
    if progress.due():                        every CHECKPOINT_SECONDS
        progress.save(state, *open_files)     first the files are safely on disk, then the progress file says so

The rows of a job are read again from their beginning, which is fast, so that every decision is repeated exactly; what
is done with them is not done again: see `behind`.

Read next: prepare_chats.py, prepare_text.py, ../curation/transform.py and ../curation/near_duplicates.py (who use it),
shard_writer.py (writers with a state of their own).
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from common.checksums import has_valid_checksum, with_checksum
from common.errors import UserError
from common.files import remove, remove_leftovers, write_json
from corpus.block_checksums import ChecksummedFile
from corpus.damage import DamagedFile
from corpus.input_files import require_readable
from corpus.readers import PathLike

PROGRESS_FILE, SIGNING_FILE = "progress.json", "signing.keys"  # the second of dedup's first pass
CHECKPOINT_SECONDS = 20.0
SKIP_BATCH_ROWS = 1000  # rows that are only read between two movements of the progress bar

Element = TypeVar("Element")


class JobProgress:
    """The progress file of a job. A job is whatever the result depends on, as plain values."""

    def __init__(self, folder: Path, job: dict[str, Any], name: str = PROGRESS_FILE) -> None:
        self.folder, self.path = folder, folder / name
        self.job = json.loads(json.dumps(job))  # as it comes back from the file
        self.saved_at = time.perf_counter()

    def load(self) -> dict[str, Any]:
        """What `save` was last given for this job, its files cut to what they were then.

        {} when there is none or a damaged one. What another job left is forgotten, or its next run would take our files
        for its own.
        """
        remove_leftovers(self.path)  # of a kill in `save`
        try:
            saved_state = json.loads(self.path.read_text(encoding="utf-8"))
            sizes = {self.folder / name: size for name, size in saved_state["files"].items()}
            if not has_valid_checksum(saved_state):
                raise ValueError("damaged")
            if saved_state["job"] == self.job and all(path.stat().st_size >= size for path, size in sizes.items()):
                for path, size in sizes.items():
                    os.truncate(path, size)
                return saved_state["state"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        self.path.unlink(missing_ok=True)
        return {}

    def load_or_reset(self) -> dict[str, Any]:
        """`load`, in a folder that exists and that holds nothing when there is nothing to go on with."""
        saved_state = self.load()
        if not saved_state:
            remove(self.folder)
            self.folder.mkdir(parents=True)
        return saved_state

    def is_due(self) -> bool:
        return time.perf_counter() - self.saved_at >= CHECKPOINT_SECONDS

    def save(self, state: dict[str, Any], *files: IO[bytes] | ChecksummedFile) -> None:
        """Vouch for `state` and for everything in `files`, which lie in the folder and are open for appending."""
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        sizes = {Path(file.name).name: file.tell() for file in files}
        content = with_checksum({"job": self.job, "state": state, "files": sizes})
        write_json(self.path, content, indent=None)
        self.saved_at = time.perf_counter()


def input_fingerprints(paths: Iterable[PathLike]) -> list[list[Any]]:
    """What tells the files from others or later ones of the same names. Raises UserError for one that is not there."""
    paths = list(paths)
    for path in paths:
        require_readable(path)
    saved_state = [(Path(path).resolve(), Path(path).stat()) for path in paths]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in saved_state]


def skip_done(done: int, elements: Iterable[Element], on_batch: Callable[[], None]) -> Iterator[Element]:
    """The items behind the first `done`, which an earlier run has dealt with: they are only read."""
    for number, element in enumerate(elements):
        if number >= done:
            yield element
        elif number % SKIP_BATCH_ROWS == 0:
            on_batch()


def can_resume(error: BaseException) -> bool:
    """Whether the same command can continue later: a full or read-only disk, or a damaged file, may be mended."""
    return isinstance(error, (OSError, DamagedFile)) or isinstance(error.__cause__, OSError)


@contextlib.contextmanager
def keep_if_resumable(folder: Path) -> Iterator[None]:
    """What stays of a folder whose making fails: nothing for bad data; else what the same command can go on with.

    A damaged file is no bad data: with --accept_damaged, the command continues.
    """
    try:
        yield
    except BaseException as error:
        if (isinstance(error, UserError) and not can_resume(error)) or not (folder / PROGRESS_FILE).is_file():
            with contextlib.suppress(OSError):
                remove(folder)
        raise
