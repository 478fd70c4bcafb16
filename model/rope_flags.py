"""The flags --rope_scaling KIND --rope_factor N of evaluation and serving, for contexts longer than in training.

Imports no torch.

Read next: rope.py (the formulas).
"""

from dataclasses import dataclass

from common.cli import Config, flag
from common.errors import UserError
from common.flag_types import NumberType

ROPE_KINDS = ("linear", "dynamic", "yarn")
MAX_ROPE_FACTOR = 64
_ROPE_FACTOR = NumberType(
    float, f"a number above 1 and at most {MAX_ROPE_FACTOR}", lambda factor: 1 < factor <= MAX_ROPE_FACTOR
)
RopeScaling = tuple[str, float]  # kind, factor


@dataclass(frozen=True)
class RopeFlags(Config):
    """RoPE scaling of a loaded model."""

    rope_scaling: str | None = flag(None, "RoPE scaling for contexts longer than in training", choices=ROPE_KINDS)
    rope_factor: float | None = flag(
        None,
        "with --rope_scaling: context length as a multiple of max_seq_len in training",
        type=_ROPE_FACTOR,
        metavar="N",
    )

    def check(self) -> None:
        """Raises UserError for one flag without the other."""
        super().check()
        if (self.rope_scaling is None) != (self.rope_factor is None):
            raise UserError("--rope_scaling KIND and --rope_factor N: give both or neither")

    @property
    def rope(self) -> RopeScaling | None:
        """(kind, factor), or None without the flags."""
        return (self.rope_scaling, self.rope_factor) if self.rope_scaling and self.rope_factor else None


def check_rope_factor(factor: float) -> None:
    """Raises UserError unless 1 < factor <= MAX_ROPE_FACTOR."""
    if not 1 < factor <= MAX_ROPE_FACTOR:  # NaN too
        raise UserError(f"--rope_factor {factor:g}: must be above 1 and at most {MAX_ROPE_FACTOR}")
