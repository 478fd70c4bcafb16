"""argparse types with limits: numbers, paths, names of devices, lists.

    flag(8, "rows per forward pass", type=positive_int)      rejects 0, -1, 0.5 and nan while parsing

Imports only the standard library.
Read next: cli.py.
"""

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MAX_FLAG_VALUE = 10**12  # default limit: results computed from flags stay far below 2^63
DEVICE_PATTERN = "auto|cpu|mps|cuda(:[0-9]{1,3})?"
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")
MAX_SHOWN_CHARACTERS = 60  # of an invalid value in a message

ACCEPT_DAMAGED_HELP = (
    "use damaged or truncated files as far as they can be read; the rows lost are estimated and reported"
)


@dataclass(frozen=True)
class NumberType:
    """An argparse type for finite numbers. Raises argparse.ArgumentTypeError for any other text."""

    convert: Callable[[str], float]  # raises ValueError if the text is not a number
    rule: str  # completes the message "-1 is not …"
    is_allowed: Callable[[float], bool]
    maximum: float = MAX_FLAG_VALUE

    def accepts(self, value: float) -> bool:
        is_finite = isinstance(value, int) or math.isfinite(value)  # isfinite overflows for large integers
        return is_finite and self.is_allowed(value) and value <= self.maximum

    def __call__(self, text: str) -> float:
        problem = f"is not {self.rule}"
        try:
            value = self.convert(text)
            if self.accepts(value):
                return value
            if math.isfinite(value) and self.is_allowed(value):
                problem = f"is too large: at most {self.maximum:g}"
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"{text[:MAX_SHOWN_CHARACTERS]} {problem}")


def int_at_least(minimum: int, maximum: int = MAX_FLAG_VALUE) -> NumberType:
    return NumberType(int, f"a whole number of at least {minimum}", lambda value: value >= minimum, maximum)


def int_between(minimum: int, maximum: int) -> NumberType:
    return NumberType(
        int, f"a whole number from {minimum} to {maximum}", lambda value: minimum <= value <= maximum, maximum
    )


def float_between(minimum: float, maximum: float) -> NumberType:
    return NumberType(
        float, f"a number from {minimum:g} to {maximum:g}", lambda value: minimum <= value <= maximum, maximum
    )


def parse_bool(text: str) -> bool:
    """argparse type: true or false."""
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text}: give true or false")


def _parse_epochs(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _parse_max_steps(text: str) -> int:
    return 0 if int(text) == -1 else int(text)


MIN_POSITIVE_FLOAT = 1e-38  # smaller values underflow in fp32, and 1 / x overflows
positive_int = int_at_least(1)
non_negative_int = int_at_least(0)
seed = int_between(0, 2**32 - 1)  # numpy's range
max_steps = NumberType(
    _parse_max_steps, "a whole number of at least 1, or -1: the epochs decide", lambda value: value >= 0
)
epochs = NumberType(_parse_epochs, "a number above 0", lambda value: value > 0)  # 2.0 -> 2
positive_float = NumberType(float, "a number above 0", lambda value: value > MIN_POSITIVE_FLOAT)
non_negative_float = NumberType(float, "a number of at least 0", lambda value: value >= 0)
fraction = NumberType(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
positive_fraction = NumberType(float, "a number above 0 and at most 1", lambda value: MIN_POSITIVE_FLOAT < value <= 1)
fraction_below_one = NumberType(float, "a number of at least 0 and below 1", lambda value: 0 <= value < 1)


def parse_fractions(text: str) -> list[float]:
    """Parse "0.1,0.3,1.0" into sorted unique fractions. Raises argparse.ArgumentTypeError."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give fractions separated by commas, as 0.1,0.3,1.0") from None
    if not all(0 < share <= 1 for share in found):
        raise argparse.ArgumentTypeError(f"{text}: each fraction is above 0 and at most 1")
    return found


def path_string(text: str) -> str:
    """argparse type: a path as text. Rejects an empty one, which would mean the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    if "\0" in text:
        raise argparse.ArgumentTypeError("the name contains a null byte")
    return text


def pathlib_path(text: str) -> Path:
    """argparse type: `path_string` as a Path."""
    return Path(path_string(text))


def relative_path(text: str) -> str:
    """argparse type: a path inside a repository or folder, such as data/a.jsonl, without `..`."""
    parts = re.split(r"[/\\]", path_string(text))
    if any(part in ("", ".", "..") or ":" in part for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text[:MAX_SHOWN_CHARACTERS]} is not a path inside the repository, as data/a.jsonl"
        )
    return text


def folder_name(text: str) -> str:
    """argparse type: the name of one folder: letters, digits, ".", "_" and "-"."""
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(
            f"{text[:MAX_SHOWN_CHARACTERS]!r} is not a name of letters, digits, '.', '_' and '-'"
        )
    return text


def non_empty_text(text: str) -> str:
    """argparse type: text that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the text is empty")
    return text


def device_name(text: str) -> str:
    """argparse type: auto, cpu, mps, cuda or cuda:N. device.py checks later whether the device exists."""
    if not re.fullmatch(DEVICE_PATTERN, text):
        raise argparse.ArgumentTypeError(
            f"{text[:MAX_SHOWN_CHARACTERS]}: not a device; use auto, cpu, cuda, cuda:1 or mps"
        )
    return text


def split_names(text: str) -> list[str]:
    """Split a text at commas and whitespace; returns the names in order, without duplicates."""
    return list(dict.fromkeys(name for name in re.split(r"[\s,，、]+", text) if name))
