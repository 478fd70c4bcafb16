"""jsonl rows -> token folder: renders and tokenises train.jsonl and val.jsonl, which data_process.py wrote.

    dataset/sft/train.jsonl, val.jsonl  ->  dataset/sft/tokens-<fingerprint>/  train, val_zh, val_en with loss masks

data_process.py and the training scripts call `tokenize_chats`. A token folder is reused as long as the tokenizer, its
chat template, the length and the rows are the same.
Read next: render_chats.py and render_pairs.py (the masks), shard_writer.py (file format), prepare_chats.py (writes the
jsonl files).
"""

import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import CHAT_FORMAT_ADVICE, UserError
from common.files import PathLike, remove, temporary_path
from common.locks import lock_output
from corpus.answers import PAIR_SIDES
from corpus.chats import chat_text
from corpus.dataset_meta import DATA_FORMAT, read_checked_meta, read_meta, warn_no_checksums, write_meta
from corpus.examples import Example, batch_examples
from corpus.language import LANGUAGES
from corpus.render_chats import MaskedTokens, render_chat_examples
from corpus.render_pairs import render_pair_examples
from corpus.shard_writer import (
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
class TokenTask:
    """The parts of tokenization that differ between chats and pairs of answers."""

    kind: str  # "kind" in the token folder's meta.json
    command: str  # subcommand of data_process.py
    fields: tuple[str, ...]  # keys of a jsonl row: for `Example.messages`, then for each of `Example.answers`
    # (examples, tokenizer, max_seq_len, report) -> documents of each example, [] for an example that is dropped
    render: Callable[[list[Example], Any, int, DataStats], list[list[MaskedTokens]]]

    def row(self, example: Example) -> bytes:
        """The example as a line of train.jsonl or val.jsonl, UTF-8."""
        row = dict(zip(self.fields, (example.messages, *example.answers), strict=True)) | {"lang": example.language}
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()


CHAT_TOKENS = TokenTask("chats", "sft", ("messages",), render_chat_examples)
PAIR_TOKENS = TokenTask("pairs", "dpo", ("prompt", *PAIR_SIDES), render_pair_examples)


def token_folder_name(tokenizer: Any) -> str:
    """tokens-<rendering fingerprint>: the fingerprint of the tokenizer and its chat template."""
    return f"tokens-{tokenizer.rendering_fingerprint}"


def tokenize_chats(folder: PathLike, tokenizer: Any, max_seq_len: int, task: TokenTask | None = None) -> Path:
    """Tokenise train.jsonl and val.jsonl of `folder`, unless the token folder for this tokenizer and length exists.

    `tokenizer` needs .render_each, .rendering_fingerprint and .vocab_size. Returns the path of the token folder
    `folder/tokens-<fingerprint>`, in the format of shard_writer.py with masks. Raises UserError if a jsonl file is
    missing or damaged, or if no chat fits into `max_seq_len` tokens.
    """
    folder, task = Path(folder), task or CHAT_TOKENS
    target = folder / token_folder_name(tokenizer)
    job = token_inputs(folder, max_seq_len, task)
    if _is_current(target, job):
        return target
    with lock_output(target, wait=True), report_write_errors(target):
        if _is_current(target, job):  # another process has built it while this one waited for the lock
            return target
        staged = temporary_path(target, "tmp")
        remove(staged)
        tokens = TokenFolder(staged, tokenizer, max_seq_len, task)
        try:
            for batch in batch_examples(_read_stored_examples(folder, task)):
                tokens.add(batch)
            tokens.close(job, tokens.report)
            replace_dataset(staged, target)
        finally:
            tokens.abort()
            remove(staged)
    return target


class TokenFolder:
    """Writes a token folder: one ShardWriter per split, and the statistics of the examples.

    With the `state` of an earlier run, the writers resume from it.
    """

    def __init__(
        self, folder: Path, tokenizer: Any, max_seq_len: int, task: TokenTask, state: dict[str, Any] | None = None
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


def _read_stored_examples(folder: Path, task: TokenTask) -> Iterator[tuple[str, Example]]:
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


def token_inputs(folder: Path, max_seq_len: int, task: TokenTask) -> dict[str, Any]:
    """The inputs of a token folder besides the tokenizer; meta.json stores them to detect an outdated folder."""
    return {"max_seq_len": max_seq_len, "source": _fingerprint_rows(folder, task)}


def _fingerprint_rows(folder: Path, task: TokenTask) -> dict[str, str]:
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
