"""The phrases of phrases.txt, and a search for all of them at once.

    phrase of six bytes or more    its first six bytes -> hash -> a table of 2^18 flags; then the whole phrase
    shorter phrase                 str.__contains__

NumPy hashes the six bytes at every position of a text, so the time does not grow with the number of phrases.
Read next: drop_rules.py (matched_phrases), edit_rules.py (boilerplate).
"""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

_KEY_BYTES = 6  # two Chinese characters
_HASH_FACTOR, _HASH_BITS = np.uint64(0x9E3779B97F4A7C15), 18
_CUT, _SHIFT = np.uint64(64 - 8 * _KEY_BYTES), np.uint64(64 - _HASH_BITS)


def _phrases_by_name() -> dict[str, tuple[str, ...]]:
    lines = Path(__file__).with_name("phrases.txt").read_text(encoding="utf-8").split("\n")
    phrases: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("["):
            section = phrases.setdefault(line[1 : line.index("]")], [])
        elif line and not line.startswith("#"):
            section += map(str.strip, line.split("|"))
    return {name: tuple(found) for name, found in phrases.items()}


RULE_PHRASES = _phrases_by_name()


class PhraseScan(NamedTuple):
    lowercase: str  # the text
    found: frozenset[str]  # its phrases


class PhraseFinder:
    """Finds lowercase phrases in texts."""

    def __init__(self, phrases: Iterable[str]) -> None:
        self.short: list[str] = []
        self.by_key: dict[bytes, list[tuple[bytes, str]]] = {}
        for phrase in dict.fromkeys(phrases):
            encoded = phrase.encode()
            if len(encoded) < _KEY_BYTES:
                self.short.append(phrase)
            else:
                self.by_key.setdefault(encoded[:_KEY_BYTES], []).append((encoded, phrase))
        self.is_key = np.zeros(1 << _HASH_BITS, bool)
        self.is_key[_hash_windows(b"".join(key.ljust(8) for key in self.by_key))[::8]] = True

    def scan(self, text: str) -> PhraseScan:
        lowercase = text.lower()
        data = lowercase.encode("utf-8", "surrogatepass")
        found = {phrase for phrase in self.short if phrase in lowercase}
        for at in self.is_key.take(_hash_windows(data)).nonzero()[0].tolist():
            for encoded, phrase in self.by_key.get(data[at : at + _KEY_BYTES], ()):
                if data.startswith(encoded, at):
                    found.add(phrase)
        return PhraseScan(lowercase, frozenset(found))


def _hash_windows(data: bytes) -> np.ndarray:
    """The hash of the _KEY_BYTES bytes at each position, shape (bytes,), int64."""
    windows = np.ndarray(len(data), "<u8", data + bytes(7), strides=(1,))
    hashes = windows << _CUT
    hashes *= _HASH_FACTOR
    hashes >>= _SHIFT
    return hashes.view(np.int64)


_FINDER = PhraseFinder(phrase for phrases in RULE_PHRASES.values() for phrase in phrases)
_KNOWN = frozenset(phrase for phrases in RULE_PHRASES.values() for phrase in phrases)


@functools.lru_cache(maxsize=2)  # several rules read the same text
def scan_phrases(text: str) -> PhraseScan:
    """The text in lowercase, and the phrases of phrases.txt in it."""
    return _FINDER.scan(text)


def phrases_in(text: str, phrases: tuple[str, ...]) -> list[str]:
    """Those of `phrases` that the text has in lowercase, in their order."""
    lowercase, found = scan_phrases(text)
    others = _other_phrases(phrases)
    if not found and not others:
        return []
    return [phrase for phrase in phrases if phrase in found or (phrase in others and phrase in lowercase)]


@functools.lru_cache
def _other_phrases(phrases: tuple[str, ...]) -> frozenset[str]:
    """Those that are not in phrases.txt."""
    return frozenset(phrases) - _KNOWN
