"""Writes a dataset folder: staging folder, resume of a killed run, and the final rename.

    with TextWriter(out_dir, job) as writer:            a DatasetWriter; `job`: inputs and settings (job_state.py)
        for batch in batches:                           lists of (split, example)
            todo = writer.skip_done(batch)              without those that an earlier, killed run has written
            ...
            writer.save_progress_if_due()
        writer.publish(meta)

Files are written to the staging folder `<out_dir>.partial`, which is renamed when it is complete; an older dataset
stays until then. A killed run resumes: it reads all rows again, which is fast and repeats every decision exactly, but
does not tokenize again what is in its files. Bad data leaves nothing behind.

Read next: prepare_text.py and prepare_chats.py (the two writers), shard_writer.py (file format), job_state.py.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from common.errors import UserError
from common.files import PathLike, remove, replace_folder, write_error
from corpus.dataset_meta import resolve_link, write_meta
from corpus.job_state import PROGRESS_FILE, JobProgress, can_resume
from corpus.shard_writer import ShardSet
from corpus.stats import DataStats
from corpus.validation_split import Assigned

KNOWN_FILES = (
    "meta.json", "progress.json", "train.jsonl", "val.jsonl", "tokens-*", "*.bin", "*.mask", "*.crc", "*.idx", "*.idx.npy",
    ".tokens-*",  # locks of token folders
    ".*.tmp", ".*.gone", "*.json.tmp",  # left by killed runs, the last one by an earlier version
)  # fmt: skip

WriterT = TypeVar("WriterT", bound="DatasetWriter")


class DatasetWriter:
    """Writes a dataset to its staging folder. Subclasses say what the progress file holds (`state`, `restore`).

    `shards` are the token shards, `stats` the counts of the examples in them, `num_done` the number of these examples.
    Raises UserError if `out_dir` holds other files, or if the disk cannot be written.
    """

    shards: ShardSet

    def __init__(self, out_dir: PathLike, job: dict[str, Any]) -> None:
        self.out_dir, self.folder = out_dir, dataset_staging_folder(out_dir)
        self.progress = JobProgress(self.folder, job)
        self.files: dict[str, Any] = {}  # open files besides the shards
        self.stats = DataStats()
        self.num_done = self.num_to_skip = 0

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values; syncs the shards to disk."""
        raise NotImplementedError

    def restore(self, saved: dict[str, Any]) -> None:
        """Open the shards and files: empty ones, or those of the `state` of an earlier run."""
        raise NotImplementedError

    def __enter__(self: WriterT) -> WriterT:
        check_replaceable(self.out_dir)
        check_replaceable(self.folder)
        try:
            self.restore(self.progress.load_or_reset())
        except BaseException as error:
            self.__exit__(type(error), error)
            raise
        self.num_to_skip = self.num_done
        return self

    def open_shards(self, folder: Path, vocab_size: int, saved: dict[str, Any] | None) -> None:
        """Open the shards in `folder`: those of the state `saved` with its keys `writers` and `report`, or none."""
        self.shards = ShardSet(folder, vocab_size, saved["writers"] if saved else None)
        if saved:
            self.stats.merge(saved["report"])

    def skip_done(self, assigned: Assigned) -> Assigned:
        """The examples that no earlier run has written, of the next ones in order; they count as written now."""
        skipped = min(self.num_to_skip, len(assigned))
        self.num_to_skip -= skipped
        self.num_done += len(assigned) - skipped
        return assigned[skipped:]

    def save_progress_if_due(self) -> None:
        if self.progress.is_due():
            self.progress.save(self.state(), *self.files.values())

    def close_files(self) -> None:
        """Close `files`, after the last example. A run that is killed from here on starts from the beginning."""
        (self.folder / PROGRESS_FILE).unlink(missing_ok=True)
        for file in self.files.values():
            file.close()

    def publish(self, meta: dict[str, Any]) -> dict[str, Any]:
        """Write meta.json and rename the staging folder to `out_dir`; returns the written meta.json."""
        meta = write_meta(self.folder, meta)
        replace_dataset(self.folder, self.out_dir)
        return meta

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Close the files. After an error, delete the staging folder unless the same command can resume from it.

        A damaged input file is not bad data: with --accept_damaged, the command resumes.
        """
        if hasattr(self, "shards"):
            self.shards.abort()
        for file in self.files.values():
            with contextlib.suppress(OSError):
                file.close()
        is_bad_data = isinstance(error, UserError) and not can_resume(error)
        if error and (is_bad_data or not (self.folder / PROGRESS_FILE).is_file()):
            with contextlib.suppress(OSError):
                remove(self.folder)
        if isinstance(error, OSError):
            raise write_error(self.out_dir, error) from error


@contextlib.contextmanager
def report_write_errors(folder: PathLike) -> Iterator[None]:
    """Context manager that turns an OSError (disk full, no permission) into a one-line UserError."""
    try:
        yield
    except OSError as error:
        raise write_error(folder, error) from error


def dataset_staging_folder(out_dir: PathLike) -> Path:
    """`<out_dir>.partial`, where a dataset is written; beside the target if `out_dir` is a symbolic link."""
    target = resolve_link(out_dir)
    return target.with_name(target.name + ".partial")


def check_replaceable(out_dir: PathLike, known_files: tuple[str, ...] = KNOWN_FILES) -> bool:
    """Whether `out_dir` holds an older dataset, which `replace_dataset` will replace.

    Raises UserError if it holds files with names outside `known_files`, because they would be deleted.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir} is a file: choose another --out_dir")
    if not out_dir.is_dir():
        return False
    names = [path for path in out_dir.iterdir() if not any(path.match(pattern) for pattern in known_files)]
    if names:
        raise UserError(
            f"{out_dir} holds files that data_process.py did not write ({names[0].name}): move them or choose another "
            "--out_dir"
        )
    return (out_dir / "meta.json").is_file()


def replace_dataset(staging: PathLike, out_dir: PathLike) -> None:
    """Rename the staging folder to `out_dir`; an older dataset is renamed first and deleted afterwards."""
    replace_folder(staging, resolve_link(out_dir))
