"""The scaling law behind --minutes: bits per byte from model size and tokens; and the sizes to choose from.

    L(N, D) = E + A / N^alpha + B / D^beta        Hoffmann et al. 2022, arXiv:2203.15556, section 3.3, approach 3
    D = U + U R* (1 - exp(-R / R*))               Muennighoff et al. 2023, arXiv:2305.16264, section 3.1

N: parameters, counted as the law's `parameters` says. D: effective tokens: of a text of U tokens that is read 1 + R
times, each further pass is worth less. R* = 15.4 is the paper's; our sweep did not measure it.

scaling_law.json has the coefficients. `python -m benchmarks.size_sweep --fit` computes them from docs/size_sweep.csv.
Read next: dial.py (the choice), ../benchmarks/size_sweep.py (the measured points).
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.parameters import count_parameters

LAW_FILE = Path(__file__).with_name("scaling_law.json")
REPEAT_DECAY = 15.39  # R* of the formula above

# dim, layers, key/value heads, context in tokens. Heads have 64 dimensions; depth grows with width.
LADDER = (
    (128, 3, 1, 256),  # 2.2 M parameters with a vocabulary of 6,400
    (192, 3, 1, 256),
    (192, 5, 1, 256),
    (256, 4, 2, 256),
    (256, 6, 2, 256),
    (320, 6, 1, 256),
    (384, 6, 2, 256),  # 14 M
    (448, 7, 1, 512),
    (512, 8, 4, 512),
    (576, 9, 3, 512),
    (640, 10, 5, 512),
    (768, 10, 4, 512),
    (768, 16, 4, 512),  # 111 M
    (1024, 16, 4, 512),
    (1280, 20, 5, 512),
    (1536, 24, 8, 512),  # 624 M
)


def ladder_fields(rung: tuple[int, int, int, int]) -> dict[str, Any]:
    """Return the fields of ModelConfig of an entry of LADDER.

    With an output layer of its own and QK-norm (the architecture of Qwen3): each 1 % fewer bits per byte at equal
    tokens (LOG.md).
    """
    dim, layers, kv_heads, context = rung
    return {
        "dim": dim, "n_layers": layers, "n_heads": dim // 64, "n_kv_heads": kv_heads, "max_seq_len": context,
        "tie_embeddings": False, "qk_norm": True,
    }  # fmt: skip


@dataclass(frozen=True)
class ScalingLaw:
    """The five coefficients, and what they were fitted to.

    parameters: what N counts, a field of ParameterCount. flops: of the longest run. text: the held-out text.
    """

    parameters: str
    E: float
    A: float
    alpha: float
    B: float
    beta: float
    flops: float = math.inf
    text: str = ""

    def bits_per_byte(self, config: ModelConfig, tokens: float) -> float:
        """Return the predicted bits per byte on held-out text after `tokens` effective tokens."""
        size = getattr(count_parameters(config), self.parameters)
        return self.E + self.A / size**self.alpha + self.B / tokens**self.beta


def read_law() -> ScalingLaw:
    return ScalingLaw(**json.loads(LAW_FILE.read_text(encoding="utf-8")))


def effective_tokens(tokens: float, texts: Iterable[tuple[float, float]]) -> float:
    """Return the effective tokens of a run of `tokens`. texts: (fraction of the run's tokens, unique tokens) of each.

    A text that is read less than once counts as it is.
    """
    total = 0.0
    for fraction, unique in texts:
        repeats = fraction * tokens / unique - 1
        total += (
            unique * (1 + REPEAT_DECAY * -math.expm1(-repeats / REPEAT_DECAY)) if repeats > 0 else fraction * tokens
        )
    return total
