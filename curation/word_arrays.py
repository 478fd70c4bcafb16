"""The words of a text as NumPy arrays: counts and bounds for the rules of English text without a loop over words.

    text      It's "so", it's.
    words     It's  "so",  it's.              at white space
    tokens    It's  "  so  "  ,  it's  .      words and signs: \\w+(?:['’]\\w+)*|[^\\w\\s]

    code of a character    0 for white space, else 2 to 127 for a sign, 128 to 255 for \\w
    key of a token         the codes of its first eight characters as a 64-bit number
    hash of an n-gram      sum_k key of token k * B^(n - 1 - k) mod 2^64

Equal n-grams have equal hashes. Different ones may have them too, so counts by hash are upper bounds.
Read next: drop_rules.py (repeated_ngrams).
"""

import functools
import re

import numpy as np

_SPACE, _SIGN, _WORD = 0, 2, 128  # the lowest code of each class
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, with well spread bits: 2^64 divided by the golden ratio
_BUCKET_SHIFT = np.uint64(52)  # leaves twelve bits of a hash
_LENGTH = np.uint64(0xFFF)  # the bits of a hash that are replaced by the length of the n-gram
_MASKS = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)  # of the first `size` bytes


@functools.cache
def _code_table() -> np.ndarray:
    """The code of each UTF-16 unit, shape (65536,), uint8. Letters and digits of ASCII have different codes."""
    units, codes = "".join(map(chr, range(0x10000))), np.arange(0x10000) % 126 + _SIGN
    for match in re.finditer(r"\w+", units):
        codes[match.start() : match.end()] = np.arange(match.start(), match.end()) % 128 + _WORD
    for match in re.finditer(r"\s+", units):
        codes[match.start() : match.end()] = _SPACE
    return codes.astype(np.uint8)


class WordArrays:
    """Counts of a text. A character above U+FFFF counts as two signs: `length` is then not that of the text."""

    def __init__(self, text: str) -> None:
        # A space before the text, so that each character has one before it, and eight behind it, for the keys.
        units = np.frombuffer(f" {text}        ".encode("utf-16-le", "surrogatepass"), "<u2")
        self.units, self.codes, self.length = units[:-7], _code_table().take(units), len(units) - 9
        self.is_visible = self.codes[:-7] != _SPACE
        self.word_starts = (self.is_visible[1:] > self.is_visible[:-1]).nonzero()[0]
        self.num_visible = int(np.count_nonzero(self.is_visible))  # characters that are not white space

    def initial_letters(self) -> int:
        """The number of words that begin with a letter of ASCII."""
        return int(np.count_nonzero((self.units[self.word_starts + 1] | 0x20) - np.uint16(0x61) < 26))

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """The keys and the lengths of all tokens."""
        is_word = self.codes[:-7] >= _WORD
        is_mark = (self.units == 0x27) | (self.units == 0x2019)
        is_word[1:-1] |= is_mark[1:-1] & is_word[:-2] & is_word[2:]  # an apostrophe between word characters
        is_joined = is_word[:-1] & is_word[1:]
        starts = (self.is_visible[1:] > is_joined).nonzero()[0] + 1  # in `codes`
        lengths = (self.is_visible[:-1] > is_joined).nonzero()[0] - starts + 1
        keys = np.ndarray(self.length + 2, "<u8", self.codes, strides=(1,))[starts]
        return keys & _MASKS[np.minimum(lengths, 8)], lengths

    def may_repeat(self, top: tuple[tuple[int, float], ...], n: int, max_fraction: float) -> bool:
        """False if no n-gram of `top` takes up its fraction of the text, nor the repeated n-grams theirs.

        `top`: (2, fraction), (3, fraction), … up to n - 1. Of the repeated n-grams, each token counts once.
        """
        keys, lengths = self.tokens()
        if len(keys) < n or int(lengths.max()) >= int(_LENGTH) // n:
            return True
        hashes, sizes = keys, lengths
        for size, limit in (*top, (n, max_fraction)):
            hashes, sizes = hashes[:-1] * _BASE + keys[size - 1 :], sizes[:-1] + lengths[size - 1 :] + 1
            if size == n:
                break
            by_bucket = np.bincount((hashes >> _BUCKET_SHIFT).view(np.int64), sizes)  # of one or few n-grams each
            if by_bucket.max() / self.length > limit and _most_characters(hashes, sizes) / self.length > limit:
                return True
        found = np.sort(hashes & ~_LENGTH | sizes.view(np.uint64))
        repeated = int((found[1:][found[1:] == found[:-1]] & _LENGTH).sum())  # a token in several n-grams counts often
        if repeated > max_fraction * self.length:
            repeated = self._repeated_characters(hashes, lengths, n)
        return repeated > max_fraction * self.length

    @staticmethod
    def _repeated_characters(hashes: np.ndarray, lengths: np.ndarray, n: int) -> int:
        """Characters of the tokens inside an n-gram whose hash has occurred before."""
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        repeats = order[1:][hashes[1:] == hashes[:-1]]
        covered = np.zeros(len(lengths), bool)
        for k in range(n):
            covered[repeats + k] = True
        return int(lengths[covered].sum())


def _most_characters(hashes: np.ndarray, sizes: np.ndarray) -> int:
    """Characters of all occurrences of an n-gram that occurs more than once, for the one with the most."""
    found = np.sort(hashes & ~_LENGTH | sizes.view(np.uint64))
    firsts = np.append(found[1:] != found[:-1], True).nonzero()[0] + 1
    counts = np.diff(firsts, prepend=0)
    return int((counts * (found[firsts - 1] & _LENGTH).view(np.int64) * (counts > 1)).max())
