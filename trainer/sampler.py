"""Batch sampler: selects the rows of each step. They depend only on the seed and the step, so runs resume exactly.

    epoch = step // steps_per_epoch          rows of a step = a slice of the epoch's shuffled order
    global batch = batch_size x processes x accumulation_steps rows, split into micro-batches of batch_size rows

Read next: loop.py (iterates over batches), datasets.py (the rows), mixing.py (the sampler of mixtures).
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, get_worker_info

from common.errors import UserError
from trainer.datasets import Batch, TokenDataset, empty_batch
from trainer.shuffle import EpochOrder

SORT_POOL = 64  # global batches per pool that is sorted by length; larger pools need less padding but shuffle less


class BatchSampler:
    """Selects the rows of each step. An epoch is one shuffled pass over all rows; its last batch may be smaller.

    lengths: (n_rows,), or None if all rows have the same length. With lengths, each batch has rows of similar length.
    """

    def __init__(self, n_rows: int, lengths: np.ndarray | None, global_batch_size: int, seed: int) -> None:
        self.n_rows, self.lengths, self.global_batch_size, self.seed = n_rows, lengths, global_batch_size, seed
        self.steps_per_epoch = max(1, -(-n_rows // global_batch_size))
        self._order = EpochOrder(max(n_rows, 1), seed)
        self._epoch, self._batches = -1, []  # type: int, list[np.ndarray]

    def num_steps(self, max_steps: int, epochs: float) -> int:
        """Return the number of steps of a run: `max_steps`, or, if it is 0, `epochs` in steps, rounded up."""
        return max_steps or max(1, math.ceil(round(epochs * self.steps_per_epoch, 6)))

    def row_ids(self, step: int) -> np.ndarray:
        """Return the row ids of a step (counted from 0), (rows,), int64."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self.lengths is None:
            start = index * self.global_batch_size
            return self._order.row_ids(epoch * self.n_rows + start, min(self.global_batch_size, self.n_rows - start))
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._by_length(epoch, self.lengths)
        return self._batches[index]

    def _by_length(self, epoch: int, lengths: np.ndarray) -> list[np.ndarray]:
        """Shuffle the rows, sort them by length within pools, cut them into batches and shuffle the batches."""
        rng = np.random.default_rng((self.seed, epoch))
        order, pool = rng.permutation(self.n_rows), SORT_POOL * self.global_batch_size
        pools = [order[start : start + pool] for start in range(0, self.n_rows, pool)]
        order = np.concatenate([row_ids[lengths[row_ids].argsort(kind="stable")] for row_ids in pools])
        batches = [
            order[start : start + self.global_batch_size] for start in range(0, self.n_rows, self.global_batch_size)
        ]
        rng.shuffle(batches)
        return batches

    # ---- log output, overridden by MixSampler (mixing.py) ----
    def summary(self) -> str:
        """Return text to print at the start of the run, or ""."""
        return ""

    def notice_before(self, step: int) -> str:
        """Return a line to print before this step, or ""."""
        return ""

    def step_metrics(self, step: int) -> dict[str, Any]:
        """Return entries for the metrics log after `step` steps."""
        return {}


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


def prefetch_batches(batches: MicroBatches, first: int, last: int, num_workers: int = 0) -> Iterator[list[Batch]]:
    """Yield the micro-batches of steps first ... last - 1, loaded in advance by `num_workers` worker processes.

    Raises UserError if the data is damaged.
    """
    loader: Any = DataLoader(
        batches,
        batch_size=None,
        sampler=range(first, last),
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
    )
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item


def validation_batches(
    data: TokenDataset, batch_size: int, rank: int, world_size: int, max_tokens: int
) -> Iterator[Batch]:
    """Yield this process's validation batches; those of all processes hold about `max_tokens` tokens. Rows are fixed.

    All processes get the same number of batches, because sharded weights are gathered by collectives. The last batch of
    a process may have no trained tokens.
    """
    lengths, num_tokens, num_batches = data.lengths(), 0, 0
    order = None if lengths is None else np.random.default_rng(0).permutation(len(data))
    for start in range(0, len(data), batch_size):
        if num_tokens >= max_tokens:
            break
        positions = np.arange(start, min(start + batch_size, len(data)))
        batch = data.batch(positions if order is None else order[positions])
        num_tokens += batch["input_ids"].numel()
        if num_batches % world_size == rank:
            yield batch
        num_batches += 1
    if num_batches == 0 or rank >= num_batches % world_size > 0:
        yield empty_batch(data)
