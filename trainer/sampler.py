"""Batch sampler: selects the rows of each step. They depend only on the seed and the step, so runs resume exactly.

    epoch = step // steps_per_epoch          rows of a step = a slice of the epoch's shuffled order

The order of an epoch is a permutation that is computed once, when its first row is needed: 4 bytes per row, in every
process.
Read next: datasets.py (row ids -> batches), mixing.py (the sampler of mixtures).
"""

import math
from typing import Any

import numpy as np

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
        """Return the log entries of step number `step` (counted from 1)."""
        return {"epoch": (step - 1) / self.steps_per_epoch}


class EpochOrder:
    """An infinite order: a new permutation of n rows for every epoch. The current epoch's is cached."""

    def __init__(self, n: int, *keys: int) -> None:
        self.n, self.keys = n, keys
        self._epoch, self._rows = -1, np.empty(0, np.int32)

    def row_ids(self, first: int, count: int) -> np.ndarray:
        """Return the rows at positions first ... first + count - 1, (count,), int64."""
        found = np.empty(count, np.int64)
        done = 0
        while done < count:
            epoch, start = divmod(first + done, self.n)
            part = self._permutation(epoch)[start : start + count - done]
            found[done : done + len(part)] = part
            done += len(part)
        return found

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            dtype = np.int32 if self.n <= 2**31 else np.int64
            self._rows = np.random.default_rng((*self.keys, epoch)).permutation(np.arange(self.n, dtype=dtype))
            self._epoch = epoch
        return self._rows
