"""Documents -> pretraining shards on disk.

    text -> ids + <|endoftext|> -> splits train, val_zh, val_en

A training shard holds one language and, with a source key, one source, so that a training run can mix them by weight.

Read next: examples.py (rows -> documents), validation_split.py, dataset_writer.py (staging and resume), shard_writer.py
(file format), prepare_chats.py (the same for chats), ../data_process.py (the command).
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from common.errors import UserError
from corpus.data_config import PretrainDataConfig
from corpus.dataset_meta import DATA_FORMAT
from corpus.dataset_writer import DatasetWriter
from corpus.examples import TextExample, next_batch
from corpus.job_state import input_fingerprints
from corpus.language import LANGUAGES
from corpus.provenance import read_provenance
from corpus.stats import DataStats
from corpus.validation_split import Assigned, ValidationSplit
from model.tokenizer import ChatTokenizer

CHUNK_CHARACTERS = 50_000  # longer documents are tokenized in chunks, which bounds memory
MAX_SOURCES = 100  # sources with shards of their own; further sources and texts without a source use OTHER_SOURCE
OTHER_SOURCE = "other"


def prepare_text(
    config: PretrainDataConfig, tokenizer: ChatTokenizer, stats: DataStats, on_batch: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Write the pretraining shards of `config.files` to `config.out_dir`; returns their meta.json.

    `on_batch` is called after every batch. Raises UserError for unusable data or a disk that cannot be written.
    """
    job: dict[str, Any] = {"inputs": input_fingerprints(config.files), "tokenizer": tokenizer.fingerprint}
    job |= {"val_share": config.val_fraction, "format": DATA_FORMAT}
    job |= {"source_key": config.source_key, **config.reader.key_settings()}
    with TextWriter(config, job, tokenizer) as writer:
        split, examples = ValidationSplit(config.val_fraction), config.read_examples(stats)
        while documents := next_batch(examples):
            writer.add(split.assign(documents))
            stats.text_bytes = writer.stats.text_bytes
            on_batch()
        writer.add(split.held_back())
        splits = writer.finish()
        stats.merge(writer.stats.to_dict())
        meta = {"kind": "pretrain", "tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
        meta |= {"dtype": writer.shards.dtype, "val_share": config.val_fraction}
        meta |= {"history": read_provenance(config.files), "splits": splits, "report": stats.to_dict()}
        return writer.publish(meta)


class TextWriter(DatasetWriter):
    """Writes documents to the shards of their split, language and source."""

    def __init__(self, config: PretrainDataConfig, job: dict[str, Any], tokenizer: ChatTokenizer) -> None:
        super().__init__(config.out_dir, job)
        self.config, self.tokenizer = config, tokenizer

    def restore(self, saved: dict[str, Any]) -> None:
        self.num_done = saved.get("documents", 0)
        self.sources = saved.get("sources", [""])  # the index of a source is part of the names of its shards
        self.open_shards(self.folder, self.tokenizer.vocab_size, saved)

    def state(self) -> dict[str, Any]:
        state = {"documents": self.num_done, "sources": self.sources, "report": self.stats.to_dict()}
        return state | {"writers": self.shards.states()}

    def add(self, assigned: Assigned) -> None:
        """Tokenize and append the documents that no earlier run has written; save the progress if it is due."""
        todo = self.skip_done(assigned)
        tokens = tokenize_texts([document for _, document in todo], self.tokenizer, self.stats)
        for (split, document), ids in zip(todo, tokens, strict=True):
            self.shards.append(self._shard_name(split, document), ids, utf8_bytes=len(document.text.encode()))
        self.save_progress_if_due()

    def _shard_name(self, split: str, document: TextExample) -> str:
        """The split; for training texts also the language and the index of the source: train_zh_s01."""
        if split != "train":
            return split
        source = source_label(document.source) if self.config.source_key else ""
        if source not in self.sources:
            source = source if len(self.sources) <= MAX_SOURCES else OTHER_SOURCE
            self.sources += [] if source in self.sources else [source]
        number = f"_s{self.sources.index(source):02d}" if source else ""
        return f"train_{document.language}{number}"

    def finish(self) -> dict[str, Any]:
        """Finish the files; returns the splits of meta.json. Shards of the train split have language and source."""
        self.close_files()
        splits = self.shards.close()
        validation = {f"val_{language}": splits.pop(f"val_{language}", None) for language in LANGUAGES}
        if not splits:
            raise UserError("no document is left to train on: give more data, or a smaller --val_fraction")
        shards = []
        for name, entry in splits.items():
            _, language, *number = name.split("_")
            label = {"language": language, "source": self.sources[int(number[0][1:])] if number else ""}
            shards += [{**shard, **label} for shard in entry["shards"]]
        totals = {total: sum(entry[total] for entry in splits.values()) for total in ("tokens", "documents", "bytes")}
        train = {"shards": shards, **totals}
        return {"train": train} | {split: entry for split, entry in validation.items() if entry}


def source_label(source: str) -> str:
    """The name of a source in characters that --mix accepts."""
    return re.sub(r"[^\w./+-]+", "_", source).strip("_")[:60] or OTHER_SOURCE


def tokenize_texts(documents: list[TextExample], tokenizer: ChatTokenizer, stats: DataStats) -> list[np.ndarray]:
    """The ids of each document with <|endoftext|>, shape (tokens,), uint32; counts the documents in `stats`.

    Encodings take about 100 times the memory of the text, so long texts are encoded in chunks.
    """
    numbered = [(number, chunk) for number, document in enumerate(documents) for chunk in _split_chunks(document.text)]
    chunks, pieces = iter(numbered), [list[np.ndarray]() for _ in documents]
    while batch := next_batch(chunks, length=lambda chunk: len(chunk[1])):
        encoded = tokenizer.encode_arrays([chunk for _, chunk in batch])
        for (number, _), ids in zip(batch, encoded, strict=True):
            pieces[number].append(ids)
    end_of_text = np.array([tokenizer.eos_id], np.uint32)
    tokens = [np.concatenate([*arrays, end_of_text]) for arrays in pieces]
    for document, array in zip(documents, tokens, strict=True):
        stats.row_kept(document.language, len(document.text), len(array), len(document.text.encode()), markers=1)
    return tokens


def _split_chunks(text: str) -> list[str]:
    """Split at line ends. A line end is a separate token, so the chunks' ids together are the ids of the text."""
    chunks, start = [], 0
    while len(text) - start > CHUNK_CHARACTERS:
        stop = text.rfind("\n", start, start + CHUNK_CHARACTERS) + 1
        stop = stop if stop > start else start + CHUNK_CHARACTERS
        chunks.append(text[start:stop])
        start = stop
    return [*chunks, text[start:]]
