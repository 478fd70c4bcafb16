"""Documents and chats -> data sets on disk, everything tokenised once.

    text   -> ids + <|endoftext|>          -> shards with the splits train, val_zh, val_en
    chats  -> train.jsonl, val.jsonl       -> the same shards with masks, one folder for each tokenizer

Both appear under their name only when they are complete. Text can be continued after a kill: the rows are read again
(fast, and every decision is repeated exactly), what is already tokenised is not tokenised again.

Writes through shards.py. Read next: items.py (what is left out and set aside), shards.py (the files),
../data_process.py (the command).
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from corpus.chats import chat_text
from corpus.errors import UserError
from corpus.items import Item, chat_items, split_validation, text_items
from corpus.language import LANGUAGES
from corpus.read import Path_
from corpus.report import DataReport
from corpus.shards import (
    FORMAT,
    ShardWriter,
    check_replaceable,
    partial_folder,
    publish,
    read_meta,
    token_dtype,
    write_json,
    writing,
)
from corpus.sources import check_input

BATCH_ITEMS, BATCH_CHARACTERS = 1000, 2_000_000  # handed to the tokenizer at once
PIECE_CHARACTERS = 100_000  # longer documents are tokenised in pieces, which bounds memory
CHECKPOINT_SECONDS = 20.0

Progress = Callable[[], None]


# ---- plain text ------------------------------------------------------------------------------------------------------
def tokenise_texts(
    items: Iterable[tuple[bool, Item]], tokenizer: Any, report: DataReport, skip: int = 0
) -> Iterator[list[tuple[str, Item, list[int]]]]:
    """Batches of (split, item, ids with the closing <|endoftext|>); the first `skip` items are only read."""
    batch: list[tuple[str, Item]] = []
    characters = 0
    for number, (is_validation, item) in enumerate(items):
        if number < skip:
            continue
        batch.append((f"val_{item.language}" if is_validation else "train", item))
        characters += len(item.text)
        if len(batch) >= BATCH_ITEMS or characters >= BATCH_CHARACTERS:
            yield _encode(batch, tokenizer, report)
            batch, characters = [], 0
    if batch:
        yield _encode(batch, tokenizer, report)


def _encode(batch: list[tuple[str, Item]], tokenizer: Any, report: DataReport) -> list[tuple[str, Item, list[int]]]:
    pieces = [list(_pieces(item.text)) for _, item in batch]
    encoded = iter(tokenizer.encode_batch([piece for several in pieces for piece in several]))
    result = []
    for (split, item), several in zip(batch, pieces, strict=True):
        ids = [i for _ in several for i in next(encoded)] + [tokenizer.eos_id]
        report.keep(item.language, len(item.text), len(ids), len(item.text.encode()))
        result.append((split, item, ids))
    return result


def _pieces(text: str) -> Iterator[str]:
    """Long text in pieces that end with a line: line ends are tokens of their own, so the ids are those of the whole."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        stop = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1
        stop = stop if stop > start else start + PIECE_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]


class _Partial:
    """The unfinished data set in `<out_dir>.partial`: one writer a split, and a progress file to continue from."""

    def __init__(self, folder: Path, job: dict[str, Any], dtype: str, report: DataReport) -> None:
        self.folder, self.job, self.dtype, self.report = folder, job, dtype, report
        self.documents = 0  # items that are tokenised and written
        self.writers: dict[str, ShardWriter] = {}
        self.saved = time.perf_counter()
        try:
            progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
            if progress["job"] == job:
                for split, state in progress["writers"].items():
                    self._open(split, state)
                self.documents = int(progress["documents"])
                report.restore(progress["report"])
        except (OSError, ValueError, KeyError, TypeError):
            self.documents, self.writers = 0, {}
        if not self.documents:  # another job's leftovers, or none
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def _open(self, split: str, state: dict[str, Any] | None = None) -> None:
        shard_tokens = 100_000_000 if split == "train" else 0
        self.writers[split] = ShardWriter(self.folder, split, self.dtype, shard_tokens, state)

    def add(self, batch: list[tuple[str, Item, list[int]]]) -> None:
        for split, item, ids in batch:
            if split not in self.writers:
                self._open(split)
            self.writers[split].add(ids, utf8_bytes=len(item.text.encode()))
        self.documents += len(batch)
        if time.perf_counter() - self.saved >= CHECKPOINT_SECONDS:
            self.checkpoint()

    def checkpoint(self) -> None:
        writers = {split: writer.state() for split, writer in self.writers.items()}
        progress = {"job": self.job, "documents": self.documents, "report": self.report.counts(), "writers": writers}
        write_json(self.folder / "progress.json", progress)
        self.saved = time.perf_counter()

    def close(self) -> dict[str, Any]:
        order = ("train", *(f"val_{language}" for language in LANGUAGES))
        (self.folder / "progress.json").unlink(missing_ok=True)
        return {split: self.writers[split].close() for split in order if split in self.writers}


def pack_texts(
    paths: list[Path_], tokenizer: Any, out_dir: Path_, val_share: float, report: DataReport, on_batch: Progress
) -> dict[str, Any]:
    """Write the pretraining shards of `paths` to `out_dir` (complete or not at all) and return their meta.json.

    A run that was killed is continued: what its progress file vouches for is not tokenised again. `on_batch` is called
    after every batch. Raises UserError for data or a disk that cannot be used; bad data leaves nothing behind.
    """
    _check_folders(out_dir)
    job = {"inputs": _inputs(paths), "tokenizer": tokenizer.fingerprint, "val_share": val_share, "format": FORMAT}
    dtype = token_dtype(tokenizer.vocab_size)
    with writing(out_dir):
        partial = _Partial(partial_folder(out_dir), job, dtype, report)
        items = split_validation(text_items(paths, report), val_share)
        try:
            for batch in tokenise_texts(items, tokenizer, report, skip=partial.documents):
                partial.add(batch)
                on_batch()
            splits = partial.close()
            _require(splits, "no document is left to train on")
        except UserError:
            shutil.rmtree(partial.folder, ignore_errors=True)
            raise
        meta = {"format": FORMAT, "kind": "pretrain", "tokenizer": tokenizer.fingerprint}
        meta |= {"vocab_size": tokenizer.vocab_size, "dtype": dtype, "val_share": val_share}
        meta |= {"splits": splits, "report": report.to_dict()}
        write_json(partial.folder / "meta.json", meta)
        publish(partial.folder, out_dir)
    return meta


def _check_folders(out_dir: Path_) -> None:
    """Raises UserError when files would be lost that are not ours."""
    check_replaceable(out_dir)
    check_replaceable(partial_folder(out_dir))


def _inputs(paths: list[Path_]) -> list[list[Any]]:
    for path in paths:
        check_input(path)
    found = [(Path(path).resolve(), Path(path).stat()) for path in paths]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in found]


def _require(splits: dict[str, Any], what: str) -> None:
    if "train" not in splits:
        raise UserError(f"{what}: give more data, or a smaller --val_share")


# ---- chats -----------------------------------------------------------------------------------------------------------
def pack_chats(
    paths: list[Path_],
    tokenizer: Any,
    out_dir: Path_,
    max_seq_len: int,
    val_share: float,
    report: DataReport,
    on_batch: Progress,
) -> dict[str, Any]:
    """Write train.jsonl, val.jsonl and the token folder of the chats in `paths` to `out_dir`, complete or not at all.

    Returns the token folder's meta.json; raises as `pack_texts`.
    """
    _check_folders(out_dir)
    partial = partial_folder(out_dir)
    with writing(out_dir):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            rows = {True: 0, False: 0}
            with (
                (partial / "train.jsonl").open("w", encoding="utf-8", newline="\n") as train,
                (partial / "val.jsonl").open("w", encoding="utf-8", newline="\n") as val,
            ):
                for is_validation, item in split_validation(chat_items(paths, report), val_share):
                    row = {"messages": item.messages, "lang": item.language}
                    (val if is_validation else train).write(json.dumps(row, ensure_ascii=False) + "\n")
                    rows[is_validation] += 1
                    if sum(rows.values()) % BATCH_ITEMS == 0:
                        on_batch()
            tokens = tokenise_chats(partial, tokenizer, max_seq_len, report, on_batch)
            meta = {"format": FORMAT, "kind": "messages", "rows": {"train": rows[False], "val": rows[True]}}
            meta |= {"tokens": tokens.name, "val_share": val_share, "report": report.to_dict()}
            write_json(partial / "meta.json", meta)
            publish(partial, out_dir)
        finally:  # a moment's work for chats, so a run that ended early starts anew
            shutil.rmtree(partial, ignore_errors=True)
    return read_meta(Path(out_dir) / tokens.name)


def tokenise_chats(
    folder: Path_, tokenizer: Any, max_seq_len: int, report: DataReport | None = None, on_batch: Progress | None = None
) -> Path:
    """The token folder of `folder`'s train.jsonl and val.jsonl for this tokenizer and length; built unless it is there.

    `tokenizer` needs .render, .fingerprint and .vocab_size. Returns `folder/tokens-<fingerprint>`, in the format of
    shards.py with masks. Raises UserError when the jsonl files are missing or no chat fits into `max_seq_len` tokens.
    """
    folder = Path(folder)
    target = folder / f"tokens-{tokenizer.fingerprint}"
    job = {"max_seq_len": max_seq_len, "source": _fingerprint_source(folder)}
    if _is_current(target, job):
        return target
    report = report or DataReport()
    partial = folder / f"{target.name}.partial-{os.getpid()}"  # processes that start together must not share it
    dtype = token_dtype(tokenizer.vocab_size)
    with writing(partial):
        try:
            partial.mkdir()
            writers: dict[str, ShardWriter] = {}
            for number, (split, item) in enumerate(_stored_chats(folder), start=1):
                rendered = render_chat(item, tokenizer, max_seq_len, report)
                if rendered is not None:
                    ids, mask, answer_bytes = rendered
                    if split not in writers:
                        writers[split] = ShardWriter(partial, split, dtype, 100_000_000 if split == "train" else 0)
                    writers[split].add(ids, mask, answer_bytes)
                if on_batch and number % BATCH_ITEMS == 0:
                    on_batch()
            _require(writers, f"no chat fits into {max_seq_len} tokens")
            splits = {split: writers[split].close() for split in sorted(writers)}
            meta = {"format": FORMAT, "kind": "chats", "tokenizer": tokenizer.fingerprint, **job}
            meta |= {"vocab_size": tokenizer.vocab_size, "dtype": dtype, "splits": splits, "report": report.to_dict()}
            write_json(partial / "meta.json", meta)
            try:
                publish(partial, target)
            except OSError:  # another process was faster
                if not _is_current(target, job):
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def render_chat(
    item: Item, tokenizer: Any, max_seq_len: int, report: DataReport
) -> tuple[list[int], list[int], int] | None:
    """(ids, mask, UTF-8 bytes of the answers) of as many whole first turns as fit; None when not even one does.

    A turn is never cut inside: half an answer would teach to stop in the middle of a sentence.
    """
    messages = item.messages
    ids, mask = tokenizer.render(messages)
    while len(ids) > max_seq_len:
        # Each run of trained tokens is one answer; no turn whose answer ends beyond the limit can stay.
        ends = [i + 1 for i, trained in enumerate(mask) if trained and not (i + 1 < len(mask) and mask[i + 1])]
        turns = min(sum(end <= max_seq_len for end in ends), len(ends) - 1)
        if turns == 0:
            report.drop(f"first turn longer than {max_seq_len} tokens", item.file, item.line)
            return None
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        messages = messages[: answers[turns - 1] + 1]
        ids, mask = tokenizer.render(messages)
    trained_tokens = sum(mask)
    if not trained_tokens:
        report.drop("no trained token", item.file, item.line)
        return None
    if len(messages) < len(item.messages):
        report.shorten(f"cut at a whole turn to {max_seq_len} tokens", item.file, item.line)
    text = item.text if messages is item.messages else chat_text(messages)
    report.keep(item.language, len(text), len(ids), len(text.encode()), trained_tokens)
    answer_bytes = sum(len(message["content"].encode()) for message in messages if message["role"] == "assistant")
    return ids, mask, answer_bytes


def _stored_chats(folder: Path) -> Iterator[tuple[str, Item]]:
    """(split, chat) of our own train.jsonl and val.jsonl."""
    for name in ("train", "val"):
        path = folder / f"{name}.jsonl"
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line)
                    messages, language = row["messages"], row["lang"]
                    item = Item(chat_text(messages), messages, language, 0, path.name, number)
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"{path}:{number}: not a row of ours: run data_process.py sft again") from None
                yield ("train" if name == "train" else f"val_{language}"), item


def _fingerprint_source(folder: Path) -> dict[str, str]:
    """Names the content of the jsonl files by size, first and last megabyte: quick to check at every start."""
    result = {}
    for name in ("train.jsonl", "val.jsonl"):
        path = folder / name
        if not path.is_file():
            raise UserError(f"no chats in {folder} ({name} is missing): run `python data_process.py sft FILES…` first")
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
