"""Measure how fast the cores read memory: the limit of decoding, which reads all weights for every token.

    python -m benchmarks.memory_read --threads 2        {"gb_per_second": 18.8, …_float32, …_bfloat16}

Reads a buffer that is larger than all caches by matrix-vector products, the operation of decoding, and by a sum. The
limit is the fastest read of any dtype.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.decoding import num_cores
from common import cli
from common.cli import Config, flag
from common.errors import fail_in_one_line
from common.flag_types import non_negative_int, positive_int

WIDTH, REPEATS = 2048, 5


@dataclass(frozen=True)
class MemoryReadConfig(Config):
    """The command line."""

    threads: int = flag(0, "threads (0: one per core)", type=non_negative_int)
    megabytes: int = flag(512, "size of the buffer", type=positive_int)


def fastest(read: Callable[[], object]) -> float:
    """Return the seconds of the fastest of REPEATS calls, after one."""
    read()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        read()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.inference_mode()
def measure_reads(megabytes: int) -> dict[str, float]:
    """Return GB/s: the fastest, and those of fp32 and bf16."""
    numbers = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(megabytes * 2**20 // WIDTH // dtype.itemsize, WIDTH, dtype=dtype)
        vector = torch.ones(WIDTH, dtype=dtype)
        seconds = min(fastest(lambda: torch.mv(matrix, vector)), fastest(matrix.sum))  # noqa: B023
        name = str(dtype).removeprefix("torch.")
        numbers[f"gb_per_second_{name}"] = matrix.numel() * dtype.itemsize / seconds / 1e9
    return {"gb_per_second": max(numbers.values()), **numbers}


if __name__ == "__main__":
    with fail_in_one_line():
        run = cli.parse(MemoryReadConfig, __doc__)
        torch.set_num_threads(run.threads or num_cores())
        print(json.dumps(measure_reads(run.megabytes)))
