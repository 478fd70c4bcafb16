"""Applies a row transform to files and writes the result: the common part of `clean`, `dedup` and `decontaminate`.

    out_dir/  text_000.jsonl ...   the kept rows, in input order, in files of about 512 MB
              dropped.tsv          every dropped row: file:line, rule, reason, beginning of the text
              report.json          counts, examples, and the provenance of the rows (../corpus/provenance.py)
              report.md            counts and examples as Markdown

Rows are streamed: memory holds a few batches, independent of the file sizes. The output is written to a staging folder
and renamed when it is complete. After a kill the same command resumes: it reads the finished rows again but does not
transform them again. One process reads and writes, `workers` processes transform; the result does not depend on their
number.

Read next: cleaning.py, near_duplicates.py, decontaminate.py (the transforms), rule_stats.py (the counts),
../corpus/job_state.py (resuming).
"""

import contextlib
import itertools
import json
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from common.cli import flag
from common.errors import UserError
from common.files import remove, report_write_errors, write_json, write_text
from common.flag_types import int_between
from corpus.chats import message_text
from corpus.data_flags import DataFlags
from corpus.dataset_writer import check_replaceable, dataset_staging_folder, replace_dataset
from corpus.job_state import PROGRESS_FILE, SIGNING_FILE, JobProgress, can_resume, input_fingerprints
from corpus.provenance import read_provenance
from corpus.readers import PathLike, read_contents
from corpus.row_text import DEFAULT_READER, RowContent, RowReader
from corpus.stats import DataStats
from curation.rule_stats import Decision, RuleStats

TRANSFORM_BATCH_ROWS, TRANSFORM_BATCH_CHARACTERS = 500, 500_000
OUTPUT_FILE_BYTES = 512 << 20
TRANSFORM_FILES = (
    *("text_*.jsonl", "dropped.tsv", "report.json", "report.md", PROGRESS_FILE, "*.keys", "cluster"),
    *(".*.tmp", ".*.gone", "*.json.tmp"),  # left by killed runs, the last one by an earlier version
)


@dataclass(frozen=True)
class CurationConfig(DataFlags):
    """Flags that clean, dedup and decontaminate share."""

    workers: int = flag(1, "processes; the result does not depend on it", type=int_between(1, 1024))


@dataclass(frozen=True)
class NumberedRow:
    """A row of the input; `number` counts from 0 over all files."""

    number: int
    file: str
    line: int
    raw: Any
    text: str  # all text of the row that training would use
    kind: str = "text"  # or "chat", "pair"
    turns: tuple[tuple[str, int], ...] = ()  # (role, end index in `text`) of each message of a chat or pair


class Transform:
    """Base class of the row transforms. Must be picklable for `workers` > 1."""

    name: str
    reader: RowReader = DEFAULT_READER

    def rule_names(self) -> list[str]:
        """Names of the rules, in the order of the report."""
        raise NotImplementedError

    def fingerprint_fields(self) -> dict[str, Any]:
        """Settings that determine the result; a run resumes only if they and the input files are unchanged."""
        raise NotImplementedError

    def provenance(self) -> dict[str, Any]:
        """Settings for the transform's entry in the history of report.json."""
        return self.fingerprint_fields()

    def skip_row(self, row: NumberedRow) -> None:
        """Called for each row that an earlier, killed run has transformed."""

    def apply_to_row(self, row: NumberedRow) -> Decision:
        raise NotImplementedError

    def apply(self, rows: list[NumberedRow]) -> list[Decision]:
        """One decision per row, in order."""
        return [self.apply_to_row(row) for row in rows]


def read_numbered_rows(
    paths: Sequence[PathLike], report: DataStats, number: int = 0, reader: RowReader = DEFAULT_READER
) -> Iterator[NumberedRow]:
    """Yield the rows that a training command reads, numbered from `number`. Raises UserError as `read_contents`."""
    for file, line, row, content in read_contents(paths, report, "any", reader.read_content):
        report.row_changed(content.changes, content.unused, file, line)
        yield NumberedRow(number, file, line, row, content.text, content.kind, _message_ends(content))
        number += 1


def _message_ends(content: RowContent) -> tuple[tuple[str, int], ...]:
    """(role, end index) of every message; for a pair the prompt, then the answers."""
    turns = [*content.messages, *itertools.chain(*content.answers)]
    message_ends = itertools.accumulate(len(message_text(message)) + 1 for message in turns)
    return tuple((message["role"], end) for message, end in zip(turns, message_ends, strict=True))


def batch_rows(rows: Iterable[NumberedRow]) -> Iterator[list[NumberedRow]]:
    batch: list[NumberedRow] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row.text)
        if len(batch) >= TRANSFORM_BATCH_ROWS or characters >= TRANSFORM_BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# ---- several processes -----------------------------------------------------------------------------------------------
_work_function: Callable[[Any], Any]  # set in each worker process


def _set_work_function(work: Callable[[Any], Any]) -> None:
    global _work_function
    _work_function = work


def _call_work_function(item: Any) -> Any:
    return _work_function(item)


def map_in_order(work: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """Yield (item, work(item)) in order; `workers` processes run `work`, with a bounded queue of pending items."""
    if workers <= 1:
        yield from ((item, work(item)) for item in items)
        return
    pending: deque[tuple[Any, Future[Any]]] = deque()
    spawn = multiprocessing.get_context("spawn")  # a forked child can deadlock on locks of library threads
    with ProcessPoolExecutor(workers, spawn, initializer=_set_work_function, initargs=(work,)) as pool:
        try:
            for item in items:
                pending.append((item, pool.submit(_call_work_function, item)))
                if len(pending) > 2 * workers:
                    first, future = pending.popleft()
                    yield first, future.result()
            for first, future in pending:
                yield first, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# ---- writing ---------------------------------------------------------------------------------------------------------
def write_rows(
    rows: list[NumberedRow], decisions: list[Decision], rule_stats: RuleStats, kept: IO[bytes], dropped: IO[bytes]
) -> None:
    """Count the decisions and write each row to text_*.jsonl or dropped.tsv."""
    for row, decision in zip(rows, decisions, strict=True):
        rule_stats.add(row.file, row.line, decision)
        if decision.kept is not None:
            kept.write(decision.kept)
        else:
            cells = (f"{row.file}:{row.line}", decision.hits[-1].rule, decision.hits[-1].detail, row.text[:120])
            line = "\t".join(" ".join(cell.split()) for cell in cells) + "\n"
            dropped.write(line.encode("utf-8", "backslashreplace"))


class _OutputFolder:
    """The staging folder: appends kept and dropped rows, resuming at the position in the progress file."""

    def __init__(self, folder: Path, job: dict[str, Any], rule_stats: RuleStats) -> None:
        self.folder, self.rule_stats, self.progress = folder, rule_stats, JobProgress(folder, job)
        saved = self.progress.load()
        self.rows, self.files = saved.get("rows", 0), saved.get("files", 0)  # transformed rows; full files of kept rows
        if saved:
            rule_stats.restore(saved["tally"])
        else:
            for path in [*folder.glob("text_*.jsonl"), *folder.glob("dropped.tsv")]:
                path.unlink()
            folder.mkdir(parents=True, exist_ok=True)
        self.dropped = (folder / "dropped.tsv").open("ab")
        self.kept = self._open_kept("ab")

    def _open_kept(self, mode: str) -> Any:
        return (self.folder / f"text_{self.files:03d}.jsonl").open(mode)

    def add(self, rows: list[NumberedRow], decisions: list[Decision]) -> None:
        write_rows(rows, decisions, self.rule_stats, self.kept, self.dropped)
        self.rows += len(rows)
        if self.kept.tell() >= OUTPUT_FILE_BYTES:
            self.kept.close()
            self.files += 1
            self.kept = self._open_kept("wb")
        if self.progress.is_due():
            state = {"rows": self.rows, "files": self.files, "tally": self.rule_stats.to_dict()}
            self.progress.save(state, self.kept, self.dropped)

    def close(self) -> None:
        self.kept.close()
        self.dropped.close()


def check_out_dir(out_dir: PathLike, paths: Iterable[PathLike]) -> bool:
    """True if `out_dir` has an older result. Raises UserError if it contains other files or one of the inputs."""
    for path in paths:
        if Path(path).resolve().parent == Path(out_dir).resolve():
            raise UserError(f"{path} is inside the output folder {out_dir}: choose another --out_dir")
    check_replaceable(dataset_staging_folder(out_dir), TRANSFORM_FILES)
    check_replaceable(out_dir, TRANSFORM_FILES)
    return (Path(out_dir) / "report.json").is_file()


def has_progress(out_dir: PathLike) -> bool:
    """Whether the staging folder of `out_dir` holds work from which the same command resumes."""
    return any((dataset_staging_folder(out_dir) / name).is_file() for name in (PROGRESS_FILE, SIGNING_FILE))


@contextlib.contextmanager
def staging_folder_kept_if_resumable(out_dir: PathLike) -> Iterator[None]:
    """After an error, delete the staging folder unless the same command can resume from it.

    Bad data leaves nothing behind. A damaged file is not bad data: with --accept_damaged, the command resumes. An
    OSError, such as a full disk, becomes a UserError.
    """
    try:
        with report_write_errors(out_dir):
            yield
    except BaseException as error:
        if (isinstance(error, UserError) and not can_resume(error)) or not has_progress(out_dir):
            with contextlib.suppress(OSError):
                remove(dataset_staging_folder(out_dir))
        raise


def run_transform(
    transform: Transform, config: CurationConfig, report: DataStats, on_batch: Callable[[], None]
) -> RuleStats:
    """Apply the transform to the rows of all files and write --out_dir atomically; returns the counts.

    Raises UserError for unusable files, too many bad rows, or if no row is kept.
    """
    files, folder = list(config.files), dataset_staging_folder(config.out_dir)
    job = {"step": transform.name, "inputs": input_fingerprints(files)}
    job |= {**transform.fingerprint_fields(), **transform.reader.key_settings()}
    rule_stats = RuleStats(transform.rule_names())
    output = _OutputFolder(folder, job, rule_stats)
    try:
        rows = _skip_done_rows(read_numbered_rows(files, report, reader=transform.reader), transform, output.rows)
        for batch, decisions in map_in_order(transform.apply, batch_rows(rows), config.workers):
            output.add(batch, decisions)
            report.kept = rule_stats.kept
            report.text_bytes += sum(len(row.text.encode()) for row in batch)
            on_batch()
    finally:
        output.close()
    write_reports(transform, files, folder, rule_stats, report)
    replace_dataset(folder, config.out_dir)
    return rule_stats


def _skip_done_rows(rows: Iterator[NumberedRow], transform: Transform, num_done: int) -> Iterator[NumberedRow]:
    for row in rows:
        if row.number >= num_done:
            yield row
        else:
            transform.skip_row(row)


def write_reports(
    transform: Transform, paths: Sequence[PathLike], folder: Path, rule_stats: RuleStats, report: DataStats
) -> None:
    """Write report.md and report.json and delete the progress files. Raises UserError if no row is kept."""
    if not rule_stats.kept:
        raise UserError(f"{transform.name} keeps none of the {rule_stats.read:,} rows: {rule_stats.main_drop_reason()}")
    entry = {"step": transform.name, **transform.provenance(), "read": rule_stats.read, "kept": rule_stats.kept}
    rows = report.to_dict()
    content = {"history": [*read_provenance(paths), entry], **rule_stats.to_dict(), "bad": rows["bad"]}
    content |= {"skipped": rows["dropped"], "unused": rows.get("unused", {})}
    content |= {"notes": report.notes} if report.notes else {}
    write_text(folder / "report.md", rule_stats.to_markdown(transform.name))
    write_json(folder / "report.json", content)
    for leftover in (*folder.glob("*.keys"), folder / PROGRESS_FILE):
        leftover.unlink(missing_ok=True)


def to_json_line(row: Any) -> bytes:
    """A row as a line of jsonl; a plain text becomes {"text": ...}."""
    row = {"text": row} if isinstance(row, str) else row
    return (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode("utf-8", "replace")
