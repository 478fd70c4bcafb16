"""Documents -> pretraining shards on disk.

    text -> ids + <|endoftext|> -> splits train, val_zh, val_en

Each training shard holds one language, and where sources are labelled one source: training can mix them as it likes.
The data set appears under its name only when it is complete. A killed run can be continued: the rows are read again
(fast, and every decision is repeated exactly), but what is already tokenised is not tokenised again.

Writes through shard_writer.py. Read next: examples.py (what is left out and set aside), shard_writer.py (the files),
prepare_chats.py (the same for chats), ../data_process.py (the command).
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from corpus.dataset_meta import FORMAT, write_meta
from corpus.examples import BATCH_CHARACTERS, Item, in_batches, in_splits, text_items
from corpus.job_state import PROGRESS, Progress, behind, inputs_of, unfinished
from corpus.language import LANGUAGES
from corpus.provenance import history_of
from corpus.readers import Path_
from corpus.row_text import READER, RowReader
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

PIECE_CHARACTERS = 50_000  # longer documents are tokenised in pieces, which bounds memory
FILE = "file"  # as a source_key: the file's name is the source
MOST_SOURCES, OTHER = 100, "other"  # each has files of its own; later ones, and texts without any, are put together

Packed = tuple[str, Item, np.ndarray]  # split, document, ids of shape (tokens,)


def tokenise_texts(items: Iterable[tuple[str, Item]], tokenizer: Any, report: DataReport) -> Iterator[list[Packed]]:
    """Batches of (split, item, ids with the closing <|endoftext|>) of all (split, item)."""
    for batch in in_batches(items):
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

    def __init__(self, folder: Path, job: dict[str, Any], dtype: str) -> None:
        self.folder, self.job, self.dtype, self.progress = folder, job, dtype, Progress(folder, job)
        found = self.progress.start()
        self.documents = found.get("documents", 0)  # items that are tokenised and written
        self.sources = found.get("sources", [""])  # "" and then each label; its place is in the names of its shards
        self.report = DataReport()  # of what is tokenised; what is only read is counted again by reading
        if found:
            self.report.merge(found["report"])
        states = found.get("writers", {})
        self.writers = {name: open_writer(folder, name, dtype, state) for name, state in states.items()}

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
                self.writers[name] = open_writer(self.folder, name, self.dtype)
            self.writers[name].add(ids, utf8_bytes=len(item.text.encode()))
        self.documents += len(batch)
        if self.progress.due():
            state = {"documents": self.documents, "sources": self.sources, "report": self.report.to_dict()}
            state["writers"] = {name: writer.state() for name, writer in self.writers.items()}
            self.progress.save(state)

    def abort(self) -> None:
        for writer in self.writers.values():
            writer.abort()

    def close(self) -> dict[str, Any]:
        """The splits' entries of meta.json, train first; each shard of it with its language and source."""
        (self.folder / PROGRESS).unlink(missing_ok=True)
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
    reader: RowReader = READER,
) -> dict[str, Any]:
    """Write the pretraining shards of `paths` to `out_dir` (complete or not at all) and return their meta.json.

    `source_key`: the key of a row that names its source, or "file"; "" where sources do not matter.
    A run that was killed is continued: what its progress file vouches for is not tokenised again. `on_batch` is called
    after every batch. Raises UserError for data or a disk that cannot be used; bad data leaves nothing behind.
    """
    check_replaceable(out_dir)
    check_replaceable(partial_folder(out_dir))
    job = {"inputs": inputs_of(paths), "tokenizer": tokenizer.fingerprint, "val_share": val_share, "format": FORMAT}
    job |= {"source_key": source_key, **reader.job()}
    dtype = token_dtype(tokenizer.vocab_size)
    folder = partial_folder(out_dir)
    with writing(out_dir), unfinished(folder):
        partial = _Partial(folder, job, dtype)
        items = in_splits(text_items(paths, report, source_key, reader), val_share)
        items = behind(partial.documents, items, on_batch)
        try:
            for batch in tokenise_texts(items, tokenizer, partial.report):
                partial.add(batch)
                report.text_bytes = partial.report.text_bytes
                on_batch()
            splits = partial.close()
            require_train(splits, "no document is left to train on: give more data, or a smaller --val_share")
        finally:
            partial.abort()
        report.merge(partial.report.to_dict())
        meta = {"kind": "pretrain", "tokenizer": tokenizer.fingerprint}
        meta |= {"vocab_size": tokenizer.vocab_size, "dtype": dtype, "val_share": val_share}
        meta |= {"history": history_of(paths)}
        meta |= {"splits": splits, "report": report.to_dict()}
        meta = write_meta(folder, meta)
        publish(folder, out_dir)
    return meta
