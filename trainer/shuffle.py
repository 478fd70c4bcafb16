"""A shuffled order of n rows that is never written down: any place of it can be asked for at once.

    FeistelPermutation(n, seed, epoch)(np.arange(0, 8))    the first eight rows of that epoch
    EpochOrder(n, seed).row_ids(n - 3, 8)        the last three rows of the first pass and the first five of the second

A list of shuffled numbers grows with the data: 40 MB and half a second for 5 GB of tokens, in every process. A Feistel
network is a permutation by construction: it splits a number into two halves and adds to each a scrambled copy of the
other, which can be undone, so no two numbers meet. It permutes a power of four; a result beyond n is put in again until
it falls inside ("cycle walking": Black & Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002).

Read next: sampler.py (which rows make up which step).
"""

import numpy as np

BLOCK_ROWS = 1024  # places that are worked out together: numpy is slow in small pieces
FEISTEL_ROUNDS = 6  # four are enough against an observer, but not for a few bits: small n stays uneven


class FeistelPermutation:
    """Row numbers 0 ... n - 1 in an order that n and the keys decide."""

    def __init__(self, n: int, *keys: int) -> None:
        self.n = n
        self.half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)  # bits of each half
        self.mask = np.uint64((1 << self.half) - 1)
        self.keys = np.random.default_rng(keys).integers(0, 2**64, FEISTEL_ROUNDS, dtype=np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The rows at these places of the order, each place in 0 ... n - 1; shape and meaning as `places`, int64."""
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
    """The finisher of splitmix64: every bit of a result depends on every bit of a number. Meant to overflow."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


class EpochOrder:
    """An endless order: one shuffled pass over n rows after the other. Keeps the last places that were asked for."""

    def __init__(self, n: int, *keys: int) -> None:
        self.n, self.keys = n, keys
        self._blocks: dict[int, np.ndarray] = {}

    def row_ids(self, first: int, count: int) -> np.ndarray:
        """The rows at places first ... first + count - 1, shape (count,), int64."""
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
