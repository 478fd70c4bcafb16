"""Unit conversion: convert(Fraction(5), "miles", "km") is 8.04672. The units stand in data/units.txt, zh and en.

    value in the first unit = value * size + zero point          temperatures alone have a zero point

Called by tools.py. Read next: calculator.py (how the number is written).
"""

import functools
import unicodedata
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

_FILE = Path(__file__).parent / "data" / "units.txt"


class Unit(NamedTuple):
    """`size`: in the first unit of its quantity. `zero`: its zero point in that unit."""

    quantity: str
    size: Fraction
    zero: Fraction = Fraction(0)


def convert(value: Fraction, from_unit: str, to_unit: str) -> Fraction:
    """The value in another unit. Raises ValueError for an unknown unit and for units of different quantities."""
    source, target = find_unit(from_unit), find_unit(to_unit)
    if source.quantity != target.quantity:
        raise ValueError(f"{from_unit} is a unit of {source.quantity}, {to_unit} of {target.quantity}")
    return (value * source.size + source.zero - target.zero) / target.size


def find_unit(name: str) -> Unit:
    """The unit of a name, in any case, with or without a plural s. Raises ValueError."""
    wanted, units = _normalize(name), _units()
    found = units.get(wanted) or (units.get(wanted.removesuffix("s")) if len(wanted) > 3 else None)
    if not found:
        raise ValueError(f"unknown unit {name}")
    return found


def _normalize(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())  # ℃ km² full-width


@functools.cache
def _units() -> dict[str, Unit]:
    units: dict[str, Unit] = {}
    quantity = ""
    for line in _FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            quantity = line.strip("[]")
        elif line and not line.startswith("#"):
            names, _, numbers = line.partition(" = ")
            unit = Unit(quantity, *map(Fraction, numbers.split(", ")))
            units |= {_normalize(each): unit for each in names.split(", ")}
    return units
