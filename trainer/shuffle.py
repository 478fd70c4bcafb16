"""Pseudo-random permutations of n rows with random access and constant memory.

    FeistelPermutation(n, seed, epoch)(np.arange(0, 8))    the first eight rows of that epoch
    EpochOrder(n, seed).row_ids(n - 3, 8)        the last three rows of the first epoch and the first five of the second

An array of shuffled row ids grows with the data: 40 MB and half a second for 5 GB of tokens, in every process. A
Feistel network needs no array. It splits a number into two halves and XORs each with a hash of the other. Every round
is invertible, so the network is a permutation, of a power of four. A result of n or more goes through the network again
until it is below n (cycle walking: Black & Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002).

Read next: sampler.py (which rows make up a step).
"""

import numpy as np

BLOCK_ROWS = 1024  # positions computed in one vectorised call
FEISTEL_ROUNDS = 6  # four rounds suffice in cryptography, but for small n their orders are not uniform enough


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
