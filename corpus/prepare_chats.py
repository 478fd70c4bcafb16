"""Chats -> SFT data on disk: rendered and tokenised once, with the mask of trained tokens. Pairs go the same way.

    chats -> train.jsonl, val.jsonl                           cleaned, whole, whatever the tokenizer
          -> tokens-<tokenizer>/  train, val_zh, val_en       what tokenizer.render makes of them, cut at whole turns

What pairs of answers do in their own way is a `Form`, see preferences.py.

The jsonl files are the source of truth: `tokenize_chats` builds the token folder again for another tokenizer or length.
Everything appears under its name only when it is complete. A killed `prepare_chat_data` resumes: the rows are
read again, but what is written and tokenised stays.

Writes through shard_writer.py. Read next: render_chats.py (chat -> tokens), examples.py (what is left out and set
aside), job_state.py (after a kill), shard_writer.py (the files), prepare_text.py (the same for plain text),
../data_process.py (the command).
"""

import contextlib
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import CHAT_FORMAT_ADVICE, UserError
from common.files import remove, temporary_path
from common.locks import lock_output
from corpus.block_checksums import ChecksummedFile
from corpus.chats import chat_text
from corpus.dataset_meta import DATA_FORMAT, read_checked_meta, read_meta, warn_no_checksums, write_meta
from corpus.examples import Example, assign_splits, batch_examples, read_chat_examples
from corpus.job_state import PROGRESS_FILE, JobProgress, input_fingerprints, keep_if_resumable, skip_done
from corpus.language import LANGUAGES
from corpus.provenance import read_provenance
from corpus.readers import PathLike
from corpus.render_chats import MaskedTokens, render_chat_examples
from corpus.shard_writer import (
    check_replaceable,
    dataset_staging_folder,
    open_shard_writer,
    replace_dataset,
    report_write_errors,
    require_train_split,
    token_dtype,
)
from corpus.stats import DataStats

ExampleBatch = list[tuple[str, Example]]  # each with its split
ROW_FILES = ("train.jsonl", "val.jsonl")
REFUSAL_PREFIXES = ("the model's chat template ", "the chat format ")  # beginnings of the reasons of unwritable chats


@dataclass(frozen=True)
class DataTask:
    """What chats and pairs of answers do each in their own way between a file and the token folder."""

    kind: str  # of the token folder
    command: str  # of data_process.py
    fields: tuple[str, ...]  # of a stored row: what of an item stands in `messages`, then its answers
    read_examples: Callable[[Iterable[PathLike], DataStats], Iterator[Example]]
    render: Callable[
        [list[Example], Any, int, DataStats], list[list[MaskedTokens]]
    ]  # of an item that does not fit: none
    settings: dict[str, Any] = field(default_factory=dict)  # what `items` depends on besides the files

    def row(self, example: Example) -> bytes:
        """The line of an item in train.jsonl or val.jsonl."""
        row = dict(zip(self.fields, (example.messages, *example.answers), strict=True)) | {"lang": example.language}
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def prepare_chat_data(
    paths: list[PathLike],
    tokenizer: Any,
    out_dir: PathLike,
    max_seq_len: int,
    val_share: float,
    report: DataStats,
    on_batch: Callable[[], None],
    task: DataTask,
    extra_meta: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write train.jsonl, val.jsonl and the token folder of the chats in `paths` to `out_dir`, complete or not at all.

    `about`: what else meta.json should remember. A run that was killed is continued, as by `prepare_text_data`.
    Returns the token folder's meta.json; raises as `prepare_text_data`.
    """
    check_replaceable(out_dir)
    check_replaceable(dataset_staging_folder(out_dir))
    job = {"inputs": input_fingerprints(paths), "kind": task.kind, "choice": task.settings, "val_share": val_share}
    job |= {"tokenizer": tokenizer.rendering_fingerprint, "max_seq_len": max_seq_len, "format": DATA_FORMAT}
    folder = dataset_staging_folder(out_dir)
    with report_write_errors(out_dir), keep_if_resumable(folder):
        staged = _StagedDataset(JobProgress(folder, job), tokenizer, max_seq_len, task)
        try:
            for batch in batch_examples(
                skip_done(staged.num_examples, assign_splits(task.read_examples(paths, report), val_share), on_batch)
            ):
                staged.add(batch)
                report.text_bytes = staged.tokens.report.text_bytes
                on_batch()
            report.merge(staged.tokens.report.to_dict())
            staged.close(report)
        finally:
            staged.abort()
        meta = {"kind": "messages", "rows": staged.rows, "checksums": staged.checksums()}
        meta |= {"tokens": staged.tokens.folder.name, "val_share": val_share, "report": report.to_dict()}
        meta |= {"history": read_provenance(paths), **(extra_meta or {})}
        write_meta(folder, meta)
        replace_dataset(folder, out_dir)
    return read_meta(Path(out_dir) / staged.tokens.folder.name)


class _StagedDataset:
    """The unfinished data set in `<out_dir>.partial`, continued from where its progress file vouches for it."""

    def __init__(self, progress: JobProgress, tokenizer: Any, max_seq_len: int, task: DataTask) -> None:
        self.progress, self.task = progress, task
        saved = progress.load_or_reset()
        self.num_examples = saved.get("items", 0)  # written and tokenised
        self.rows = saved.get("rows", {"train": 0, "val": 0})
        checksums = saved.get("checksums", {})
        self.files = {name: ChecksummedFile(progress.folder / name, *checksums.get(name, [])) for name in ROW_FILES}
        self.tokens = _TokenFolder(
            progress.folder / token_folder_name(tokenizer), tokenizer, max_seq_len, task, saved.get("tokens")
        )

    def add(self, batch: ExampleBatch) -> None:
        for split, example in batch:
            name = split.partition("_")[0]  # both languages of a validation split share a file
            self.files[f"{name}.jsonl"].write(self.task.row(example))
            self.rows[name] += 1
        self.tokens.add(batch)
        self.num_examples += len(batch)
        if self.progress.is_due():
            state = {"items": self.num_examples, "rows": self.rows, "tokens": self.tokens.state()}
            state["checksums"] = self.checksums()
            self.progress.save(state, *self.files.values())

    def checksums(self) -> dict[str, list[Any]]:
        """[bytes, CRC-32] of train.jsonl and val.jsonl, as far as they are written."""
        return {name: [file.size, file.checksum] for name, file in self.files.items()}

    def close(self, report: DataStats) -> None:
        """From here on it is seconds to the end, and a run that is killed in them starts anew."""
        (self.progress.folder / PROGRESS_FILE).unlink(missing_ok=True)
        for file in self.files.values():
            file.close()
        self.tokens.close(_token_inputs(self.progress.folder, self.tokens.max_seq_len, self.task), report)

    def abort(self) -> None:
        self.tokens.abort()
        for file in self.files.values():
            with contextlib.suppress(OSError):
                file.close()


def token_folder_name(tokenizer: Any) -> str:
    return f"tokens-{tokenizer.rendering_fingerprint}"


def tokenize_chats(folder: PathLike, tokenizer: Any, max_seq_len: int, task: DataTask | None = None) -> Path:
    """The token folder of `folder`'s train.jsonl and val.jsonl for this tokenizer and length; built unless it is there.

    `tokenizer` needs .render_each, .rendering_fingerprint and .vocab_size. Returns
    `folder/tokens-<fingerprint>`, in the format of shard_writer.py with masks. Raises UserError when the jsonl
    files are missing or no chat fits into `max_seq_len` tokens.
    """
    folder, task = Path(folder), task or CHAT_TASK
    target = folder / token_folder_name(tokenizer)
    job = _token_inputs(folder, max_seq_len, task)
    if _is_current(target, job):
        return target
    with lock_output(target, wait=True), report_write_errors(target):
        if _is_current(target, job):  # another process has made it meanwhile
            return target
        staged = temporary_path(target, "tmp")
        remove(staged)
        tokens = _TokenFolder(staged, tokenizer, max_seq_len, task)
        try:
            for batch in batch_examples(_read_stored_examples(folder, task)):
                tokens.add(batch)
            tokens.close(job, tokens.report)
            replace_dataset(staged, target)
        finally:
            tokens.abort()
            remove(staged)
    return target


class _TokenFolder:
    """A growing token folder: one writer a split, and a report of what became of the items.

    `state` of an earlier one continues its files where that state was taken.
    """

    def __init__(
        self, folder: Path, tokenizer: Any, max_seq_len: int, task: DataTask, state: dict[str, Any] | None = None
    ) -> None:
        self.folder, self.tokenizer, self.max_seq_len, self.task = folder, tokenizer, max_seq_len, task
        self.dtype, self.report = token_dtype(tokenizer.vocab_size), DataStats()
        folder.mkdir(exist_ok=True)
        states = state["writers"] if state else {}
        self.writers = {split: open_shard_writer(folder, split, self.dtype, writer) for split, writer in states.items()}
        if state:
            self.report.merge(state["report"])

    def add(self, batch: ExampleBatch) -> None:
        rendered = self.task.render([example for _, example in batch], self.tokenizer, self.max_seq_len, self.report)
        for (split, _), documents in zip(batch, rendered, strict=True):
            for ids, mask, answer_bytes in documents:
                if split not in self.writers:
                    self.writers[split] = open_shard_writer(self.folder, split, self.dtype)
                self.writers[split].add(ids, mask, answer_bytes)

    def state(self) -> dict[str, Any]:
        writers = {split: writer.state() for split, writer in self.writers.items()}
        return {"writers": writers, "report": self.report.to_dict()}

    def close(self, job: dict[str, Any], report: DataStats) -> None:
        """Finish the files and write meta.json; raises UserError when there is nothing to train on."""
        require_train_split(self.writers, _no_data_message(self.task.kind.removesuffix("s"), report))
        splits = {split: self.writers[split].close() for split in sorted(self.writers)}
        meta = {"kind": self.task.kind, "tokenizer": self.tokenizer.rendering_fingerprint, **job}
        meta |= {"vocab_size": self.tokenizer.vocab_size, "dtype": self.dtype, "splits": splits}
        write_meta(self.folder, meta | {"report": report.to_dict()})

    def abort(self) -> None:
        for writer in self.writers.values():
            writer.abort()


def _no_data_message(what: str, report: DataStats) -> str:
    """Why there is nothing to train on, from the counts of what was left out, and what to do."""
    reasons = sorted(report.dropped.items(), key=lambda reason: -reason[1].count)[:3]
    why = ", ".join(f"{reason.count:,} x {name}" for name, reason in reasons)
    if report.kept:
        return (
            f"no {what} is left to train on: all {report.kept:,} are held out: give a smaller --val_share or more data"
        )
    if reasons and reasons[0][0].startswith(REFUSAL_PREFIXES):
        return f"no {what} can be written: {why}; {CHAT_FORMAT_ADVICE}"
    remedy = "a larger --max_seq_len, or " if reasons and reasons[0][0].endswith(" tokens") else ""
    return f"no {what} is left to train on: {why or 'there is none'}: give {remedy}more data"


CHAT_TASK = DataTask("chats", "sft", ("messages",), read_chat_examples, render_chat_examples)


def _read_stored_examples(folder: Path, task: DataTask) -> Iterator[tuple[str, Example]]:
    """(split, item) of our own train.jsonl and val.jsonl. Raises UserError when one differs from its checksum."""
    meta = read_checked_meta(folder)
    if meta and meta["format"] != DATA_FORMAT:
        warn_no_checksums(folder)
    for name in ("train", "val"):
        path, crc = folder / f"{name}.jsonl", 0
        size, expected = (meta or {}).get("checksums", {}).get(path.name, [-1, ""])
        has_grown = path.stat().st_size > size
        if has_grown and expected:
            print(f"note: {path} has grown since data_process.py wrote it: its checksum is not compared")
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                crc = zlib.crc32(line, crc)
                try:
                    row = json.loads(line.decode())
                    (messages, *answers), language = (row[field] for field in task.fields), row["lang"]
                    text = chat_text([*messages, *itertools.chain(*answers)])
                    example = Example(text, messages, language, 0, path.name, number, tuple(answers))
                    if language not in LANGUAGES:  # it becomes a part of a file's name
                        raise ValueError(language)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    command = f"data_process.py {task.command}"
                    raise UserError(f"{path}:{number}: not a row of ours: run {command} again") from None
                yield ("train" if name == "train" else f"val_{language}"), example
        if not has_grown and f"{crc:08x}" != expected:
            raise UserError(
                f"{path} is damaged (it differs from its checksum in meta.json): run `python data_process.py "
                f"{task.command} FILES…` again, also over rows that were edited by hand"
            )


def _token_inputs(folder: Path, max_seq_len: int, task: DataTask) -> dict[str, Any]:
    """What a token folder depends on, besides its tokenizer."""
    return {"max_seq_len": max_seq_len, "source": _fingerprint_rows(folder, task)}


def _fingerprint_rows(folder: Path, task: DataTask) -> dict[str, str]:
    """Names the content of the jsonl files by size, first and last megabyte: quick to check at every start."""
    result = {}
    for name in ROW_FILES:
        path = folder / name
        if not path.is_file():
            command = f"python data_process.py {task.command} FILES…"
            raise UserError(f"no {task.kind} in {folder} ({name} is missing): run `{command}` first")
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.blake2b(str(size).encode(), digest_size=8)
            for start in (0, max(0, size - (1 << 20))):
                file.seek(start)
                digest.update(file.read(1 << 20))
        result[name] = digest.hexdigest()
    return result


def _is_current(target: Path, job: dict[str, Any]) -> bool:
    try:
        meta = read_meta(target)
    except UserError:
        return False
    return all(meta.get(name) == value for name, value in job.items())
