"""Progress file of a data job, from which a killed run resumes.

    {"job": inputs and settings,  "state": progress,  "files": {name: valid bytes},  "checksum": of these}

    progress = JobProgress(folder, job)       folder: the staging folder, <out_dir>.partial
    state = progress.load()                   state of an earlier run of the same job, else {}; truncates its files
    if progress.is_due():                     every CHECKPOINT_SECONDS
        progress.save(state, *open_files)     syncs the files to disk, then writes the progress file

A resumed job reads its rows again from the first one, which is fast, so every decision is repeated exactly. The rows
that were already processed are skipped afterwards (`skip_done`).

Read next: prepare_chats.py, prepare_text.py, ../curation/transform.py and ../curation/near_duplicates.py (jobs that
resume), shard_writer.py (writers with a state of their own).
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

PROGRESS_FILE, SIGNING_FILE = "progress.json", "signing.keys"  # the second is written by the first pass of dedup
CHECKPOINT_SECONDS = 20.0
SKIP_BATCH_ROWS = 1000  # skipped rows between two updates of the progress bar

Element = TypeVar("Element")


class JobProgress:
    """The progress file of a job. `job` holds everything that the result depends on, as plain values."""

    def __init__(self, folder: Path, job: dict[str, Any], name: str = PROGRESS_FILE) -> None:
        self.folder, self.path = folder, folder / name
        self.job = json.loads(json.dumps(job))  # in the types that JSON returns, to compare with the file
        self.saved_at = time.perf_counter()

    def load(self) -> dict[str, Any]:
        """Return the state that `save` last wrote for this job, and truncate the files to their sizes at that time.

        Returns {} if the progress file is missing, damaged or of another job, and deletes it: otherwise the next run
        of that other job would resume from the files of this one.
        """
        remove_leftovers(self.path)  # of a run that was killed in `save`
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
        """`load`; if there is no state to resume from, also replace the folder by an empty one."""
        saved_state = self.load()
        if not saved_state:
            remove(self.folder)
            self.folder.mkdir(parents=True)
        return saved_state

    def is_due(self) -> bool:
        return time.perf_counter() - self.saved_at >= CHECKPOINT_SECONDS

    def save(self, state: dict[str, Any], *files: IO[bytes] | ChecksummedFile) -> None:
        """Sync `files` of the folder, open for appending, then write `state` and their sizes to the progress file."""
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        sizes = {Path(file.name).name: file.tell() for file in files}
        content = with_checksum({"job": self.job, "state": state, "files": sizes})
        write_json(self.path, content, indent=None)
        self.saved_at = time.perf_counter()


def input_fingerprints(paths: Iterable[PathLike]) -> list[list[Any]]:
    """[path, bytes, modification time in ns] of each input file. Raises UserError if a file cannot be read."""
    paths = list(paths)
    for path in paths:
        require_readable(path)
    saved_state = [(Path(path).resolve(), Path(path).stat()) for path in paths]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in saved_state]


def skip_done(done: int, elements: Iterable[Element], on_batch: Callable[[], None]) -> Iterator[Element]:
    """Yield the elements after the first `done`, which an earlier run has processed."""
    for number, element in enumerate(elements):
        if number >= done:
            yield element
        elif number % SKIP_BATCH_ROWS == 0:
            on_batch()


def has_progress(folder: Path) -> bool:
    """Whether a job can resume from this staging folder."""
    return any((folder / name).is_file() for name in (PROGRESS_FILE, SIGNING_FILE))


def can_resume(error: BaseException) -> bool:
    """Whether the same command can resume after the user has fixed the disk or the damaged input file."""
    return isinstance(error, (OSError, DamagedFile)) or isinstance(error.__cause__, OSError)


@contextlib.contextmanager
def keep_if_resumable(folder: Path) -> Iterator[None]:
    """On an error, delete the staging folder unless the same command can resume from it.

    Bad data leaves nothing behind. A damaged file is not bad data: with --accept_damaged, the command resumes.
    """
    try:
        yield
    except BaseException as error:
        if (isinstance(error, UserError) and not can_resume(error)) or not has_progress(folder):
            with contextlib.suppress(OSError):
                remove(folder)
        raise
