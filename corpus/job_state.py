"""Progress file of a data job, from which a killed run resumes.

    {"job": inputs and settings,  "state": progress,  "files": {name: valid bytes},  "checksum": of these}

    progress = JobProgress(folder, job)       folder: the staging folder, <out_dir>.partial
    state = progress.load()                   state of an earlier run of the same job, else {}; truncates its files
    if progress.is_due():                     every CHECKPOINT_SECONDS
        progress.save(state, *open_files)     syncs the files to disk, then writes the progress file

Read next: dataset_writer.py, ../curation/transform.py and ../curation/near_duplicates.py (jobs that resume).
"""

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from common.checksums import has_valid_checksum, with_checksum
from common.files import remove, remove_leftovers, write_json
from corpus.block_checksums import ChecksummedFile
from corpus.damage import DamagedFile
from corpus.input_files import require_readable
from corpus.readers import PathLike

PROGRESS_FILE, SIGNING_FILE = "progress.json", "signing.keys"  # the second is written by the first pass of dedup
CHECKPOINT_SECONDS = 20.0


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


def can_resume(error: BaseException) -> bool:
    """Whether the same command can resume after the user has fixed the disk or the damaged input file."""
    return isinstance(error, (OSError, DamagedFile)) or isinstance(error.__cause__, OSError)
