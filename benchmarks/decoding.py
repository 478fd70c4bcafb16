"""Measure one text generator: tokens per second, time to first token, and token times on busy cores.

    tokens_per_second_R_rows      R (n - 1) / (seconds of n new tokens - seconds of one); n = 192, prompts of 64 tokens
    first_token_ms_P              time of one new token after a prompt of P tokens: 64, 384; median of 3
    busy_median_ms, busy_p90_ms   time of a token of one row while an endless loop runs on every core

The prompts are random tokens, each used once, so that no cache of prompts helps. A generator is a program:

    python -m benchmarks.decode_mengya FOLDER --dtype bfloat16 --rows 1,16      prints these numbers as a JSON object

Imports only the standard library: the programs of other projects run in an environment of their own.
Read next: decode_mengya.py, peer_cases/transformers_generate.py, peer_cases/llama_cpp_server.py (the programs),
generation.py (the table).
"""

import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Protocol

from common.cli import Config, NameList, flag
from common.flag_types import int_at_least, non_negative_int, pathlib_path

CONTEXT = 512  # of the model
PROMPT_TOKENS, LONG_PROMPT_TOKENS, NEW_TOKENS = 64, 384, 192
REPEATS = 3  # of the time to first token
BUSY_TOKENS = 48  # measured on busy cores
FIRST_TOKEN_ID = 300  # smaller ids are special tokens and single bytes
Prompt = list[int]


@dataclass(frozen=True)
class DecodingConfig(Config):
    """The flags of every program."""

    folder: Path = flag(MISSING, "written by benchmarks/inputs.py", type=pathlib_path, positional=True)
    dtype: str = flag("float32", "number format of the weights: float32, bfloat16; int8 and q8_0 where supported")
    device: str = flag("cpu", "cpu, or cuda")
    rows: tuple[str, ...] = flag(("1", "16"), "numbers of sequences", action=NameList)
    threads: int = flag(0, "threads (0: OMP_NUM_THREADS, else one per core)", type=non_negative_int)
    new_tokens: int = flag(NEW_TOKENS, "tokens per sequence", type=int_at_least(2))
    busy: bool = flag(False, "also measure token times while a busy loop runs on each core")

    @property
    def num_threads(self) -> int:
        return self.threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or num_cores()

    def model_config(self) -> dict[str, Any]:
        """config.json of the transformers folder."""
        config: dict[str, Any] = json.loads((self.folder / "hf/config.json").read_text(encoding="utf-8"))
        return config


class Generator(Protocol):
    """A model that decodes greedily and always writes the requested number of tokens."""

    weight_bytes: int  # bytes of the weights that a decode step reads

    def generate(self, prompts: list[Prompt], new_tokens: int) -> None:
        """Continue every prompt; return when the last token is known to the host."""

    def token_times(self, prompt: Prompt, new_tokens: int) -> list[float]:
        """Return time.perf_counter() at the arrival of each token; one entry per token."""


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def speed_metric(rows: int) -> str:
    """Return the name of the number of tokens per second of all rows together."""
    return f"tokens_per_second_{rows}_row{'s' if rows > 1 else ''}"


def measure_generator(generator: Generator, config: DecodingConfig) -> dict[str, float]:
    """Return the numbers above, and weight_bytes."""
    rng, vocab_size = random.Random(0), config.model_config()["vocab_size"]

    def prompts(rows: int, length: int) -> list[Prompt]:
        return [[rng.randrange(FIRST_TOKEN_ID, vocab_size) for _ in range(length)] for _ in range(rows)]

    def seconds(rows: int, length: int, tokens: int) -> float:
        batch, start = prompts(rows, length), time.perf_counter()
        generator.generate(batch, tokens)
        return time.perf_counter() - start

    numbers: dict[str, float] = {"weight_bytes": generator.weight_bytes}
    for rows in map(int, config.rows):
        seconds(rows, PROMPT_TOKENS, 4)  # warm-up
        first = statistics.median(seconds(rows, PROMPT_TOKENS, 1) for _ in range(REPEATS))
        whole = seconds(rows, PROMPT_TOKENS, config.new_tokens)
        numbers[speed_metric(rows)] = rows * (config.new_tokens - 1) / max(whole - first, 1e-9)
    for length in (PROMPT_TOKENS, LONG_PROMPT_TOKENS):
        seconds(1, length, 1)
        numbers[f"first_token_ms_{length}"] = 1e3 * statistics.median(seconds(1, length, 1) for _ in range(REPEATS))
    if config.busy:
        generator.token_times(prompts(1, PROMPT_TOKENS)[0], 2)
        with busy_cores():
            times = generator.token_times(prompts(1, PROMPT_TOKENS)[0], BUSY_TOKENS)
        gaps = sorted(1e3 * (after - before) for before, after in itertools.pairwise(times))
        numbers["busy_median_ms"], numbers["busy_p90_ms"] = statistics.median(gaps), gaps[len(gaps) * 9 // 10]
    if config.device != "cpu":
        import torch  # a GPU's generator has imported it; llama.cpp's needs none

        numbers["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return numbers


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """Inside, one process per core runs an endless loop."""
    command = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    loops = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(num_cores())]  # nosec B603
    try:
        for loop in loops:
            assert loop.stdout
            loop.stdout.readline()  # it has started
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.communicate()
