"""Datasets that read a data folder and return batches: text windows, chats, and preference pairs.

    PackedDataset        pretraining: windows of seq_len tokens of one token stream, no padding
    ChatDataset          SFT: whole conversations, right-padded; sampler.py batches similar lengths together
    PreferenceDataset    DPO: a chosen and a rejected conversation per row, in one batch

With right padding and causal attention no real token attends to a pad.
Read next: sampler.py (which rows make up a step), ../corpus/shard_writer.py (the files).
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from common.errors import UserError
from corpus.dataset_meta import PREPARE_COMMANDS, read_meta
from corpus.prepare_chats import DataTask, tokenize_chats
from corpus.shard_reader import open_split
from model.config import ModelConfig
from model.tokenizer import ChatTokenizer
from trainer.distributed import DistContext
from trainer.loss import IGNORE_INDEX

# input_ids, labels: (batch, seq), int64; labels are IGNORE_INDEX where nothing is trained
# token_mask: (batch, seq), bool, False at pads. row_ids: (rows,), int64, the rows of the dataset.
# A batch of pairs holds the chosen answers, then the rejected ones, so batch = 2 * rows; it also holds
# reference: (batch, seq), fp32, log p(label) under the frozen parent.
Batch = dict[str, torch.Tensor]
WIDTH_MULTIPLE = 16  # chat batches are padded to a multiple of this: on a CPU every new shape allocates a new buffer


def check_data(folder: str, kind: str, tokenizer: ChatTokenizer) -> list[str]:
    """Check the kind and the tokenizer of a data folder and return its splits.

    Raises UserError with the command to run if the folder does not fit the stage or the model.
    """
    meta = read_meta(folder)
    command = PREPARE_COMMANDS[kind]
    if meta["kind"] != kind:
        raise UserError(f"{folder} holds {meta['kind']} data, this stage reads {kind}: run `{command}`")
    expected = (
        tokenizer.fingerprint if kind == "pretrain" else tokenizer.rendering_fingerprint
    )  # chats also depend on the chat format
    if meta.get("tokenizer") != expected or meta.get("vocab_size", 0) > tokenizer.vocab_size:
        raise UserError(
            f"{folder} was made with tokenizer {meta.get('tokenizer')}, the model has {expected}: "
            f"run `{command} --tokenizer …` again, or name the tokenizer that made it"
        )
    if meta["splits"].get("train", {}).get("tokens", 0) < 2:
        raise UserError(f"{folder} has no training tokens: give `{command}` more text")
    return list(meta["splits"])


def _every_shard(shard: dict[str, Any]) -> bool:
    return True


class TokenDataset(Protocol):
    """Interface of a dataset with random access by row id. `folder`: the data folder it reads."""

    @property
    def folder(self) -> Path: ...
    def __len__(self) -> int: ...
    def batch(self, row_ids: np.ndarray) -> Batch: ...
    def lengths(self) -> np.ndarray | None: ...


class PackedDataset:
    """A token stream cut into rows of seq_len tokens; row i predicts tokens i*seq_len + 1 ... (i+1)*seq_len.

    `keep_shard` selects the shards of the stream by their entry in meta.json (default: all).
    """

    def __init__(
        self, folder: str, split: str, seq_len: int, keep_shard: Callable[[dict[str, Any]], bool] = _every_shard
    ) -> None:
        self.tokens, self.seq_len = open_split(folder, split, keep_shard), seq_len
        self.folder = self.tokens.folder

    def __len__(self) -> int:
        return -(-(self.tokens.tokens - 1) // self.seq_len)

    def lengths(self) -> None:
        return None  # all rows have the same length

    def window(self, row: int) -> np.ndarray:
        """Return the tokens of a row and the next one, (seq_len + 1,); the last row may be shorter."""
        return self.tokens.read(row * self.seq_len, min((row + 1) * self.seq_len + 1, self.tokens.tokens))

    def batch(self, row_ids: np.ndarray) -> Batch:
        return self.collate([self.window(int(row)) for row in row_ids], self.seq_len, row_ids)

    @staticmethod
    def collate(windows: list[np.ndarray], seq_len: int, row_ids: np.ndarray) -> Batch:
        """Stack windows into a batch of (len(windows), seq_len); `row_ids` are their row ids."""
        ids = np.zeros((len(windows), seq_len + 1), dtype=np.int64)
        labels = np.full((len(windows), seq_len), IGNORE_INDEX, dtype=np.int64)
        for i, window in enumerate(windows):
            ids[i, : len(window)] = window
            labels[i, : len(window) - 1] = window[1:]
        return make_batch(ids[:, :-1], labels, labels != IGNORE_INDEX, row_ids)


class ChatDataset:
    """Tokenized conversations with their loss masks. A batch is padded to its longest row, rounded up."""

    def __init__(self, folder: str, split: str, pad_id: int) -> None:
        self.tokens, self.pad_id = open_split(folder, split), pad_id
        self.folder = self.tokens.folder
        self.max_width = int(self.tokens.lengths().max(initial=1)) - 1

    def __len__(self) -> int:
        return self.tokens.documents

    def lengths(self) -> np.ndarray:
        return self.tokens.lengths()

    def batch(self, row_ids: np.ndarray) -> Batch:
        chats = [self.tokens.read_document(int(row)) for row in row_ids]
        width = max(len(ids) for ids, _ in chats) - 1
        width = min(-(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, self.max_width)
        input_ids = np.full((len(row_ids), width), self.pad_id, dtype=np.int64)
        labels = np.full((len(row_ids), width), IGNORE_INDEX, dtype=np.int64)
        token_mask = np.zeros((len(row_ids), width), dtype=bool)
        for i, (ids, mask) in enumerate(chats):
            assert mask is not None, "chats carry a mask"
            token_mask[i, : len(ids) - 1] = True
            input_ids[i, : len(ids) - 1] = ids[:-1]
            labels[i, : len(ids) - 1] = np.where(mask[1:] == 1, ids[1:].astype(np.int64), IGNORE_INDEX)
        return make_batch(input_ids, labels, token_mask, row_ids)


class PreferenceDataset:
    """Preference pairs: row i is documents 2i (chosen) and 2i + 1 (rejected) of a split.

    `reference`: log p of every answer token of the split under the frozen parent, (tokens,), fp32 (dpo.py).
    """

    def __init__(self, folder: str, split: str, pad_id: int, reference: torch.Tensor) -> None:
        self.answers, self.reference = ChatDataset(folder, split, pad_id), reference
        self.folder = self.answers.folder
        self.offsets = self.answers.tokens.offsets()

    def __len__(self) -> int:
        return len(self.answers) // 2

    def lengths(self) -> np.ndarray:
        return 2 * self.answers.lengths().reshape(-1, 2).max(axis=1)  # both are padded to the longer one

    def batch(self, row_ids: np.ndarray) -> Batch:
        row_ids = np.asarray(row_ids)
        documents = np.concatenate([2 * row_ids, 2 * row_ids + 1])
        batch = self.answers.batch(documents)
        batch["reference"] = torch.zeros(batch["labels"].shape)
        for i, document in enumerate(documents):
            start, end = self.offsets[document], self.offsets[document + 1]
            batch["reference"][i, : end - start - 1] = self.reference[start + 1 : end]  # labels are shifted by one
        return batch | {"row_ids": torch.as_tensor(row_ids, dtype=torch.int64)}

    def prompt_ids(self, row: int) -> list[int]:
        """Return the token ids of the prompt of a row, up to the first answer token."""
        ids, mask = self.answers.tokens.read_document(2 * row)
        assert mask is not None, "pairs carry a mask"
        return ids[: int(mask.argmax())].tolist()


def make_batch(input_ids: np.ndarray, labels: np.ndarray, token_mask: np.ndarray, row_ids: np.ndarray) -> Batch:
    return {
        "input_ids": torch.from_numpy(np.ascontiguousarray(input_ids)),
        "labels": torch.from_numpy(labels),
        "token_mask": torch.from_numpy(token_mask),
        "row_ids": torch.as_tensor(np.asarray(row_ids, dtype=np.int64)),
    }


def to_device(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cuda":
        return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def tokenized_folder(
    dist: DistContext,
    args: argparse.Namespace,
    config: ModelConfig,
    tokenizer: ChatTokenizer,
    form: DataTask | None = None,
) -> str:
    """Tokenize --data_path for this tokenizer and length, unless that was done before; returns the token folder.

    The length is --max_seq_len, at most the model's max_seq_len.
    """
    length = min(args.max_seq_len or config.max_seq_len, config.max_seq_len)
    with dist.rank0_first():  # rank 0 tokenizes, the other processes find the folder complete
        folder = str(tokenize_chats(args.data_path, tokenizer, length, task=form))
    for line in dropped_row_messages(read_meta(folder).get("report", {})):
        dist.print0(line)
    return folder


def dropped_row_messages(report: dict[str, Any]) -> Iterator[str]:
    """Yield one line per reason for which tokenization dropped or shortened rows.

    `report` is from the meta.json of the token folder. A report with "read" was written and printed by data_process.py.
    """
    if report.get("read"):
        return
    total = report.get("kept", 0) + sum(reason["count"] for reason in report.get("dropped", {}).values())
    for verb, key in (("left out", "dropped"), ("kept, but shortened", "shortened")):
        for name, reason in report.get(key, {}).items():
            yield f"{reason['count']:,} of {total:,} rows {verb}: {name}"


def open_chat_data(
    dist: DistContext, args: argparse.Namespace, config: ModelConfig, tokenizer: ChatTokenizer
) -> tuple[ChatDataset, dict[str, ChatDataset]]:
    """Return the training chats of --data_path, and the validation chats by split ("zh", "en")."""
    folder = tokenized_folder(dist, args, config, tokenizer)
    splits = check_data(folder, "chats", tokenizer)
    chats = {split.removeprefix("val_"): ChatDataset(folder, split, tokenizer.pad_id) for split in splits}
    return chats.pop("train"), chats


def empty_batch(data: TokenDataset) -> Batch:
    """Return a batch without trained tokens, for a process that has no rows left but takes part in collectives."""
    batch = data.batch(np.array([0]))
    batch["labels"].fill_(IGNORE_INDEX)
    batch["token_mask"].fill_(False)
    return batch
