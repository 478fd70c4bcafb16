"""64-bit hashes of character n-grams.

    alphanumeric("Hello, 世界。")  -> "hello世界"            letters and digits only, in lowercase
    hash of s[i : i + n]       =  hash64(sum_k s[i + k] * B^(n - 1 - k) mod 2^64)

Both languages use n-grams of characters. A Chinese word has one or two characters, an English word about five, so
English needs longer n-grams. The hashes are the same on every machine and in every run.

Read next: near_duplicates.py (documents with mostly equal n-grams), decontaminate.py (documents with exam questions).
"""

import re

import numpy as np

_NOT_WORD = re.compile(r"[\W_]+")
_BASE = 0x9E3779B97F4A7C15  # odd, with well spread bits: 2^64 divided by the golden ratio


def alphanumeric(text: str) -> str:
    """The letters and digits of a text in lowercase, without white space and punctuation."""
    return _NOT_WORD.sub("", text.lower())


def code_points(text: str) -> np.ndarray:
    """Unicode code points of a text, shape (characters,), uint64."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)


def ngram_hashes(codes: np.ndarray, n: int) -> np.ndarray:
    """A hash of every n-gram, shape (max(0, characters - n + 1),), uint64; `codes` as from `code_points`.

    Combines the hashes of blocks of 1, 2, 4, ... characters: log2(n) passes instead of n.
    """
    if len(codes) < n:
        return np.zeros(0, np.uint64)
    block, size, power = codes + np.uint64(1), 1, _BASE
    done: np.ndarray | None = None
    covered = 0
    while True:
        if n & size:
            # `done` covers the characters before the block.
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
    """Bijective 64-bit mixing: the finaliser of SplitMix64 (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
