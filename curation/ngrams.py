"""Texts as sets of n-gram hashes: what two texts share is found by comparing numbers.

    alphanumeric("Hello, 世界。")  -> "hello世界"            letters and digits only, in small letters
    hash of s[i : i + n]       =  hash64(sum_k s[i + k] * B^(n - 1 - k) mod 2^64)

The n-grams are of characters in both languages: a Chinese word is one or two of them, an English one about five, so
that an English n-gram has to be longer to say as much. The hashes are the same on every machine and in every run.

Read next: near_duplicates.py (documents that share most of their n-grams), decontaminate.py (documents that hold one
of an exam).
"""

import re

import numpy as np

_NOT_WORD = re.compile(r"[\W_]+")
_BASE = 0x9E3779B97F4A7C15  # odd, with well spread bits: 2^64 divided by the golden ratio


def alphanumeric(text: str) -> str:
    """The letters and digits of a text, in small letters: what is left when layout and punctuation change."""
    return _NOT_WORD.sub("", text.lower())


def code_points(text: str) -> np.ndarray:
    """Code points, shape (characters,), uint64."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)


def ngram_hashes(codes: np.ndarray, n: int) -> np.ndarray:
    """A 64-bit hash of every n-gram, shape (max(0, characters - n + 1),); `codes` as from `code_points`.

    Blocks of 1, 2, 4, ... characters are joined to one of n, which takes log2(n) passes instead of n.
    """
    if len(codes) < n:
        return np.zeros(0, np.uint64)
    block, size, power = codes + np.uint64(1), 1, _BASE
    done: np.ndarray | None = None
    covered = 0
    while True:
        if n & size:
            # What is done stands before the block.
            done = block if done is None else done[: len(block) - covered] * np.uint64(power) + block[covered:]
            covered += size
        size *= 2
        if size > n:
            break
        block = block[: len(block) - size // 2] * np.uint64(power) + block[size // 2 :]
        power = power * power % 2**64
    assert done is not None
    return hash64(done[: len(codes) - n + 1])


def hash64(values: np.ndarray) -> np.ndarray:
    """Spread every bit over all 64 (the finaliser of SplitMix64, Steele et al. 2014): equal stay equal."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
