"""--rope_scaling KIND --rope_factor N of evaluation and serving: read more tokens than in training. Imports no torch.

Read next: rope.py (the formulas).
"""

import argparse
from typing import Any

from common.cli import Limit
from common.errors import UserError

KINDS = ("linear", "dynamic", "yarn")
MAX_FACTOR = 64
FACTOR = Limit(float, f"a number above 1 and at most {MAX_FACTOR}", lambda factor: 1 < factor <= MAX_FACTOR)
Rope = tuple[str, float]  # kind, factor


def add_rope_flags(parser: Any) -> None:
    """Add both flags to a parser or to one of its groups."""
    parser.add_argument("--rope_scaling", choices=KINDS, help="scale RoPE to read more tokens than in training")
    parser.add_argument(
        "--rope_factor", type=FACTOR, metavar="N", help="with --rope_scaling: N times as many tokens as in training"
    )


def rope_of(args: argparse.Namespace) -> Rope | None:
    """(kind, factor), None where the flags were not given. Raises UserError for one flag without the other, and
    for a factor out of range."""
    kind, factor = getattr(args, "rope_scaling", None), getattr(args, "rope_factor", None)
    if (kind is None) != (factor is None):
        raise UserError("--rope_scaling KIND and --rope_factor N: give both or neither")
    if kind is None or factor is None:
        return None
    check_factor(factor)
    return kind, factor


def check_factor(factor: float) -> None:
    """Raises UserError unless 1 < factor <= MAX_FACTOR."""
    if not 1 < factor <= MAX_FACTOR:  # NaN too
        raise UserError(f"--rope_factor {factor:g}: must be above 1 and at most {MAX_FACTOR}")
