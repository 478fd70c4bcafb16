"""The flags and the clock of the programs that benchmarks/rollouts.py compares.

A batch is sampled once to warm up and then REPEATS times; the median counts. Imports only the standard library.
Read next: rollout_case.py, peer_cases/transformers_rollouts.py.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from pathlib import Path

from common.cli import Config, flag
from common.flag_types import pathlib_path, positive_int

REPEATS = 5


@dataclass(frozen=True)
class RolloutSettings(Config):
    """The flags of both programs. `folder` holds hf/ and prompts.json, a list of lists of token ids."""

    folder: Path = flag(MISSING, "written with --prepare", type=pathlib_path, positional=True)
    group_size: int = flag(8, "answers to each prompt", type=positive_int)
    max_new_tokens: int = flag(64, "longest answer", type=positive_int)
    stop: bool = flag(True, "answers end at a stop token")


def measure(sample: Callable[[int], list[int]]) -> dict[str, float]:
    """`sample` generates a batch with this seed and returns the tokens of each answer, with its stop token."""
    sample(0)
    speeds, lengths = [], []
    for seed in range(1, REPEATS + 1):
        start = time.perf_counter()
        new = sample(seed)
        speeds.append(sum(new) / (time.perf_counter() - start))
        lengths += new
    return {"tokens_per_second": statistics.median(speeds), "mean_length": statistics.mean(lengths)}
