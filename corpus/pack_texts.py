"""Documents -> pretraining shards on disk.

    text -> ids + <|endoftext|> -> splits train, val_zh, val_en

Each training shard holds one language, and where sources are labelled one source: training can mix them as it likes.
The data set appears under its name only when it is complete. A killed run can be continued: the rows are read again
(fast, and every decision is repeated exactly), but what is already tokenised is not tokenised again.

Writes through shards.py. Read next: items.py (what is left out and set aside), shards.py (the files), pack.py (the same
for chats), ../data_process.py (the command).
"""

import itertools
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from corpus.errors import UserError
from corpus.history import history_of
from corpus.items import Item, split_validation, text_items
from corpus.language import LANGUAGES
from corpus.read import Path_
from corpus.report import DataReport
from corpus.shards import (
    FORMAT,
    ShardWriter,
    check_replaceable,
    open_writer,
    partial_folder,
    publish,
    require_train,
    token_dtype,
    write_json,
    writing,
)
from corpus.sources import check_input

BATCH_ITEMS, BATCH_CHARACTERS = 1000, 500_000  # handed to the tokenizer at once
PIECE_CHARACTERS = 50_000  # longer documents are tokenised in pieces, which bounds memory
CHECKPOINT_SECONDS = 20.0
FILE = "file"  # as a source_key: the file's name is the source
MOST_SOURCES, OTHER = 100, "other"  # each has files of its own; later ones, and texts without any, are put together

Packed = tuple[str, Item, np.ndarray]  # split, document, ids of shape (tokens,)


def tokenise_texts(
    items: Iterable[tuple[bool, Item]], tokenizer: Any, report: DataReport, skip: int = 0
) -> Iterator[list[Packed]]:
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


def _encode(batch: list[tuple[str, Item]], tokenizer: Any, report: DataReport) -> list[Packed]:
    pieces = [list(_pieces(item.text)) for _, item in batch]
    encoded = _encode_pieces((piece for several in pieces for piece in several), tokenizer)
    result = []
    for (split, item), several in zip(batch, pieces, strict=True):
        ids = np.concatenate([next(encoded) for _ in several] + [np.array([tokenizer.eos_id], np.uint32)])
        report.keep(item.language, len(item.text), len(ids), len(item.text.encode()))
        result.append((split, item, ids))
    return result


def _encode_pieces(pieces: Iterable[str], tokenizer: Any) -> Iterator[np.ndarray]:
    """Ids of each piece. An answer of the tokenizer takes a hundred times the memory of its text, so few at a time."""
    waiting: list[str] = []
    characters = 0
    for piece in itertools.chain(pieces, [None]):
        if waiting and (piece is None or characters >= BATCH_CHARACTERS):
            yield from (np.array(ids, np.uint32) for ids in tokenizer.encode_batch(waiting))
            waiting, characters = [], 0
        if piece is not None:
            waiting.append(piece)
            characters += len(piece)


def _pieces(text: str) -> Iterator[str]:
    """Pieces that end with a line. Line ends are tokens of their own, so together they give the ids of the whole."""
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
        self.sources = [""]  # "" and then each label; its place is in the names of its shards
        self.saved = time.perf_counter()
        try:
            progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
            if progress["job"] == job:
                self.sources = progress["sources"]
                for name, state in progress["writers"].items():
                    self._open(name, state)
                self.documents = int(progress["documents"])
                report.restore(progress["report"])
        except (OSError, ValueError, KeyError, TypeError):
            self.abort()
            self.documents, self.writers, self.sources = 0, {}, [""]
        if not self.documents:  # another job's leftovers, or none
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def _open(self, name: str, state: dict[str, Any] | None = None) -> None:
        self.writers[name] = open_writer(self.folder, name, self.dtype, state)

    def _writer_of(self, split: str, item: Item) -> str:
        """The split, for training texts with the language and the number of the source."""
        if split != "train":
            return split
        source = source_label(item, self.job["source_key"])
        if source not in self.sources:
            source = source if len(self.sources) <= MOST_SOURCES else OTHER
            self.sources += [] if source in self.sources else [source]
        return "_".join([split, item.language, *([f"s{self.sources.index(source):02d}"] if source else [])])

    def add(self, batch: list[Packed]) -> None:
        for split, item, ids in batch:
            name = self._writer_of(split, item)
            if name not in self.writers:
                self._open(name)
            self.writers[name].add(ids, utf8_bytes=len(item.text.encode()))
        self.documents += len(batch)
        if time.perf_counter() - self.saved >= CHECKPOINT_SECONDS:
            self.checkpoint()

    def checkpoint(self) -> None:
        writers = {name: writer.state() for name, writer in self.writers.items()}
        progress = {"job": self.job, "documents": self.documents, "report": self.report.counts(), "writers": writers}
        progress["sources"] = self.sources
        write_json(self.folder / "progress.json", progress)
        self.saved = time.perf_counter()

    def abort(self) -> None:
        for writer in self.writers.values():
            writer.abort()

    def close(self) -> dict[str, Any]:
        """The splits' entries of meta.json, train first; each shard of it with its language and source."""
        (self.folder / "progress.json").unlink(missing_ok=True)
        closed = {name: writer.close() for name, writer in sorted(self.writers.items())}
        splits = {f"val_{language}": closed.pop(f"val_{language}", None) for language in LANGUAGES}
        train: dict[str, Any] = {"shards": [], "tokens": 0, "documents": 0, "bytes": 0}
        for name, entry in closed.items():
            _, language, *number = name.split("_")
            label = {"language": language, "source": self.sources[int(number[0][1:])] if number else ""}
            train["shards"] += [{**shard, **label} for shard in entry["shards"]]
            for total in ("tokens", "documents", "bytes"):
                train[total] += entry[total]
        splits = {"train": train if closed else None, **splits}
        return {split: entry for split, entry in splits.items() if entry}


def source_label(item: Item, source_key: str) -> str:
    """The source of a text: "" where none is wanted, else what its row says (or its file's name), fit for --mix."""
    if not source_key:
        return ""
    name = Path(item.file).name.split(".")[0] if source_key == FILE else item.source
    return re.sub(r"[^\w./+-]+", "_", name).strip("_")[:60] or OTHER


def pack_texts(
    paths: list[Path_],
    tokenizer: Any,
    out_dir: Path_,
    val_share: float,
    report: DataReport,
    on_batch: Callable[[], None],
    source_key: str = "",
) -> dict[str, Any]:
    """Write the pretraining shards of `paths` to `out_dir` (complete or not at all) and return their meta.json.

    `source_key`: the key of a row that names its source, or "file"; "" where sources do not matter.
    A run that was killed is continued: what its progress file vouches for is not tokenised again. `on_batch` is called
    after every batch. Raises UserError for data or a disk that cannot be used; bad data leaves nothing behind.
    """
    check_replaceable(out_dir)
    check_replaceable(partial_folder(out_dir))
    job = {"inputs": _inputs(paths), "tokenizer": tokenizer.fingerprint, "val_share": val_share, "format": FORMAT}
    job["source_key"] = source_key
    dtype = token_dtype(tokenizer.vocab_size)
    with writing(out_dir):
        partial = _Partial(partial_folder(out_dir), job, dtype, report)
        items = split_validation(text_items(paths, report, source_key), val_share)
        try:
            for batch in tokenise_texts(items, tokenizer, report, skip=partial.documents):
                partial.add(batch)
                on_batch()
            splits = partial.close()
            require_train(splits, "no document is left to train on: give more data, or a smaller --val_share")
        except UserError:
            partial.abort()
            shutil.rmtree(partial.folder, ignore_errors=True)
            raise
        finally:
            partial.abort()
        meta = {"format": FORMAT, "kind": "pretrain", "tokenizer": tokenizer.fingerprint}
        meta |= {"vocab_size": tokenizer.vocab_size, "dtype": dtype, "val_share": val_share}
        meta |= {"history": history_of(paths)}
        meta |= {"splits": splits, "report": report.to_dict()}
        write_json(partial.folder / "meta.json", meta)
        publish(partial.folder, out_dir)
    return meta


def _inputs(paths: list[Path_]) -> list[list[Any]]:
    for path in paths:
        check_input(path)
    found = [(Path(path).resolve(), Path(path).stat()) for path in paths]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in found]
