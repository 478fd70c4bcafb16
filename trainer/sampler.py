"""Which rows make up which step. The step number alone decides, so a run can stop anywhere and go on as it would have.

    epoch = step // steps_per_epoch          rows of a step = a slice of the epoch's shuffled order
    global batch = batch_size x processes x accumulation_steps rows, cut into micro-batches that all processes share

Read next: loop.py (who asks for batches), datasets.py (the rows), mixing.py (another plan: mixtures).
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, get_worker_info

from common.errors import UserError
from trainer.datasets import Batch, TokenDataset, empty_batch
from trainer.shuffle import EpochOrder

SORT_POOL = 64  # global batches among which chats are sorted by length: larger wastes less, smaller mixes better


class BatchSampler:
    """The rows of every step: each epoch is one shuffled pass over all rows, the last batch being what is left.

    The order is never written down, unless rows of similar length are to come together.
    """

    def __init__(self, n_rows: int, lengths: np.ndarray | None, global_batch_size: int, seed: int) -> None:
        self.n_rows, self.lengths, self.global_batch_size, self.seed = n_rows, lengths, global_batch_size, seed
        self.steps_per_epoch = max(1, -(-n_rows // global_batch_size))
        self._order = EpochOrder(max(n_rows, 1), seed)
        self._epoch, self._batches = -1, []  # type: int, list[np.ndarray]

    def num_steps(self, max_steps: int, epochs: float) -> int:
        """Steps of a run: `max_steps`, or where that is 0 those of the epochs, the last one begun in full."""
        return max_steps or max(1, math.ceil(round(epochs * self.steps_per_epoch, 6)))

    def row_ids(self, step: int) -> np.ndarray:
        epoch, index = divmod(step, self.steps_per_epoch)
        if self.lengths is None:
            start = index * self.global_batch_size
            return self._order.row_ids(epoch * self.n_rows + start, min(self.global_batch_size, self.n_rows - start))
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._by_length(epoch, self.lengths)
        return self._batches[index]

    def _by_length(self, epoch: int, lengths: np.ndarray) -> list[np.ndarray]:
        """Shuffled, sorted by length within pools, and the batches shuffled again."""
        random = np.random.default_rng((self.seed, epoch))
        order, pool = random.permutation(self.n_rows), SORT_POOL * self.global_batch_size
        pools = [order[start : start + pool] for start in range(0, self.n_rows, pool)]
        order = np.concatenate([row_ids[lengths[row_ids].argsort(kind="stable")] for row_ids in pools])
        batches = [
            order[start : start + self.global_batch_size] for start in range(0, self.n_rows, self.global_batch_size)
        ]
        random.shuffle(batches)
        return batches

    # ---- what is told; a mixture has more to say (mixing.py) ----
    def summary(self) -> str:
        """Lines for the start of the run."""
        return ""

    def notice_before(self, step: int) -> str:
        """A line to be said before this step."""
        return ""

    def step_metrics(self, step: int) -> dict[str, Any]:
        """What the log should hold after so many steps."""
        return {}


class MicroBatches(Dataset[Any]):
    """Item `step` is this process's list of micro-batches: all get equally many, an empty one where rows ran out."""

    def __init__(self, data: TokenDataset, sampler: BatchSampler, batch_size: int, rank: int, world_size: int) -> None:
        self.data, self.sampler, self.batch_size, self.rank, self.world_size = (
            data,
            sampler,
            batch_size,
            rank,
            world_size,
        )

    def __getitem__(self, step: int) -> Any:
        """The micro-batches; in a worker process an error of the data as a value, else its line becomes a traceback."""
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
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item


def validation_batches(
    data: TokenDataset, batch_size: int, rank: int, world_size: int, max_tokens: int
) -> Iterator[Batch]:
    """This process's part of batches that hold about `max_tokens` tokens in all: always the same rows.

    All processes get equally many, the last ones maybe an empty one: shared weights are put together by everybody.
    """
    lengths, num_tokens, number = data.lengths(), 0, 0
    order = None if lengths is None else np.random.default_rng(0).permutation(len(data))
    for start in range(0, len(data), batch_size):
        if num_tokens >= max_tokens:
            break
        positions = np.arange(start, min(start + batch_size, len(data)))
        batch = data.batch(positions if order is None else order[positions])
        num_tokens += batch["input_ids"].numel()
        if number % world_size == rank:
            yield batch
        number += 1
    if number == 0 or rank >= number % world_size > 0:
        yield empty_batch(data)
