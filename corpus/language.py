"""Two questions about one piece of text: is it Chinese or English, and is it sound text at all?

    language = "zh" if CJK characters >= 0.3 * letters else "en"

Only two labels, because the house trains two languages and reports every figure for both. Text without any letter
(numbers, code punctuation, emoji) counts as "en".

Read next: readers.py (where texts come from), stats.py (where the labels are counted).
"""

import math
from typing import Any

from corpus.stats import BadRow

LANGUAGES = ("zh", "en")
MIN_CHINESE_FRACTION = (
    0.3  # one Chinese character says about as much as three letters, so a third of the characters is half the words
)

# In UTF-8 the first byte of a character tells its block, and no later byte looks like a first one. Deleting first bytes
# from the encoded text and comparing lengths counts characters some fifty times faster than asking each of them.
_CJK_FIRST = bytes(range(0xE4, 0xEA))  # U+4000..U+9FFF: the unified ideographs
_LETTER_FIRST = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ" + bytes(range(0xC3, 0xE0))  # Latin to Arabic


def detect_language(text: str) -> str:
    """ "zh" or "en", by the share of Chinese characters among the letters; any string is welcome."""
    raw = text.encode("utf-8", "surrogatepass")
    chinese = len(raw) - len(raw.translate(None, _CJK_FIRST))
    letters = len(raw) - len(raw.translate(None, _LETTER_FIRST))
    return "zh" if chinese and chinese >= MIN_CHINESE_FRACTION * (chinese + letters) else "en"


def count_chinese(text: str) -> int:
    """How many of the characters are Chinese (the unified ideographs, U+4000 to U+9FFF)."""
    raw = text.encode("utf-8", "surrogatepass")
    return len(raw) - len(raw.translate(None, _CJK_FIRST))


def is_missing(value: Any) -> bool:
    """True for what files use to say "nothing here": null and NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def stringify_number(value: Any) -> Any:
    """The text of a number, as a csv file would hold it (42, not 42.0); any other value as it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return (
        str(value) if isinstance(value, (int, float)) and not (isinstance(value, bool) or is_missing(value)) else value
    )


def require_text(value: Any, field: str) -> str:
    """`value` itself, when it is text that a tokenizer can take.

    Raises BadRow naming the field when it is missing, not a string, empty, holds a NUL, or half a character.
    """
    if is_missing(value):
        raise BadRow(f"{field} is null")
    if not isinstance(value, str):
        raise BadRow(f"{field} is {_type_name(value)}, not a string")
    if not value or value.isspace():
        raise BadRow(f"{field} is empty")
    if "\0" in value:
        raise BadRow(f"NUL character in {field}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"malformed UTF-8 in {field}") from None
    return value


def _type_name(value: Any) -> str:
    """How a user would call this type of value."""
    if isinstance(value, bool):
        return "true/false"
    names = {int: "a number", float: "a number", list: "a list", tuple: "a list", dict: "an object", bytes: "bytes"}
    return names.get(type(value), f"a {type(value).__name__}")
