"""Chats or pairs of answers -> jsonl files -> token shards with loss masks.

    chats -> train.jsonl, val.jsonl                           whole chats, independent of the tokenizer
          -> tokens-<fingerprint>/  train, val_zh, val_en     rendered and tokenised, truncated after whole turns

A `DataTask` holds the steps that differ between chats (CHAT_TASK) and pairs (PAIR_TASK in preferences.py).

The jsonl files are the source of truth: tokenize_chats.py builds a token folder from them for another tokenizer or
length. Files are written to a staging folder, which is renamed when it is complete. A killed `prepare_chat_data`
resumes: it reads the rows again, but keeps the files that it has written.

Read next: tokenize_chats.py (jsonl -> tokens), read_examples.py (duplicates), examples.py (validation split),
job_state.py (resume), prepare_text.py (the same for plain text), ../data_process.py (the command).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corpus.block_checksums import ChecksummedFile
from corpus.dataset_meta import DATA_FORMAT, read_meta, write_meta
from corpus.examples import Example, assign_splits, batch_examples
from corpus.job_state import PROGRESS_FILE, JobProgress, input_fingerprints, keep_if_resumable, skip_done
from corpus.provenance import read_provenance
from corpus.read_examples import read_chat_examples
from corpus.readers import PathLike
from corpus.shard_writer import check_replaceable, dataset_staging_folder, replace_dataset, report_write_errors
from corpus.stats import DataStats
from corpus.tokenize_chats import (
    CHAT_TOKENS,
    ROW_FILES,
    ExampleBatch,
    TokenFolder,
    TokenTask,
    token_folder_name,
    token_inputs,
)


@dataclass(frozen=True)
class DataTask:
    """The steps from input files to the dataset that differ between chats and pairs of answers."""

    tokens: TokenTask
    read_examples: Callable[[Iterable[PathLike], DataStats], Iterator[Example]]
    settings: dict[str, Any] = field(default_factory=dict)  # inputs of `read_examples` besides the files


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
    job = {
        "inputs": input_fingerprints(paths),
        "kind": task.tokens.kind,
        "choice": task.settings,
        "val_share": val_share,
    }
    job |= {"tokenizer": tokenizer.rendering_fingerprint, "max_seq_len": max_seq_len, "format": DATA_FORMAT}
    folder = dataset_staging_folder(out_dir)
    with report_write_errors(out_dir), keep_if_resumable(folder):
        staged = _StagedDataset(JobProgress(folder, job), tokenizer, max_seq_len, task.tokens)
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

    def __init__(self, progress: JobProgress, tokenizer: Any, max_seq_len: int, task: TokenTask) -> None:
        self.progress, self.task = progress, task
        saved = progress.load_or_reset()
        self.num_examples = saved.get("items", 0)  # examples that are written and tokenised
        self.rows = saved.get("rows", {"train": 0, "val": 0})
        checksums = saved.get("checksums", {})
        self.files = {name: ChecksummedFile(progress.folder / name, *checksums.get(name, [])) for name in ROW_FILES}
        self.tokens = TokenFolder(
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
        self.tokens.close(token_inputs(self.progress.folder, self.tokens.max_seq_len, self.task), report)

    def abort(self) -> None:
        """Close the files without finishing them."""
        self.tokens.abort()
        for file in self.files.values():
            with contextlib.suppress(OSError):
                file.close()


CHAT_TASK = DataTask(CHAT_TOKENS, read_chat_examples)
