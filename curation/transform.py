"""Rows -> fewer or better rows: what `clean`, `dedup` and `decontaminate` have in common.

    out_dir/  text_000.jsonl ...   the kept rows, in their order, in files of about 512 MB
              dropped.tsv          every row that was left out: file:line, rule, why, its beginning
              report.json          the counts, examples, and what was done before (../corpus/provenance.py)
              report.md            the same for people

Everything streams: memory holds a few batches, whatever the size of the files. The folder appears under its name only
when it is complete; a killed run is continued by the same command: rows that are dealt with are read again, but not
judged again. `workers` processes judge, one reads and writes; the result is the same for any number of them.

Read next: cleaning.py, near_duplicates.py, decontaminate.py (the steps), rule_stats.py (the counts),
../corpus/job_state.py (after a kill).
"""

import contextlib
import itertools
import json
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from common.errors import UserError
from common.files import remove, write_json, write_text
from corpus.job_state import PROGRESS, Progress, can_continue, inputs_of
from corpus.provenance import history_of
from corpus.readers import Path_, taken_rows
from corpus.row_text import READER, Content, RowReader
from corpus.shard_writer import check_replaceable, partial_folder, publish, writing
from corpus.stats import DataReport
from curation.rule_stats import Tally, Verdict

BATCH_ROWS, BATCH_CHARACTERS = 500, 500_000
FILE_BYTES = 512 << 20
OUR_FILES = (
    "text_*.jsonl",
    "dropped.tsv",
    "report.json",
    "report.md",
    PROGRESS,
    "*.keys",
    "*.json.tmp",  # of a kill in an earlier version
    ".*.tmp",
    ".*.gone",
    "cluster",
)


@dataclass(frozen=True)
class Row:
    """A row on its way: `number` counts from 0 over all files."""

    number: int
    file: str
    line: int
    row: Any
    text: str  # everything that training would read of it
    kind: str = "text"  # or "chat", "pair"
    turns: tuple[tuple[str, int], ...] = ()  # role and end in the text of each message of a chat or pair

    def dropped_line(self, verdict: Verdict) -> bytes:
        """Its line in dropped.tsv: file:line, rule, why, beginning."""
        cells = (f"{self.file}:{self.line}", verdict.marks[-1].rule, verdict.marks[-1].detail, self.text[:120])
        return ("\t".join(" ".join(cell.split()) for cell in cells) + "\n").encode("utf-8", "backslashreplace")


class Step(Protocol):
    """What is done with the rows. Must be picklable when it is to run in several processes."""

    name: str
    reader: RowReader

    def rule_names(self) -> list[str]:
        """Its rules, in the order of the report."""

    def job(self) -> dict[str, Any]:
        """What the result depends on, besides the files: a run is continued only if it is the same."""

    def about(self) -> dict[str, Any]:
        """What later steps should know was done: an entry of the history."""

    def pass_over(self, row: Row) -> None:
        """A row that an earlier, killed run has dealt with."""

    def judge(self, rows: list[Row]) -> list[Verdict]: ...


def numbered_rows(paths: list[Path_], report: DataReport, number: int = 0, reader: RowReader = READER) -> Iterator[Row]:
    """All rows that a training command would read, numbered from `number`. Raises UserError as `read_texts`."""
    for file, line, row, content in taken_rows(paths, report, "any", reader.content):
        report.note_row(content.changes, content.unused, file, line)
        yield Row(number, file, line, row, content.text, content.kind, _turns(content))
        number += 1


def _turns(content: Content) -> tuple[tuple[str, int], ...]:
    """Role and end in the text of every message; of a pair the answers follow the prompt."""
    turns = [*content.messages, *itertools.chain(*content.answers)]
    ends = itertools.accumulate(len(turn["content"]) + 1 for turn in turns)
    return tuple((turn["role"], end) for turn, end in zip(turns, ends, strict=True))


def batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row.text)
        if len(batch) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# ---- several processes -----------------------------------------------------------------------------------------------
_work: Callable[[Any], Any]  # of a worker process


def _set_work(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work


def _do_work(item: Any) -> Any:
    return _work(item)


def in_order(work: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """(item, work(item)) in the order of the items; a few of them at a time are on their way to `workers` processes."""
    if workers <= 1:
        yield from ((item, work(item)) for item in items)
        return
    waiting: deque[tuple[Any, Future[Any]]] = deque()
    fresh = multiprocessing.get_context("spawn")  # a forked child waits forever for the threads of a library in use
    with ProcessPoolExecutor(workers, fresh, initializer=_set_work, initargs=(work,)) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(_do_work, item)))
                if len(waiting) > 2 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for first, future in waiting:
                yield first, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# ---- writing ---------------------------------------------------------------------------------------------------------
class _Output:
    """The growing folder: kept rows and dropped rows, continued from where the progress file vouches for them."""

    def __init__(self, folder: Path, job: dict[str, Any], tally: Tally) -> None:
        self.folder, self.tally, self.progress = folder, tally, Progress(folder, job)
        found = self.progress.load()
        self.rows, self.files = found.get("rows", 0), found.get("files", 0)  # dealt with; full files of kept rows
        if found:
            tally.restore(found["tally"])
        else:
            for pattern in ("text_*.jsonl", "dropped.tsv"):
                for path in folder.glob(pattern):
                    path.unlink()
            folder.mkdir(parents=True, exist_ok=True)
        self.dropped = (folder / "dropped.tsv").open("ab")
        self.kept = self._open_kept("ab")

    def _open_kept(self, mode: str) -> Any:
        return (self.folder / f"text_{self.files:03d}.jsonl").open(mode)

    def add(self, rows: list[Row], verdicts: list[Verdict]) -> None:
        for row, verdict in zip(rows, verdicts, strict=True):
            self.tally.add(row.file, row.line, verdict)
            if verdict.kept is not None:
                self.kept.write(verdict.kept)
            else:
                self.dropped.write(row.dropped_line(verdict))
        self.rows += len(rows)
        if self.kept.tell() >= FILE_BYTES:
            self.kept.close()
            self.files += 1
            self.kept = self._open_kept("wb")
        if self.progress.due():
            state = {"rows": self.rows, "files": self.files, "tally": self.tally.to_dict()}
            self.progress.save(state, self.kept, self.dropped)

    def close(self) -> None:
        self.kept.close()
        self.dropped.close()


def check_out_dir(out_dir: Path_, paths: list[Path_]) -> bool:
    """True when `out_dir` holds an older result. Raises UserError when it holds other things, or the input itself."""
    for path in paths:
        if Path(path).resolve().parent == Path(out_dir).resolve():
            raise UserError(f"{path} lies in the output folder {out_dir}: choose another --out_dir")
    check_replaceable(partial_folder(out_dir), OUR_FILES)
    check_replaceable(out_dir, OUR_FILES)
    return (Path(out_dir) / "report.json").is_file()


def rewrite(
    step: Step,
    paths: list[Path_],
    out_dir: Path_,
    report: DataReport,
    on_batch: Callable[[], None],
    workers: int = 1,
) -> Tally:
    """Pass the rows of all files through the step into `out_dir`, complete or not at all; returns the counts.

    Raises UserError for files or a disk that cannot be used, too many bad rows, or nothing kept.
    """
    check_out_dir(out_dir, paths)
    folder = partial_folder(out_dir)
    job = {"step": step.name, "inputs": inputs_of(paths), **step.job(), **step.reader.job()}
    tally = Tally(step.rule_names())
    with writing(out_dir):
        output = _Output(folder, job, tally)
        try:
            rows = _new_rows(numbered_rows(paths, report, reader=step.reader), step, output.rows)
            for batch, verdicts in in_order(step.judge, batches(rows), workers):
                output.add(batch, verdicts)
                report.kept = tally.kept
                report.text_bytes += sum(len(row.text.encode()) for row in batch)
                on_batch()
            output.close()
            finish(step, paths, folder, tally, report)
        except UserError as problem:
            output.close()
            if not can_continue(problem):
                with contextlib.suppress(OSError):
                    remove(folder)
            raise
        finally:
            output.close()
        publish(folder, out_dir)
    return tally


def _new_rows(rows: Iterator[Row], step: Step, done: int) -> Iterator[Row]:
    for row in rows:
        if row.number >= done:
            yield row
        else:
            step.pass_over(row)


def finish(step: Step, paths: list[Path_], folder: Path, tally: Tally, report: DataReport) -> None:
    """Write the reports beside the rows. Raises UserError when no row is left."""
    if not tally.kept:
        raise UserError(f"{step.name} leaves none of the {tally.read:,} rows: {tally.main_reason()}")
    done = {"step": step.name, **step.about(), "read": tally.read, "kept": tally.kept}
    content = {"history": [*history_of(paths), done], **tally.to_dict(), "bad": report.to_dict()["bad"]}
    content |= {"skipped": report.to_dict()["dropped"], "unused": report.to_dict().get("unused", {})}
    content |= {"notes": report.notes} if report.notes else {}
    write_text(folder / "report.md", tally.markdown(step.name))
    write_json(folder / "report.json", content)
    for left in (*folder.glob("*.keys"), folder / PROGRESS):
        left.unlink(missing_ok=True)


def as_line(row: Any) -> bytes:
    """A row as a line of jsonl; a plain text becomes {"text": ...}."""
    row = {"text": row} if isinstance(row, str) else row
    return (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode("utf-8", "replace")
