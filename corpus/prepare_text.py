"""Documents -> pretraining shards on disk.

    text -> ids + <|endoftext|> -> splits train, val_zh, val_en

A training shard holds one language and, with a source key, one source, so that a training run can mix them by weight.
The dataset is written to a staging folder, which is renamed when it is complete. A killed run resumes: it reads the
rows again (fast, and every decision is repeated exactly), but does not tokenise again what is on disk.

Read next: examples.py (duplicates and validation split), shard_writer.py (file format), prepare_chats.py (the same for
chats), ../data_process.py (the command).
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from corpus.dataset_meta import DATA_FORMAT, write_meta
from corpus.examples import BATCH_CHARACTERS, Example, assign_splits, batch_examples
from corpus.job_state import PROGRESS_FILE, JobProgress, input_fingerprints, keep_if_resumable, skip_done
from corpus.language import LANGUAGES
from corpus.provenance import read_provenance
from corpus.read_examples import read_text_examples
from corpus.readers import PathLike
from corpus.row_text import DEFAULT_READER, RowReader
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

CHUNK_CHARACTERS = 50_000  # longer documents are tokenised in chunks, which bounds memory
FILE_AS_SOURCE = "file"  # a source_key: the file name is the source
MAX_SOURCES = 100  # sources with shards of their own; further sources and texts without a source use OTHER_SOURCE
OTHER_SOURCE = "other"

TokenizedText = tuple[str, Example, np.ndarray]  # split, document, ids of shape (tokens,)


def tokenize_texts(
    examples: Iterable[tuple[str, Example]], tokenizer: Any, report: DataStats
) -> Iterator[list[TokenizedText]]:
    """Yield batches of (split, example, ids); the ids, shape (tokens,), end with <|endoftext|>."""
    for batch in batch_examples(examples):
        yield _encode_batch(batch, tokenizer, report)


def _encode_batch(batch: list[tuple[str, Example]], tokenizer: Any, report: DataStats) -> list[TokenizedText]:
    chunks = [list(_split_chunks(example.text)) for _, example in batch]
    encoded = _encode_chunks((chunk for document_chunks in chunks for chunk in document_chunks), tokenizer)
    result = []
    for (split, example), document_chunks in zip(batch, chunks, strict=True):
        ids = np.concatenate([next(encoded) for _ in document_chunks] + [np.array([tokenizer.eos_id], np.uint32)])
        report.row_kept(example.language, len(example.text), len(ids), len(example.text.encode()))
        result.append((split, example, ids))
    return result


def _encode_chunks(chunks: Iterable[str], tokenizer: Any) -> Iterator[np.ndarray]:
    """Yield the ids of each chunk. Encodings take about 100 times the memory of the text, so batches are small."""
    pending: list[str] = []
    characters = 0
    for chunk in itertools.chain(chunks, [None]):
        if pending and (chunk is None or characters >= BATCH_CHARACTERS):
            yield from (np.array(ids, np.uint32) for ids in tokenizer.encode_batch(pending))
            pending, characters = [], 0
        if chunk is not None:
            pending.append(chunk)
            characters += len(chunk)


def _split_chunks(text: str) -> Iterator[str]:
    """Split at line ends. A line end is a separate token, so the chunks' ids together are the ids of the text."""
    start = 0
    while len(text) - start > CHUNK_CHARACTERS:
        stop = text.rfind("\n", start, start + CHUNK_CHARACTERS) + 1
        stop = stop if stop > start else start + CHUNK_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]


class _StagedDataset:
    """The incomplete dataset in `<out_dir>.partial`: one writer per split and label, and the progress file."""

    def __init__(self, folder: Path, job: dict[str, Any], dtype: str) -> None:
        self.folder, self.job, self.dtype, self.progress = folder, job, dtype, JobProgress(folder, job)
        saved = self.progress.load_or_reset()
        self.documents = saved.get("documents", 0)  # documents that are tokenised and written
        self.sources = saved.get("sources", [""])  # "" and every source; the index is part of the shard names
        self.report = DataStats()  # of tokenised documents; a resumed run counts the rows again while reading
        if saved:
            self.report.merge(saved["report"])
        states = saved.get("writers", {})
        self.writers = {name: open_shard_writer(folder, name, dtype, state) for name, state in states.items()}

    def _writer_name(self, split: str, example: Example) -> str:
        """The split; for training texts also the language and the index of the source: train_zh_s01."""
        if split != "train":
            return split
        source = source_label(example, self.job["source_key"])
        if source not in self.sources:
            source = source if len(self.sources) <= MAX_SOURCES else OTHER_SOURCE
            self.sources += [] if source in self.sources else [source]
        return "_".join([split, example.language, *([f"s{self.sources.index(source):02d}"] if source else [])])

    def add(self, batch: list[TokenizedText]) -> None:
        """Write a batch; save the progress if it is due."""
        for split, example, ids in batch:
            name = self._writer_name(split, example)
            if name not in self.writers:
                self.writers[name] = open_shard_writer(self.folder, name, self.dtype)
            self.writers[name].add(ids, utf8_bytes=len(example.text.encode()))
        self.documents += len(batch)
        if self.progress.is_due():
            state = {"documents": self.documents, "sources": self.sources, "report": self.report.to_dict()}
            state["writers"] = {name: writer.state() for name, writer in self.writers.items()}
            self.progress.save(state)

    def abort(self) -> None:
        """Close the files without finishing them."""
        for writer in self.writers.values():
            writer.abort()

    def close(self) -> dict[str, Any]:
        """Finish the files; return the splits of meta.json, train first. Train shards have language and source."""
        (self.folder / PROGRESS_FILE).unlink(missing_ok=True)
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


def source_label(example: Example, source_key: str) -> str:
    """The source of a text, from its row or file name, in characters that --mix accepts; "" without a source key."""
    if not source_key:
        return ""
    name = Path(example.file).name.split(".")[0] if source_key == FILE_AS_SOURCE else example.source
    return re.sub(r"[^\w./+-]+", "_", name).strip("_")[:60] or OTHER_SOURCE


def prepare_text_data(
    paths: list[PathLike],
    tokenizer: Any,
    out_dir: PathLike,
    val_share: float,
    report: DataStats,
    on_batch: Callable[[], None],
    source_key: str = "",
    reader: RowReader = DEFAULT_READER,
) -> dict[str, Any]:
    """Write the pretraining shards of `paths` to `out_dir` and return their meta.json.

    `out_dir` is replaced only when the dataset is complete; a killed run resumes. `source_key`: the row key that holds
    the source, "file" for the file name, or "" for no sources. `on_batch` is called after every batch.
    Raises UserError for unusable data or a disk that cannot be written; bad data leaves nothing behind.
    """
    check_replaceable(out_dir)
    check_replaceable(dataset_staging_folder(out_dir))
    job = {
        "inputs": input_fingerprints(paths),
        "tokenizer": tokenizer.fingerprint,
        "val_share": val_share,
        "format": DATA_FORMAT,
    }
    job |= {"source_key": source_key, **reader.key_settings()}
    dtype = token_dtype(tokenizer.vocab_size)
    folder = dataset_staging_folder(out_dir)
    with report_write_errors(out_dir), keep_if_resumable(folder):
        staged = _StagedDataset(folder, job, dtype)
        examples = assign_splits(read_text_examples(paths, report, source_key, reader), val_share)
        examples = skip_done(staged.documents, examples, on_batch)
        try:
            for batch in tokenize_texts(examples, tokenizer, staged.report):
                staged.add(batch)
                report.text_bytes = staged.report.text_bytes
                on_batch()
            splits = staged.close()
            require_train_split(splits, "no document is left to train on: give more data, or a smaller --val_share")
        finally:
            staged.abort()
        report.merge(staged.report.to_dict())
        meta = {"kind": "pretrain", "tokenizer": tokenizer.fingerprint}
        meta |= {"vocab_size": tokenizer.vocab_size, "dtype": dtype, "val_share": val_share}
        meta |= {"history": read_provenance(paths)}
        meta |= {"splits": splits, "report": report.to_dict()}
        meta = write_meta(folder, meta)
        replace_dataset(folder, out_dir)
    return meta
