"""Chats or pairs of answers -> jsonl files -> token shards with loss masks.

    chats -> train.jsonl, val.jsonl                           whole chats, independent of the tokenizer
          -> tokens-<fingerprint>/  train, val_zh, val_en     rendered and tokenised, truncated after whole turns

A `DataTask` holds the steps that differ between chats (CHAT_TASK) and pairs (PAIR_TASK in preferences.py).

The jsonl files are the source of truth: `tokenize_chats` builds a token folder from them for another tokenizer or
length. Files are written to a staging folder, which is renamed when it is complete. A killed `prepare_chat_data`
resumes: it reads the rows again, but keeps the files that it has written.

Read next: render_chats.py (chat -> tokens), examples.py (duplicates and validation split), job_state.py (resume),
shard_writer.py (file format), prepare_text.py (the same for plain text), ../data_process.py (the command).
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

ExampleBatch = list[tuple[str, Example]]  # (split, example)
ROW_FILES = ("train.jsonl", "val.jsonl")
REFUSAL_PREFIXES = ("the model's chat template ", "the chat format ")  # of the reasons why a chat cannot be rendered


@dataclass(frozen=True)
class DataTask:
    """The steps from input files to the token folder that differ between chats and pairs of answers."""

    kind: str  # "kind" in the token folder's meta.json
    command: str  # subcommand of data_process.py
    fields: tuple[str, ...]  # keys of a jsonl row: for `Example.messages`, then for each of `Example.answers`
    read_examples: Callable[[Iterable[PathLike], DataStats], Iterator[Example]]
    # (examples, tokenizer, max_seq_len, report) -> documents of each example, [] for an example that is dropped
    render: Callable[[list[Example], Any, int, DataStats], list[list[MaskedTokens]]]
    settings: dict[str, Any] = field(default_factory=dict)  # inputs of `read_examples` besides the files

    def row(self, example: Example) -> bytes:
        """The example as a line of train.jsonl or val.jsonl, UTF-8."""
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
    """Write train.jsonl, val.jsonl and the token folder of the chats in `paths` to `out_dir`.

    `out_dir` is replaced only when the dataset is complete; a killed run resumes. `extra_meta` is added to meta.json.
    `on_batch` is called after every batch. Returns the token folder's meta.json.
    Raises UserError for unusable data or a disk that cannot be written.
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
    """The incomplete dataset in `<out_dir>.partial`; resumes from its progress file."""

    def __init__(self, progress: JobProgress, tokenizer: Any, max_seq_len: int, task: DataTask) -> None:
        self.progress, self.task = progress, task
        saved = progress.load_or_reset()
        self.num_examples = saved.get("items", 0)  # examples that are written and tokenised
        self.rows = saved.get("rows", {"train": 0, "val": 0})
        checksums = saved.get("checksums", {})
        self.files = {name: ChecksummedFile(progress.folder / name, *checksums.get(name, [])) for name in ROW_FILES}
        self.tokens = _TokenFolder(
            progress.folder / token_folder_name(tokenizer), tokenizer, max_seq_len, task, saved.get("tokens")
        )

    def add(self, batch: ExampleBatch) -> None:
        """Write and tokenise a batch; save the progress if it is due."""
        for split, example in batch:
            name = split.partition("_")[0]  # val_zh and val_en share val.jsonl
            self.files[f"{name}.jsonl"].write(self.task.row(example))
            self.rows[name] += 1
        self.tokens.add(batch)
        self.num_examples += len(batch)
        if self.progress.is_due():
            state = {"items": self.num_examples, "rows": self.rows, "tokens": self.tokens.state()}
            state["checksums"] = self.checksums()
            self.progress.save(state, *self.files.values())

    def checksums(self) -> dict[str, list[Any]]:
        """[bytes, CRC-32] of train.jsonl and val.jsonl so far."""
        return {name: [file.size, file.checksum] for name, file in self.files.items()}

    def close(self, report: DataStats) -> None:
        """Finish all files. This takes seconds; a run that is killed here starts from the beginning."""
        (self.progress.folder / PROGRESS_FILE).unlink(missing_ok=True)
        for file in self.files.values():
            file.close()
        self.tokens.close(_token_inputs(self.progress.folder, self.tokens.max_seq_len, self.task), report)

    def abort(self) -> None:
        """Close the files without finishing them."""
        self.tokens.abort()
        for file in self.files.values():
            with contextlib.suppress(OSError):
                file.close()


def token_folder_name(tokenizer: Any) -> str:
    """tokens-<rendering fingerprint>: the fingerprint of the tokenizer and its chat template."""
    return f"tokens-{tokenizer.rendering_fingerprint}"


def tokenize_chats(folder: PathLike, tokenizer: Any, max_seq_len: int, task: DataTask | None = None) -> Path:
    """Tokenise train.jsonl and val.jsonl of `folder`, unless the token folder for this tokenizer and length exists.

    `tokenizer` needs .render_each, .rendering_fingerprint and .vocab_size. Returns the path of the token folder
    `folder/tokens-<fingerprint>`, in the format of shard_writer.py with masks. Raises UserError if a jsonl file is
    missing or damaged, or if no chat fits into `max_seq_len` tokens.
    """
    folder, task = Path(folder), task or CHAT_TASK
    target = folder / token_folder_name(tokenizer)
    job = _token_inputs(folder, max_seq_len, task)
    if _is_current(target, job):
        return target
    with lock_output(target, wait=True), report_write_errors(target):
        if _is_current(target, job):  # another process has built it while this one waited for the lock
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
    """Writes a token folder: one ShardWriter per split, and the statistics of the examples.

    With the `state` of an earlier run, the writers resume from it.
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
        """Finish the files and write meta.json. Raises UserError if the train split is empty."""
        require_train_split(self.writers, _no_data_message(self.task.kind.removesuffix("s"), report))
        splits = {split: self.writers[split].close() for split in sorted(self.writers)}
        meta = {"kind": self.task.kind, "tokenizer": self.tokenizer.rendering_fingerprint, **job}
        meta |= {"vocab_size": self.tokenizer.vocab_size, "dtype": self.dtype, "splits": splits}
        write_meta(self.folder, meta | {"report": report.to_dict()})

    def abort(self) -> None:
        for writer in self.writers.values():
            writer.abort()


def _no_data_message(what: str, report: DataStats) -> str:
    """The error message for an empty train split: the most frequent reasons for dropped rows, and what to do."""
    reasons = sorted(report.dropped.items(), key=lambda reason: -reason[1].count)[:3]
    why = ", ".join(f"{reason.count:,} x {name}" for name, reason in reasons)
    if report.kept:
        return (
            f"no {what} is left to train on: all {report.kept:,} are held out: give a smaller --val_share or more data"
        )
    if reasons and reasons[0][0].startswith(REFUSAL_PREFIXES):
        return f"no {what} can be rendered: {why}; {CHAT_FORMAT_ADVICE}"
    remedy = "a larger --max_seq_len, or " if reasons and reasons[0][0].endswith(" tokens") else ""
    return f"no {what} is left to train on: {why or 'the files have none'}: give {remedy}more data"


CHAT_TASK = DataTask("chats", "sft", ("messages",), read_chat_examples, render_chat_examples)


def _read_stored_examples(folder: Path, task: DataTask) -> Iterator[tuple[str, Example]]:
    """Yield (split, example) of train.jsonl and val.jsonl, which may have grown. Raises UserError if one is damaged."""
    meta = read_checked_meta(folder)
    if meta and meta["format"] != DATA_FORMAT:
        warn_no_checksums(folder)
    for name in ("train", "val"):
        path, crc = folder / f"{name}.jsonl", 0
        size, expected = (meta or {}).get("checksums", {}).get(path.name, [-1, ""])
        has_grown = path.stat().st_size > size
        if has_grown and expected:
            print(f"note: {path} has grown since data_process.py wrote it: its checksum is not verified")
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                crc = zlib.crc32(line, crc)
                try:
                    row = json.loads(line.decode())
                    (messages, *answers), language = (row[field] for field in task.fields), row["lang"]
                    text = chat_text([*messages, *itertools.chain(*answers)])
                    example = Example(text, messages, language, 0, path.name, number, tuple(answers))
                    if language not in LANGUAGES:  # checked because it becomes part of a file name
                        raise ValueError(language)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    command = f"data_process.py {task.command}"
                    raise UserError(
                        f"{path}:{number}: not a row that data_process.py wrote: run {command} again"
                    ) from None
                yield ("train" if name == "train" else f"val_{language}"), example
        if not has_grown and f"{crc:08x}" != expected:
            raise UserError(
                f"{path} is damaged (it differs from its checksum in meta.json): run `python data_process.py "
                f"{task.command} FILES…` again; if you edited rows by hand, pass the edited file as FILES"
            )


def _token_inputs(folder: Path, max_seq_len: int, task: DataTask) -> dict[str, Any]:
    """The inputs of a token folder besides the tokenizer; meta.json stores them to detect an outdated folder."""
    return {"max_seq_len": max_seq_len, "source": _fingerprint_rows(folder, task)}


def _fingerprint_rows(folder: Path, task: DataTask) -> dict[str, str]:
    """Fingerprints of the jsonl files, from size, first and last MiB: fast enough to check at every start."""
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
    """Whether a token folder exists that was built from these inputs."""
    try:
        meta = read_meta(target)
    except UserError:
        return False
    return all(meta.get(name) == value for name, value in job.items())
