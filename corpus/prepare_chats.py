"""Chats or pairs of answers -> jsonl files -> token shards with loss masks.

    chats -> train.jsonl, val.jsonl                           whole chats, independent of the tokenizer
          -> tokens-<fingerprint>/  train, val_zh, val_en     rendered and tokenized, truncated after whole turns

The jsonl files are the source of truth: tokenize_chats.py builds a token folder from them for another tokenizer or
length.

Read next: examples.py (rows -> chats), validation_split.py, tokenize_chats.py (jsonl -> tokens), dataset_writer.py
(staging and resume), prepare_text.py (the same for plain text), ../data_process.py (the command).
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from corpus.block_checksums import ChecksummedFile
from corpus.data_config import ChatDataConfig
from corpus.dataset_meta import DATA_FORMAT, read_meta
from corpus.dataset_writer import DatasetWriter
from corpus.examples import ChatExample, next_batch
from corpus.job_state import input_fingerprints
from corpus.provenance import read_provenance
from corpus.stats import DataStats
from corpus.token_folder import ROW_FILES, token_folder_name, token_inputs
from corpus.tokenize_chats import append_chats, finish_tokens
from corpus.validation_split import Assigned, ValidationSplit
from model.tokenizer import ChatTokenizer


class ChatFilter(Protocol):
    """Chooses training chats; see ../curation/perplexity_filter.py."""

    def filter_examples(
        self, examples: Iterator[ChatExample], val_fraction: float, stats: DataStats
    ) -> Iterator[ChatExample]:
        """Yield the chats to keep; count the others in `stats` by reason."""

    def fingerprint_fields(self) -> dict[str, Any]:
        """The settings of the choice: a run resumes only if they are unchanged."""

    def provenance(self) -> dict[str, Any]:
        """Fields of meta.json."""


def prepare_chats(
    config: ChatDataConfig,
    tokenizer: ChatTokenizer,
    stats: DataStats,
    on_batch: Callable[[], None] = lambda: None,
    chat_filter: ChatFilter | None = None,
) -> dict[str, Any]:
    """Write train.jsonl, val.jsonl and the token folder of the chats or pairs in `config.files` to `config.out_dir`.

    `on_batch` is called after every batch. Returns the token folder's meta.json.
    Raises UserError for unusable data or a disk that cannot be written.
    """
    job: dict[str, Any] = {"inputs": input_fingerprints(config.files), "kind": config.example_type.kind}
    job |= {"choice": config.row_choice | (chat_filter.fingerprint_fields() if chat_filter else {})}
    job |= {"val_share": config.val_fraction, "tokenizer": tokenizer.rendering_fingerprint}
    job |= {"max_seq_len": config.max_seq_len, "format": DATA_FORMAT}
    examples = config.read_examples(stats)
    if chat_filter:
        examples = chat_filter.filter_examples(examples, config.val_fraction, stats)
    with ChatWriter(config, job, tokenizer) as writer:
        split = ValidationSplit(config.val_fraction)
        while batch := next_batch(examples):
            writer.add(split.assign(batch))
            stats.text_bytes = writer.stats.text_bytes
            on_batch()
        writer.add(split.held_back())
        stats.merge(writer.stats.to_dict())
        writer.finish(stats)
        meta = {"kind": "messages", "rows": writer.rows, "checksums": writer.checksums()}
        meta |= {"tokens": writer.shards.folder.name, "val_share": config.val_fraction, "report": stats.to_dict()}
        meta |= {"history": read_provenance(config.files), **(chat_filter.provenance() if chat_filter else {})}
        writer.publish(meta)
    return read_meta(Path(config.out_dir) / writer.shards.folder.name)


class RowWriter(DatasetWriter):
    """Writes examples to train.jsonl and val.jsonl."""

    def restore(self, saved: dict[str, Any]) -> None:
        self.num_done = saved.get("items", 0)
        self.rows = saved.get("rows", {"train": 0, "val": 0})
        checksums = saved.get("checksums", {})
        self.files = {name: ChecksummedFile(self.folder / name, *checksums.get(name, [])) for name in ROW_FILES}

    def state(self) -> dict[str, Any]:
        return {"items": self.num_done, "rows": self.rows, "checksums": self.checksums()}

    def checksums(self) -> dict[str, list[Any]]:
        """[bytes, CRC-32] of train.jsonl and val.jsonl so far."""
        return {name: [file.size, file.checksum] for name, file in self.files.items()}

    def add(self, assigned: Assigned) -> None:
        """Write the examples that no earlier run has written; save the progress if it is due."""
        todo = self.skip_done(assigned)
        for split, example in todo:
            name = split.partition("_")[0]  # val_zh and val_en share val.jsonl
            line = json.dumps(example.to_row(), ensure_ascii=False) + "\n"
            self.files[f"{name}.jsonl"].write(line.encode())
            self.rows[name] += 1
        self.tokenize(todo)
        self.save_progress_if_due()

    def tokenize(self, todo: Assigned) -> None:
        """Tokenize the examples that `add` has written."""


class ChatWriter(RowWriter):
    """Also writes the tokens of chats or pairs to the token folder."""

    def __init__(self, config: ChatDataConfig, job: dict[str, Any], tokenizer: ChatTokenizer) -> None:
        super().__init__(config.out_dir, job)
        self.config, self.tokenizer = config, tokenizer

    def restore(self, saved: dict[str, Any]) -> None:
        super().restore(saved)
        folder = self.folder / token_folder_name(self.tokenizer)
        self.open_shards(folder, self.tokenizer.vocab_size, saved.get("tokens"))

    def state(self) -> dict[str, Any]:
        tokens = {"writers": self.shards.states(), "report": self.stats.to_dict()}
        return super().state() | {"tokens": tokens}

    def tokenize(self, todo: Assigned) -> None:
        append_chats(todo, self.tokenizer, self.config.max_seq_len, self.shards, self.stats)

    def finish(self, stats: DataStats) -> None:
        """Finish all files. Raises UserError if no example is in the train split."""
        self.close_files()
        example_type = self.config.example_type
        job = token_inputs(self.folder, self.config.max_seq_len, example_type.kind)
        finish_tokens(self.shards, self.tokenizer, job, stats, example_type.kind)
