"""Chats -> SFT data on disk: rendered and tokenised once, with the mask of trained tokens. Pairs go the same way.

    chats -> train.jsonl, val.jsonl                           cleaned, whole, whatever the tokenizer
          -> tokens-<tokenizer>/  train, val_zh, val_en       what tokenizer.render makes of them, cut at whole turns

What pairs of answers do in their own way is a `Form`, see preferences.py.

The jsonl files are the source of truth: `tokenise_chats` builds the token folder again for another tokenizer or length.
Everything appears under its name only when it is complete. A killed `pack_chats` goes on where it was: the rows are
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

from common.errors import ANOTHER_FORMAT, UserError
from common.files import remove, temporary_name
from common.locks import locked
from corpus.block_checksums import SummedFile
from corpus.chats import chat_text
from corpus.dataset_meta import FORMAT, read_checked_meta, read_meta, say_without_checksums, write_meta
from corpus.examples import Item, chat_items, in_batches, in_splits
from corpus.job_state import PROGRESS, Progress, behind, inputs_of, unfinished
from corpus.language import LANGUAGES
from corpus.provenance import history_of
from corpus.readers import Path_
from corpus.render_chats import Document, render_chats
from corpus.shard_writer import (
    check_replaceable,
    open_writer,
    partial_folder,
    publish,
    require_train,
    token_dtype,
    writing,
)
from corpus.stats import DataReport

Batch = list[tuple[str, Item]]  # each with its split
ROWS_FILES = ("train.jsonl", "val.jsonl")
REFUSALS = ("the model's chat template ", "the chat format ")  # beginnings of the reasons of unwritable chats


@dataclass(frozen=True)
class Form:
    """What chats and pairs of answers do each in their own way between a file and the token folder."""

    kind: str  # of the token folder
    command: str  # of data_process.py
    fields: tuple[str, ...]  # of a stored row: what of an item stands in `messages`, then its answers
    items: Callable[[Iterable[Path_], DataReport], Iterator[Item]]
    render: Callable[[list[Item], Any, int, DataReport], list[list[Document]]]  # of an item that does not fit: none
    choice: dict[str, Any] = field(default_factory=dict)  # what `items` depends on besides the files

    def row(self, item: Item) -> bytes:
        """The line of an item in train.jsonl or val.jsonl."""
        row = dict(zip(self.fields, (item.messages, *item.answers), strict=True)) | {"lang": item.language}
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def pack_chats(
    paths: list[Path_],
    tokenizer: Any,
    out_dir: Path_,
    max_seq_len: int,
    val_share: float,
    report: DataReport,
    on_batch: Callable[[], None],
    form: Form,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write train.jsonl, val.jsonl and the token folder of the chats in `paths` to `out_dir`, complete or not at all.

    `about`: what else meta.json should remember. A run that was killed is continued, as by `pack_texts`.
    Returns the token folder's meta.json; raises as `pack_texts`.
    """
    check_replaceable(out_dir)
    check_replaceable(partial_folder(out_dir))
    job = {"inputs": inputs_of(paths), "kind": form.kind, "choice": form.choice, "val_share": val_share}
    job |= {"tokenizer": tokenizer.chat_fingerprint, "max_seq_len": max_seq_len, "format": FORMAT}
    folder = partial_folder(out_dir)
    with writing(out_dir), unfinished(folder):
        partial = _Partial(Progress(folder, job), tokenizer, max_seq_len, form)
        try:
            for batch in in_batches(behind(partial.items, in_splits(form.items(paths, report), val_share), on_batch)):
                partial.add(batch)
                report.text_bytes = partial.tokens.report.text_bytes
                on_batch()
            report.merge(partial.tokens.report.to_dict())
            partial.close(report)
        finally:
            partial.abort()
        meta = {"kind": "messages", "rows": partial.rows, "checksums": partial.checksums()}
        meta |= {"tokens": partial.tokens.folder.name, "val_share": val_share, "report": report.to_dict()}
        meta |= {"history": history_of(paths), **(about or {})}
        write_meta(folder, meta)
        publish(folder, out_dir)
    return read_meta(Path(out_dir) / partial.tokens.folder.name)


class _Partial:
    """The unfinished data set in `<out_dir>.partial`, continued from where its progress file vouches for it."""

    def __init__(self, progress: Progress, tokenizer: Any, max_seq_len: int, form: Form) -> None:
        self.progress, self.form = progress, form
        found = progress.start()
        self.items = found.get("items", 0)  # written and tokenised
        self.rows = found.get("rows", {"train": 0, "val": 0})
        sums = found.get("checksums", {})
        self.files = {name: SummedFile(progress.folder / name, *sums.get(name, [])) for name in ROWS_FILES}
        self.tokens = _Tokens(
            progress.folder / token_folder_name(tokenizer), tokenizer, max_seq_len, form, found.get("tokens")
        )

    def add(self, batch: Batch) -> None:
        for split, item in batch:
            name = split.partition("_")[0]  # both languages of a validation split share a file
            self.files[f"{name}.jsonl"].write(self.form.row(item))
            self.rows[name] += 1
        self.tokens.add(batch)
        self.items += len(batch)
        if self.progress.due():
            state = {"items": self.items, "rows": self.rows, "tokens": self.tokens.state()}
            state["checksums"] = self.checksums()
            self.progress.save(state, *self.files.values())

    def checksums(self) -> dict[str, list[Any]]:
        """[bytes, CRC-32] of train.jsonl and val.jsonl, as far as they are written."""
        return {name: [file.size, file.whole] for name, file in self.files.items()}

    def close(self, report: DataReport) -> None:
        """From here on it is seconds to the end, and a run that is killed in them starts anew."""
        (self.progress.folder / PROGRESS).unlink(missing_ok=True)
        for file in self.files.values():
            file.close()
        self.tokens.close(_token_job(self.progress.folder, self.tokens.max_seq_len, self.form), report)

    def abort(self) -> None:
        self.tokens.abort()
        for file in self.files.values():
            with contextlib.suppress(OSError):
                file.close()


def token_folder_name(tokenizer: Any) -> str:
    return f"tokens-{tokenizer.chat_fingerprint}"


def tokenise_chats(folder: Path_, tokenizer: Any, max_seq_len: int, form: Form | None = None) -> Path:
    """The token folder of `folder`'s train.jsonl and val.jsonl for this tokenizer and length; built unless it is there.

    `tokenizer` needs .render_each, .chat_fingerprint and .vocab_size. Returns
    `folder/tokens-<chat_fingerprint>`, in the format of shard_writer.py with masks. Raises UserError when the jsonl
    files are missing or no chat fits into `max_seq_len` tokens.
    """
    folder, form = Path(folder), form or CHATS
    target = folder / token_folder_name(tokenizer)
    job = _token_job(folder, max_seq_len, form)
    if _is_current(target, job):
        return target
    with locked(target, wait=True), writing(target):
        if _is_current(target, job):  # another process has made it meanwhile
            return target
        partial = temporary_name(target, "tmp")
        remove(partial)
        tokens = _Tokens(partial, tokenizer, max_seq_len, form)
        try:
            for batch in in_batches(_stored_items(folder, form)):
                tokens.add(batch)
            tokens.close(job, tokens.report)
            publish(partial, target)
        finally:
            tokens.abort()
            remove(partial)
    return target


class _Tokens:
    """A growing token folder: one writer a split, and a report of what became of the items.

    `state` of an earlier one continues its files where that state was taken.
    """

    def __init__(
        self, folder: Path, tokenizer: Any, max_seq_len: int, form: Form, state: dict[str, Any] | None = None
    ) -> None:
        self.folder, self.tokenizer, self.max_seq_len, self.form = folder, tokenizer, max_seq_len, form
        self.dtype, self.report = token_dtype(tokenizer.vocab_size), DataReport()
        folder.mkdir(exist_ok=True)
        states = state["writers"] if state else {}
        self.writers = {split: open_writer(folder, split, self.dtype, writer) for split, writer in states.items()}
        if state:
            self.report.merge(state["report"])

    def add(self, batch: Batch) -> None:
        rendered = self.form.render([item for _, item in batch], self.tokenizer, self.max_seq_len, self.report)
        for (split, _), documents in zip(batch, rendered, strict=True):
            for ids, mask, answer_bytes in documents:
                if split not in self.writers:
                    self.writers[split] = open_writer(self.folder, split, self.dtype)
                self.writers[split].add(ids, mask, answer_bytes)

    def state(self) -> dict[str, Any]:
        writers = {split: writer.state() for split, writer in self.writers.items()}
        return {"writers": writers, "report": self.report.to_dict()}

    def close(self, job: dict[str, Any], report: DataReport) -> None:
        """Finish the files and write meta.json; raises UserError when there is nothing to train on."""
        require_train(self.writers, _nothing_left(self.form.kind.removesuffix("s"), report))
        splits = {split: self.writers[split].close() for split in sorted(self.writers)}
        meta = {"kind": self.form.kind, "tokenizer": self.tokenizer.chat_fingerprint, **job}
        meta |= {"vocab_size": self.tokenizer.vocab_size, "dtype": self.dtype, "splits": splits}
        write_meta(self.folder, meta | {"report": report.to_dict()})

    def abort(self) -> None:
        for writer in self.writers.values():
            writer.abort()


def _nothing_left(what: str, report: DataReport) -> str:
    """Why there is nothing to train on, from the counts of what was left out, and what to do."""
    reasons = sorted(report.dropped.items(), key=lambda reason: -reason[1].count)[:3]
    why = ", ".join(f"{reason.count:,} x {name}" for name, reason in reasons)
    if report.kept:
        return (
            f"no {what} is left to train on: all {report.kept:,} are held out: give a smaller --val_share or more data"
        )
    if reasons and reasons[0][0].startswith(REFUSALS):
        return f"no {what} can be written: {why}; {ANOTHER_FORMAT}"
    remedy = "a larger --max_seq_len, or " if reasons and reasons[0][0].endswith(" tokens") else ""
    return f"no {what} is left to train on: {why or 'there is none'}: give {remedy}more data"


CHATS = Form("chats", "sft", ("messages",), chat_items, render_chats)


def _stored_items(folder: Path, form: Form) -> Iterator[tuple[str, Item]]:
    """(split, item) of our own train.jsonl and val.jsonl. Raises UserError when one differs from its checksum."""
    meta = read_checked_meta(folder)
    if meta and meta["format"] != FORMAT:
        say_without_checksums(folder)
    for name in ("train", "val"):
        path, whole = folder / f"{name}.jsonl", 0
        size, expected = (meta or {}).get("checksums", {}).get(path.name, [-1, ""])
        edited = path.stat().st_size > size
        if edited and expected:
            print(f"note: {path} has grown since data_process.py wrote it: its checksum is not compared")
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                whole = zlib.crc32(line, whole)
                try:
                    row = json.loads(line.decode())
                    (messages, *answers), language = (row[field] for field in form.fields), row["lang"]
                    text = chat_text([*messages, *itertools.chain(*answers)])
                    item = Item(text, messages, language, 0, path.name, number, tuple(answers))
                    if language not in LANGUAGES:  # it becomes a part of a file's name
                        raise ValueError(language)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    command = f"data_process.py {form.command}"
                    raise UserError(f"{path}:{number}: not a row of ours: run {command} again") from None
                yield ("train" if name == "train" else f"val_{language}"), item
        if not edited and f"{whole:08x}" != expected:
            raise UserError(
                f"{path} is damaged (it differs from its checksum in meta.json): run `python data_process.py "
                f"{form.command} FILES…` again, also over rows that were edited by hand"
            )


def _token_job(folder: Path, max_seq_len: int, form: Form) -> dict[str, Any]:
    """What a token folder depends on, besides its tokenizer."""
    return {"max_seq_len": max_seq_len, "source": _fingerprint_source(folder, form)}


def _fingerprint_source(folder: Path, form: Form) -> dict[str, str]:
    """Names the content of the jsonl files by size, first and last megabyte: quick to check at every start."""
    result = {}
    for name in ROWS_FILES:
        path = folder / name
        if not path.is_file():
            command = f"python data_process.py {form.command} FILES…"
            raise UserError(f"no {form.kind} in {folder} ({name} is missing): run `{command}` first")
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
