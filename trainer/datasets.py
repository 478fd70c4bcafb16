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
from corpus.dataset_meta import COMMANDS, read_meta
from corpus.prepare_chats import Form, tokenise_chats
from corpus.shard_reader import open_split
from model.config import ModelConfig
from model.tokenizer import ChatTokenizer
from trainer.distributed import Run
from trainer.loss import IGNORE

# input_ids, labels (IGNORE where nothing is trained), real (False at pads), each (rows, seq); rows: their numbers
# pairs: the chosen answers' rows, then the rejected ones'; and reference (rows, seq), the frozen parent's log p(label)
Batch = dict[str, torch.Tensor]
WIDTH_MULTIPLE = 16  # widths of batches of chats are multiples of this: a CPU keeps memory for every shape it has met


def open_data(folder: str, kind: str, tokenizer: ChatTokenizer) -> list[str]:
    """The splits of a data folder, after a look at whether the model can read it: its kind and its tokenizer.

    Raises UserError naming the command to run, long before a wrong id would reach the embedding.
    """
    meta = read_meta(folder)
    command = COMMANDS[kind]
    if meta["kind"] != kind:
        raise UserError(f"{folder} holds {meta['kind']} data, this stage reads {kind}: run `{command}`")
    ours = tokenizer.fingerprint if kind == "pretrain" else tokenizer.chat_fingerprint  # a chat's has its format too
    if meta.get("tokenizer") != ours or meta.get("vocab_size", 0) > tokenizer.vocab_size:
        raise UserError(
            f"{folder} was made with tokenizer {meta.get('tokenizer')}, the model has {ours}: "
            f"run `{command} --tokenizer …` again, or name the tokenizer that made it"
        )
    if meta["splits"].get("train", {}).get("tokens", 0) < 2:
        raise UserError(f"{folder} has no training tokens: give `{command}` more text")
    return list(meta["splits"])


def _all(shard: dict[str, Any]) -> bool:
    return True


class Rows(Protocol):
    """What a data set offers: rows that can be asked for by number. `folder`: where they are read from."""

    @property
    def folder(self) -> Path: ...
    def __len__(self) -> int: ...
    def batch(self, rows: np.ndarray) -> Batch: ...
    def row_lengths(self) -> np.ndarray | None: ...


class Windows:
    """A token stream cut into rows of seq_len; row i predicts tokens i*seq_len+1 ... (i+1)*seq_len.

    `chosen`: which shards make the stream, by their entry in meta.json; all, if it is not given.
    """

    def __init__(self, folder: str, split: str, seq_len: int, chosen: Callable[[dict[str, Any]], bool] = _all) -> None:
        self.tokens, self.seq_len = open_split(folder, split, chosen), seq_len
        self.folder = self.tokens.folder

    def __len__(self) -> int:
        return -(-(self.tokens.tokens - 1) // self.seq_len)

    def row_lengths(self) -> None:
        return None  # all alike

    def window(self, row: int) -> np.ndarray:
        """The row's tokens and the one after them: shape (seq_len + 1,), the last row's shorter."""
        return self.tokens.read(row * self.seq_len, min((row + 1) * self.seq_len + 1, self.tokens.tokens))

    def batch(self, rows: np.ndarray) -> Batch:
        return self.together([self.window(int(row)) for row in rows], self.seq_len, rows)

    @staticmethod
    def together(windows: list[np.ndarray], seq_len: int, rows: np.ndarray) -> Batch:
        """The batch that these windows make; `rows`: their numbers."""
        ids = np.zeros((len(windows), seq_len + 1), dtype=np.int64)
        labels = np.full((len(windows), seq_len), IGNORE, dtype=np.int64)
        for i, window in enumerate(windows):
            ids[i, : len(window)] = window
            labels[i, : len(window) - 1] = window[1:]
        return as_batch(ids[:, :-1], labels, labels != IGNORE, rows)


class Chats:
    """Conversations with their masks; a batch is as wide as its longest row, or a little wider."""

    def __init__(self, folder: str, split: str, pad_id: int) -> None:
        self.tokens, self.pad_id = open_split(folder, split), pad_id
        self.folder = self.tokens.folder
        self.widest = int(self.tokens.lengths().max(initial=1)) - 1

    def __len__(self) -> int:
        return self.tokens.documents

    def row_lengths(self) -> np.ndarray:
        return self.tokens.lengths()

    def batch(self, rows: np.ndarray) -> Batch:
        chats = [self.tokens.document(int(row)) for row in rows]
        width = max(len(ids) for ids, _ in chats) - 1
        width = min(-(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, self.widest)
        input_ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        labels = np.full((len(rows), width), IGNORE, dtype=np.int64)
        real = np.zeros((len(rows), width), dtype=bool)
        for i, (ids, mask) in enumerate(chats):
            assert mask is not None, "chats carry a mask"
            real[i, : len(ids) - 1] = True
            input_ids[i, : len(ids) - 1] = ids[:-1]
            labels[i, : len(ids) - 1] = np.where(mask[1:] == 1, ids[1:].astype(np.int64), IGNORE)
        return as_batch(input_ids, labels, real, rows)


class Pairs:
    """Pairs of answers: row i is documents 2i (chosen) and 2i + 1 (rejected) of a split.

    `reference`: log p of every token of the split under the frozen parent, shape (tokens,), fp32 (dpo.py).
    """

    def __init__(self, folder: str, split: str, pad_id: int, reference: torch.Tensor) -> None:
        self.answers, self.reference = Chats(folder, split, pad_id), reference
        self.folder = self.answers.folder
        self.starts = self.answers.tokens.starts()

    def __len__(self) -> int:
        return len(self.answers) // 2

    def row_lengths(self) -> np.ndarray:
        return 2 * self.answers.row_lengths().reshape(-1, 2).max(axis=1)  # both are as wide as the longer one

    def batch(self, rows: np.ndarray) -> Batch:
        rows = np.asarray(rows)
        documents = np.concatenate([2 * rows, 2 * rows + 1])
        batch = self.answers.batch(documents)
        batch["reference"] = torch.zeros(batch["labels"].shape)
        for i, document in enumerate(documents):
            start, end = self.starts[document], self.starts[document + 1]
            batch["reference"][i, : end - start - 1] = self.reference[start + 1 : end]  # labels are moved on by one
        return batch | {"rows": torch.as_tensor(rows, dtype=torch.int64)}

    def prompt(self, row: int) -> list[int]:
        """The ids of a row up to where the assistant is to answer."""
        ids, mask = self.answers.tokens.document(2 * row)
        assert mask is not None, "pairs carry a mask"
        return ids[: int(mask.argmax())].tolist()


def as_batch(input_ids: np.ndarray, labels: np.ndarray, real: np.ndarray, rows: np.ndarray) -> Batch:
    return {
        "input_ids": torch.from_numpy(np.ascontiguousarray(input_ids)),
        "labels": torch.from_numpy(labels),
        "real": torch.from_numpy(real),
        "rows": torch.as_tensor(np.asarray(rows, dtype=np.int64)),
    }


def to_device(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cuda":
        return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def token_folder(
    run: Run, args: argparse.Namespace, config: ModelConfig, tokenizer: ChatTokenizer, form: Form | None = None
) -> str:
    """--data_path in this tokenizer's tokens, cut to --max_seq_len or to what the model reads; made if need be."""
    length = min(args.max_seq_len or config.max_seq_len, config.max_seq_len)
    with run.main_first():  # the first process tokenises, the others find it done
        folder = str(tokenise_chats(args.data_path, tokenizer, length, form=form))
    for line in left_out(read_meta(folder).get("report", {})):
        run.say(line)
    return folder


def left_out(report: dict[str, Any]) -> Iterator[str]:
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


def open_chats(
    run: Run, args: argparse.Namespace, config: ModelConfig, tokenizer: ChatTokenizer
) -> tuple[Chats, dict[str, Chats]]:
    """The training chats of --data_path, and the held-out ones by language."""
    folder = token_folder(run, args, config, tokenizer)
    splits = open_data(folder, "chats", tokenizer)
    chats = {split.removeprefix("val_"): Chats(folder, split, tokenizer.pad_id) for split in splits}
    return chats.pop("train"), chats


def nothing(data: Rows) -> Batch:
    """A batch for a process that has no row left: it takes part and trains nothing."""
    batch = data.batch(np.array([0]))
    batch["labels"].fill_(IGNORE)
    batch["real"].fill_(False)
    return batch
