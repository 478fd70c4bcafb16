"""Which rows make up which step. The step number alone decides, so a run can stop anywhere and go on as it would have.

    epoch = step // steps_per_epoch          rows of a step = a slice of the epoch's shuffled order
    global batch = batch_size x processes x accumulation_steps rows, cut into micro-batches that all processes share

Pretraining rows are windows of a stream of tokens: no padding at all. Chat rows are whole conversations, put together
with others of about the same length; the few pads stand on the right, where no real token can see them. Pairs are two
conversations each, and go through the model together.
Read next: loop.py (who asks for batches), ../corpus/shard_writer.py (what is on disk).
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from common.errors import UserError
from corpus.dataset_meta import COMMANDS, read_meta
from corpus.prepare_chats import Form, tokenise_chats
from corpus.shard_reader import open_split
from model.config import ModelConfig
from model.tokenizer import ChatTokenizer
from trainer.distributed import Run
from trainer.loss import IGNORE
from trainer.shuffle import Passes

# input_ids, labels (IGNORE where nothing is trained), real (False at pads), each (rows, seq); rows: their numbers
# pairs: the chosen answers' rows, then the rejected ones'; and reference (rows, seq), the frozen parent's log p(label)
Batch = dict[str, torch.Tensor]
WIDTH_MULTIPLE = 16  # widths of batches of chats are multiples of this: a CPU keeps memory for every shape it has met
POOL = 64  # global batches among which chats are sorted by length: larger wastes less, smaller mixes better


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


class StepPlan:
    """The rows of every step: each epoch is one shuffled pass over all rows, the last batch being what is left.

    The order is never written down, unless rows of similar length are to come together.
    """

    def __init__(self, n_rows: int, lengths: np.ndarray | None, global_batch: int, seed: int) -> None:
        self.n_rows, self.lengths, self.global_batch, self.seed = n_rows, lengths, global_batch, seed
        self.steps_per_epoch = max(1, -(-n_rows // global_batch))
        self._passes = Passes(max(n_rows, 1), seed)
        self._epoch, self._batches = -1, []  # type: int, list[np.ndarray]

    def run_steps(self, max_steps: int, epochs: float) -> int:
        """Steps of a run: `max_steps`, or where that is 0 those of the epochs, the last one begun in full."""
        return max_steps or max(1, math.ceil(round(epochs * self.steps_per_epoch, 6)))

    def rows(self, step: int) -> np.ndarray:
        epoch, index = divmod(step, self.steps_per_epoch)
        if self.lengths is None:
            start = index * self.global_batch
            return self._passes.rows(epoch * self.n_rows + start, min(self.global_batch, self.n_rows - start))
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._by_length(epoch, self.lengths)
        return self._batches[index]

    def _by_length(self, epoch: int, lengths: np.ndarray) -> list[np.ndarray]:
        """Shuffled, sorted by length within pools, and the batches shuffled again."""
        random = np.random.default_rng((self.seed, epoch))
        order, pool = random.permutation(self.n_rows), POOL * self.global_batch
        pools = [order[start : start + pool] for start in range(0, self.n_rows, pool)]
        order = np.concatenate([rows[lengths[rows].argsort(kind="stable")] for rows in pools])
        batches = [order[start : start + self.global_batch] for start in range(0, self.n_rows, self.global_batch)]
        random.shuffle(batches)
        return batches

    # ---- what is told; a mixture has more to say (mixing.py) ----
    def about(self) -> str:
        """Lines for the start of the run."""
        return ""

    def news(self, step: int) -> str:
        """A line to be said before this step."""
        return ""

    def facts(self, step: int) -> dict[str, Any]:
        """What the log should hold after so many steps."""
        return {}


class StepBatches(Dataset[Any]):
    """Item `step` is this process's list of micro-batches: all get equally many, an empty one where rows ran out."""

    def __init__(self, data: Rows, plan: StepPlan, batch_size: int, rank: int, world: int) -> None:
        self.data, self.plan, self.batch_size, self.rank, self.world = data, plan, batch_size, rank, world

    def __getitem__(self, step: int) -> Any:
        """The micro-batches; in a worker process an error of the data as a value, else its line becomes a traceback."""
        try:
            return self.micro_batches(step)
        except UserError as error:
            if get_worker_info() is None:
                raise
            return error

    def micro_batches(self, step: int) -> list[Batch]:
        rows = self.plan.rows(step)
        stride = self.batch_size * self.world
        return [
            self.micro_batch(rows[start + self.rank * self.batch_size : start + (self.rank + 1) * self.batch_size])
            for start in range(0, len(rows), stride)
        ]

    def micro_batch(self, rows: np.ndarray) -> Batch:
        if len(rows):
            return self.data.batch(rows)
        return nothing(self.data)


def nothing(data: Rows) -> Batch:
    """A batch for a process that has no row left: it takes part and trains nothing."""
    batch = data.batch(np.array([0]))
    batch["labels"].fill_(IGNORE)
    batch["real"].fill_(False)
    return batch


def iterate(batches: StepBatches, first: int, last: int, num_workers: int = 0) -> Iterator[list[Batch]]:
    """The micro-batches of steps first ... last - 1, prepared ahead by `num_workers` processes.

    Raises UserError when the data is damaged.
    """
    loader: Any = DataLoader(
        batches,
        batch_size=None,
        sampler=range(first, last),
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
    )
    for found in loader:
        if isinstance(found, UserError):
            raise found
        yield found


def validation_batches(data: Rows, batch_size: int, rank: int, world: int, max_tokens: int) -> Iterator[Batch]:
    """This process's part of batches that hold about `max_tokens` tokens in all: always the same rows.

    All processes get equally many, the last ones maybe an empty one: shared weights are put together by everybody.
    """
    lengths, taken, number = data.row_lengths(), 0, 0
    order = None if lengths is None else np.random.default_rng(0).permutation(len(data))
    for start in range(0, len(data), batch_size):
        if taken >= max_tokens:
            break
        places = np.arange(start, min(start + batch_size, len(data)))
        batch = data.batch(places if order is None else order[places])
        taken += batch["input_ids"].numel()
        if number % world == rank:
            yield batch
        number += 1
    if number == 0 or rank >= number % world > 0:
        yield nothing(data)
