"""Datasets that read a data folder and return batches: text windows, chats, and preference pairs.

    PackedDataset        pretraining: windows of seq_len tokens of one token stream, no padding
    ChatDataset          SFT: whole conversations, right-padded; sampler.py batches similar lengths together
    PreferenceDataset    DPO: a chosen and a rejected conversation per row, in one batch
    prefetch_batches     the micro-batches of every step, loaded in advance

With right padding and causal attention no real token attends to a pad.
Read next: sampler.py (which rows make up a step), chat_data.py (jsonl -> token folder), ../corpus/shard_writer.py (the
files).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from common.errors import UserError
from corpus.dataset_meta import PREPARE_COMMANDS, check_kind, data_fingerprint, read_meta
from corpus.shard_reader import open_split
from model.tokenizer import ChatTokenizer
from trainer.loss import IGNORE_INDEX
from trainer.sampler import BatchSampler

# input_ids, labels: (batch, seq), int64; labels are IGNORE_INDEX where nothing is trained
# token_mask: (batch, seq), bool, False at pads. row_ids: (rows,), int64, the rows of the dataset.
# num_targets: int, the number of trained tokens (or pairs); num_tokens: int, the number of tokens without pads.
# A batch of pairs holds the chosen answers, then the rejected ones, so batch = 2 * rows; it also holds
# reference: (batch, seq), fp32, log p(label) under the frozen parent.
Batch = dict[str, Any]
WIDTH_MULTIPLE = 16  # chat batches are padded to a multiple of this: on a CPU every new shape allocates a new buffer


def check_data(folder: str, kind: str, tokenizer: ChatTokenizer) -> list[str]:
    """Check the kind and the tokenizer of a data folder and return its splits.

    Raises UserError with the command to run if the folder does not fit the stage or the model.
    """
    if kind == "pretrain":
        check_kind(folder, kind)
    meta = read_meta(folder)
    command = PREPARE_COMMANDS[kind]
    if meta["kind"] != kind:
        raise UserError(f"{folder} holds {meta['kind']} data, this stage reads {kind}: run `{command}`")
    # Tokens of chats also depend on the chat format.
    expected = tokenizer.fingerprint if kind == "pretrain" else tokenizer.rendering_fingerprint
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


class TokenDataset:
    """Base of the datasets: random access by row id.

    folder: the data folder. mixture: weights of a data mixture, for the lineage of the checkpoint. group_size: number
    of answers that are sampled to a row.
    """

    folder: Path
    group_size = 1
    mixture: Mapping[str, Any] = MappingProxyType({})

    def __len__(self) -> int:
        raise NotImplementedError

    def batch(self, row_ids: np.ndarray) -> Batch:
        """Return these rows as a batch."""
        raise NotImplementedError

    def lengths(self) -> np.ndarray | None:
        """Return the tokens of every row, (len,), or None if all rows have the same length."""
        return None

    def fingerprint(self) -> str:
        """Return a fingerprint of the data, which a resumed run must share with the interrupted one."""
        return data_fingerprint(self.folder)

    def batch_sampler(self, global_batch_size: int, seed: int) -> BatchSampler:
        """Return the sampler that selects the rows of each step."""
        return BatchSampler(len(self), self.lengths(), global_batch_size, seed)


class PackedDataset(TokenDataset):
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


class ChatDataset(TokenDataset):
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
        return self.collate(chats, self.pad_id, self.max_width, row_ids)

    @staticmethod
    def collate(
        chats: Sequence[tuple[np.ndarray, np.ndarray | None]], pad_id: int, max_width: int, row_ids: np.ndarray
    ) -> Batch:
        """Stack chats, each (ids, mask), into a batch whose width is a multiple of WIDTH_MULTIPLE or `max_width`."""
        width = max(len(ids) for ids, _ in chats) - 1
        width = min(-(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, max_width)
        input_ids = np.full((len(chats), width), pad_id, dtype=np.int64)
        labels = np.full((len(chats), width), IGNORE_INDEX, dtype=np.int64)
        token_mask = np.zeros((len(chats), width), dtype=bool)
        for i, (ids, mask) in enumerate(chats):
            assert mask is not None, "chats carry a mask"
            token_mask[i, : len(ids) - 1] = True
            input_ids[i, : len(ids) - 1] = ids[:-1]
            labels[i, : len(ids) - 1] = np.where(mask[1:] == 1, ids[1:].astype(np.int64), IGNORE_INDEX)
        return make_batch(input_ids, labels, token_mask, row_ids)


class PreferenceDataset(TokenDataset):
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
        row_ids = np.asarray(row_ids, dtype=np.int64)
        documents = np.concatenate([2 * row_ids, 2 * row_ids + 1])
        batch = self.answers.batch(documents)
        batch["reference"] = torch.zeros(batch["labels"].shape)
        for i, document in enumerate(documents):
            start, end = self.offsets[document], self.offsets[document + 1]
            batch["reference"][i, : end - start - 1] = self.reference[start + 1 : end]  # labels are shifted by one
        chosen = batch["labels"][: len(row_ids)] != IGNORE_INDEX
        return batch | {"row_ids": torch.as_tensor(row_ids), "num_targets": int(chosen.any(1).sum())}

    def prompt_ids(self, row: int) -> list[int]:
        """Return the token ids of the prompt of a row, up to the first answer token."""
        ids, mask = self.answers.tokens.read_document(2 * row)
        assert mask is not None, "pairs carry a mask"
        return ids[: int(mask.argmax())].tolist()


# ---- batches ---------------------------------------------------------------------------------------------------------
def make_batch(input_ids: np.ndarray, labels: np.ndarray, token_mask: np.ndarray, row_ids: np.ndarray) -> Batch:
    return {
        "input_ids": torch.from_numpy(np.ascontiguousarray(input_ids)),
        "labels": torch.from_numpy(labels),
        "token_mask": torch.from_numpy(token_mask),
        "row_ids": torch.as_tensor(np.asarray(row_ids, dtype=np.int64)),
        "num_targets": int((labels != IGNORE_INDEX).sum()),
        "num_tokens": int(token_mask.sum()),
    }


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on the device; counts and row ids stay on the CPU.

    The copy of a pinned tensor (prefetch_batches) does not make the host wait: it is queued behind the kernels.
    """
    return {
        name: value.to(device, non_blocking=True) if torch.is_tensor(value) and name != "row_ids" else value
        for name, value in batch.items()
    }


def empty_batch(data: TokenDataset) -> Batch:
    """Return a batch without trained tokens, for a process that has no rows left but takes part in collectives."""
    batch = data.batch(np.array([0]))
    batch["labels"].fill_(IGNORE_INDEX)
    batch["token_mask"].fill_(False)
    return batch | {"num_targets": 0, "num_tokens": 0}


class MicroBatches(Dataset[Any]):
    """Maps a step number to the list of micro-batches that this process trains on in that step.

    All processes get the same number of micro-batches; one without rows left gets a batch without trained tokens.
    """

    def __init__(self, data: TokenDataset, sampler: BatchSampler, batch_size: int, rank: int, world_size: int) -> None:
        self.data, self.sampler = data, sampler
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def __getitem__(self, step: int) -> Any:
        """Return the micro-batches. A worker process returns a UserError, because raising it prints a traceback."""
        try:
            return self.micro_batches(step)
        except UserError as error:
            if get_worker_info() is None:
                raise
            return error

    def micro_batches(self, step: int) -> list[Batch]:
        row_ids = self.sampler.row_ids(step)
        stride = self.batch_size * self.world_size
        return [
            self.micro_batch(row_ids[start + self.rank * self.batch_size : start + (self.rank + 1) * self.batch_size])
            for start in range(0, len(row_ids), stride)
        ]

    def micro_batch(self, row_ids: np.ndarray) -> Batch:
        if len(row_ids):
            return self.data.batch(row_ids)
        return empty_batch(self.data)


def prefetch_batches(
    batches: MicroBatches, steps: range, num_workers: int = 0, device_type: str = "cpu"
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each step, loaded in advance by `num_workers` worker processes (-1: 2 with CUDA).

    For CUDA they are page-locked: a GPU copies them while it computes. Raises UserError if the data is damaged.
    """
    is_cuda = device_type == "cuda"
    if num_workers < 0:
        num_workers = 2 if is_cuda else 0
    loader: Any = DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        pin_memory=is_cuda,
    )
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item


def validation_batches(
    data: TokenDataset, batch_size: int, rank: int, world_size: int, max_tokens: int
) -> Iterator[Batch]:
    """Yield this process's validation batches; those of all processes hold about `max_tokens` tokens.

    The rows are a fixed random sample of the split: its first rows may all belong to one document. A larger
    `max_tokens` adds rows to the sample. All processes get the same number of batches, because sharded weights are
    gathered by collectives. The last batch of a process may have no trained tokens.
    """
    order, num_tokens, num_batches = np.random.default_rng(0).permutation(len(data)), 0, 0
    for start in range(0, len(data), batch_size):
        if num_tokens >= max_tokens:
            break
        batch = data.batch(order[start : start + batch_size])
        num_tokens += batch["input_ids"].numel()
        if num_batches % world_size == rank:
            yield batch
        num_batches += 1
    if num_batches == 0 or rank >= num_batches % world_size > 0:
        yield empty_batch(data)
