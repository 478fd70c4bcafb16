"""The rows of a data folder as batches of tensors: windows of text, chats, and pairs of answers.

Pretraining rows are windows of a stream of tokens: no padding at all. Chat rows are whole conversations, put together
with others of about the same length; the few pads stand on the right, where no real token can see them. Pairs are two
conversations each, and go through the model together.
Read next: sampler.py (which rows make which step), ../corpus/shard_writer.py (what is on disk).
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

# input_ids, labels (IGNORE_INDEX where nothing is trained), token_mask (False at pads), each (rows, seq); row_ids:
# their numbers pairs: the chosen answers' rows, then the rejected ones'; and reference (rows, seq), the frozen
# parent's log p(label)
Batch = dict[str, torch.Tensor]
WIDTH_MULTIPLE = 16  # widths of batches of chats are multiples of this: a CPU keeps memory for every shape it has met


def check_data(folder: str, kind: str, tokenizer: ChatTokenizer) -> list[str]:
    """The splits of a data folder, after a look at whether the model can read it: its kind and its tokenizer.

    Raises UserError naming the command to run, long before a wrong id would reach the embedding.
    """
    meta = read_meta(folder)
    command = PREPARE_COMMANDS[kind]
    if meta["kind"] != kind:
        raise UserError(f"{folder} holds {meta['kind']} data, this stage reads {kind}: run `{command}`")
    expected = (
        tokenizer.fingerprint if kind == "pretrain" else tokenizer.rendering_fingerprint
    )  # a chat's has its format too
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
    """What a data set offers: rows that can be asked for by number. `folder`: where they are read from."""

    @property
    def folder(self) -> Path: ...
    def __len__(self) -> int: ...
    def batch(self, row_ids: np.ndarray) -> Batch: ...
    def lengths(self) -> np.ndarray | None: ...


class PackedDataset:
    """A token stream cut into rows of seq_len; row i predicts tokens i*seq_len+1 ... (i+1)*seq_len.

    `keep_shard`: which shards make the stream, by their entry in meta.json; all, if it is not given.
    """

    def __init__(
        self, folder: str, split: str, seq_len: int, keep_shard: Callable[[dict[str, Any]], bool] = _every_shard
    ) -> None:
        self.tokens, self.seq_len = open_split(folder, split, keep_shard), seq_len
        self.folder = self.tokens.folder

    def __len__(self) -> int:
        return -(-(self.tokens.tokens - 1) // self.seq_len)

    def lengths(self) -> None:
        return None  # all alike

    def window(self, row: int) -> np.ndarray:
        """The row's tokens and the one after them: shape (seq_len + 1,), the last row's shorter."""
        return self.tokens.read(row * self.seq_len, min((row + 1) * self.seq_len + 1, self.tokens.tokens))

    def batch(self, row_ids: np.ndarray) -> Batch:
        return self.collate([self.window(int(row)) for row in row_ids], self.seq_len, row_ids)

    @staticmethod
    def collate(windows: list[np.ndarray], seq_len: int, row_ids: np.ndarray) -> Batch:
        """The batch that these windows make; `rows`: their numbers."""
        ids = np.zeros((len(windows), seq_len + 1), dtype=np.int64)
        labels = np.full((len(windows), seq_len), IGNORE_INDEX, dtype=np.int64)
        for i, window in enumerate(windows):
            ids[i, : len(window)] = window
            labels[i, : len(window) - 1] = window[1:]
        return make_batch(ids[:, :-1], labels, labels != IGNORE_INDEX, row_ids)


class ChatDataset:
    """Conversations with their masks; a batch is as wide as its longest row, or a little wider."""

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
    """Pairs of answers: row i is documents 2i (chosen) and 2i + 1 (rejected) of a split.

    `reference`: log p of every token of the split under the frozen parent, shape (tokens,), fp32 (dpo.py).
    """

    def __init__(self, folder: str, split: str, pad_id: int, reference: torch.Tensor) -> None:
        self.answers, self.reference = ChatDataset(folder, split, pad_id), reference
        self.folder = self.answers.folder
        self.offsets = self.answers.tokens.offsets()

    def __len__(self) -> int:
        return len(self.answers) // 2

    def lengths(self) -> np.ndarray:
        return 2 * self.answers.lengths().reshape(-1, 2).max(axis=1)  # both are as wide as the longer one

    def batch(self, row_ids: np.ndarray) -> Batch:
        row_ids = np.asarray(row_ids)
        documents = np.concatenate([2 * row_ids, 2 * row_ids + 1])
        batch = self.answers.batch(documents)
        batch["reference"] = torch.zeros(batch["labels"].shape)
        for i, document in enumerate(documents):
            start, end = self.offsets[document], self.offsets[document + 1]
            batch["reference"][i, : end - start - 1] = self.reference[start + 1 : end]  # labels are moved on by one
        return batch | {"row_ids": torch.as_tensor(row_ids, dtype=torch.int64)}

    def prompt_ids(self, row: int) -> list[int]:
        """The ids of a row up to where the assistant is to answer."""
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
    """--data_path in this tokenizer's tokens, cut to --max_seq_len or to what the model reads; made if need be."""
    length = min(args.max_seq_len or config.max_seq_len, config.max_seq_len)
    with dist.rank0_first():  # the first process tokenises, the others find it done
        folder = str(tokenize_chats(args.data_path, tokenizer, length, task=form))
    for line in dropped_row_messages(read_meta(folder).get("report", {})):
        dist.print0(line)
    return folder


def dropped_row_messages(report: dict[str, Any]) -> Iterator[str]:
    """What tokenising a data folder for this model and length left out or shortened, a line for each reason.

    `report` is the one in the meta.json of the token folder. One with rows read is data_process.py's, which has
    printed it.
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
    """The training chats of --data_path, and the held-out ones by language."""
    folder = tokenized_folder(dist, args, config, tokenizer)
    splits = check_data(folder, "chats", tokenizer)
    chats = {split.removeprefix("val_"): ChatDataset(folder, split, tokenizer.pad_id) for split in splits}
    return chats.pop("train"), chats


def empty_batch(data: TokenDataset) -> Batch:
    """A batch for a process that has no row left: it takes part and trains nothing."""
    batch = data.batch(np.array([0]))
    batch["labels"].fill_(IGNORE_INDEX)
    batch["token_mask"].fill_(False)
    return batch
