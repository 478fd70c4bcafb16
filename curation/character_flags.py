"""Which classes of characters a text has: one pass over it spares most texts the searches of several rules.

    flag_texts({1: "[a-z]", 2: r"\\d"})    a function text -> 1, 2, 3 or 0

Read next: edit_rules.py (the classes), drop_rules.py (mojibake).
"""

import functools
import re
from collections.abc import Callable, Mapping

import numpy as np


def flag_texts(classes: Mapping[int, str]) -> Callable[[str], int]:
    """Return a function that joins by | the flags of those classes of which a text has a character.

    `classes`: powers of two up to 128, each with a pattern of single characters up to U+FFFF. The pattern is searched
    among the UTF-16 units, so a character above U+FFFF counts as two surrogates.
    """

    @functools.cache
    def table() -> np.ndarray:
        units, flags = "".join(map(chr, range(0x10000))), np.zeros(0x10000, np.uint8)
        for flag, pattern in classes.items():
            flags[[match.start() for match in re.finditer(pattern, units)]] |= flag
        return flags

    @functools.lru_cache(maxsize=2)  # several rules read the same text
    def flags_of(text: str) -> int:
        units = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2")
        return int(np.bitwise_or.reduce(table().take(units)))

    return flags_of
