"""Batch sampler: selects the rows of each step. They depend only on the seed and the step, so runs resume exactly.

    epoch = step // steps_per_epoch          rows of a step = a slice of the epoch's shuffled order

The shuffled order has random access and constant memory. An array of shuffled row ids would grow with the data: 40 MB
and half a second for 5 GB of tokens, in every process. A Feistel network needs no array. It splits a number into two
halves and XORs each with a hash of the other. Every round is invertible, so the network is a permutation, of a power of
four. A result of n or more goes through the network again until it is below n (cycle walking: Black & Rogaway, Ciphers
with Arbitrary Finite Domains, CT-RSA 2002).
Read next: datasets.py (row ids -> batches), mixing.py (the sampler of mixtures).
"""

import math
from typing import Any

import numpy as np

SORT_POOL = 64  # global batches per pool that is sorted by length; larger pools need less padding but shuffle less
BLOCK_ROWS = 1024  # positions computed in one vectorised call
FEISTEL_ROUNDS = 6  # four rounds suffice in cryptography, but for small n their orders are not uniform enough


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


# ---- shuffled orders -------------------------------------------------------------------------------------------------
class FeistelPermutation:
    """A permutation of 0 ... n - 1 that is determined by n and the keys."""

    def __init__(self, n: int, *keys: int) -> None:
        self.n = n
        self.half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)  # bits of each half
        self.mask = np.uint64((1 << self.half) - 1)
        self.keys = np.random.default_rng(keys).integers(0, 2**64, FEISTEL_ROUNDS, dtype=np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return the rows at these positions, each in 0 ... n - 1; int64, the shape of `positions`."""
        rows = self._network(np.asarray(positions).astype(np.uint64))
        while (outside := rows >= self.n).any():
            rows[outside] = self._network(rows[outside])
        return rows.astype(np.int64)

    def _network(self, numbers: np.ndarray) -> np.ndarray:
        half = np.uint64(self.half)
        left, right = numbers >> half, numbers & self.mask
        for key in self.keys:
            left, right = right, left ^ (_scramble(right ^ key) & self.mask)
        return (left << half) | right


def _scramble(numbers: np.ndarray) -> np.ndarray:
    """The mixing function of splitmix64: each output bit depends on all input bits. Overflow of uint64 is intended."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


class EpochOrder:
    """An infinite order: a new permutation of n rows for every epoch. Caches the last two blocks of positions."""

    def __init__(self, n: int, *keys: int) -> None:
        self.n, self.keys = n, keys
        self._blocks: dict[int, np.ndarray] = {}

    def row_ids(self, first: int, count: int) -> np.ndarray:
        """Return the rows at positions first ... first + count - 1, (count,), int64."""
        numbers = range(first // BLOCK_ROWS, (first + max(count, 1) - 1) // BLOCK_ROWS + 1)
        return np.concatenate([self._block(number) for number in numbers])[first - numbers[0] * BLOCK_ROWS :][:count]

    def _block(self, number: int) -> np.ndarray:
        if number not in self._blocks:
            epochs, positions = np.divmod(np.arange(number * BLOCK_ROWS, (number + 1) * BLOCK_ROWS), self.n)
            rows = np.zeros(BLOCK_ROWS, np.int64)
            for epoch in np.unique(epochs).tolist():
                here = epochs == epoch
                rows[here] = FeistelPermutation(self.n, *self.keys, epoch)(positions[here])
            if len(self._blocks) > 1:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[number] = rows
        return self._blocks[number]
