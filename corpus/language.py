"""Language detection (Chinese or English) and validation of text.

    language = "zh" if chinese > 0 and chinese >= 0.3 * (chinese + letters) else "en"

There are two labels because the project trains on two languages and reports metrics for both. Text without letters
(numbers, punctuation, emoji) counts as "en".

Read next: readers.py (reads texts), stats.py (counts the labels).
"""

import math
from typing import Any

from corpus.stats import BadRow

LANGUAGES = ("zh", "en")
MIN_CHINESE_FRACTION = 0.3  # a Chinese character carries about as much as three letters

# In UTF-8 the lead byte of a character determines its block and differs from all continuation bytes. Deleting lead
# bytes and comparing lengths counts characters about fifty times faster than a loop over characters.
_CJK_FIRST = bytes(range(0xE4, 0xEA))  # U+4000..U+9FFF: the unified ideographs
_LETTER_FIRST = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ" + bytes(range(0xC3, 0xE0))  # Latin to Arabic


def detect_language(text: str) -> str:
    """Returns "zh" or "en" by the fraction of Chinese characters among the letters, for any string."""
    encoded = text.encode("utf-8", "surrogatepass")
    chinese = 0 if text.isascii() else len(encoded) - len(encoded.translate(None, _CJK_FIRST))
    if not chinese:
        return "en"
    if chinese >= MIN_CHINESE_FRACTION * (len(encoded) - 2 * chinese):  # each other byte may be a letter
        return "zh"
    letters = len(encoded) - len(encoded.translate(None, _LETTER_FIRST))
    return "zh" if chinese >= MIN_CHINESE_FRACTION * (chinese + letters) else "en"


def count_chinese(text: str) -> int:
    """Returns the number of Chinese characters (U+4000 to U+9FFF)."""
    encoded = text.encode("utf-8", "surrogatepass")
    return len(encoded) - len(encoded.translate(None, _CJK_FIRST))


def is_missing(value: Any) -> bool:
    """True for null and NaN, which mark missing values in files."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def stringify_number(value: Any) -> Any:
    """Returns a number as text, as in a csv file (42, not 42.0); any other value unchanged."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return (
        str(value) if isinstance(value, (int, float)) and not (isinstance(value, bool) or is_missing(value)) else value
    )


def require_text(value: Any, field: str) -> str:
    """Returns `value` if it is text that a tokenizer can encode.

    Raises BadRow with the field name if it is missing, not a string, blank, or contains NUL or a lone surrogate.
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
    """The JSON name of the type of a value."""
    if isinstance(value, bool):
        return "true/false"
    names = {int: "a number", float: "a number", list: "a list", tuple: "a list", dict: "an object", bytes: "bytes"}
    return names.get(type(value), f"a {type(value).__name__}")
