"""TrainSpec: what a training case of training.py and growth.py runs, and the JSON line that it prints.

    python -m benchmarks.train_case '{"model": {…}, "tokens": "…/train_000.bin", "batch_size": 8, …}'
    {"tokens_per_second": 1490.2, "step_seconds": 2.748, "peak_memory_mb": 2210.5, "parameters": 26878464, …}

A step is timed from the end of the one before it, so reading its batch counts. The first WARMUP_STEPS steps do not
count: they allocate memory, and compile where something is compiled. tokens_per_second is that of the median step.
Cases of peers import this module too: it imports only the standard library.
Read next: train_case.py (our case), peer_cases/ (those of peers).
"""

import dataclasses
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WARMUP_STEPS = 2


@dataclass(frozen=True)
class TrainSpec:
    """A training case: model, data, batch and device. `flags`: further flags of 1-pretrain.py, for our case only."""

    model: dict[str, Any]  # the fields of ModelConfig
    tokens: str  # file of little-endian uint16 token ids, one stream
    batch_size: int  # rows per step, of all processes
    seq_len: int  # tokens per row
    steps: int  # timed steps, after WARMUP_STEPS others
    dtype: str = "float32"  # of matrix products (autocast): float32 or bfloat16
    device: str = "cpu"
    flags: tuple[str, ...] = ()

    @property
    def all_steps(self) -> int:
        return WARMUP_STEPS + self.steps

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream: those of all steps and the label of the last one."""
        return self.all_steps * self.batch_size * self.seq_len + 1

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> "TrainSpec":
        values = json.loads(text)
        return TrainSpec(**{**values, "flags": tuple(values["flags"])})


class StepTimes:
    """Seconds of the steps. `wait` waits for the device: torch.cuda.synchronize on a GPU."""

    def __init__(self, wait: Callable[[], object] = lambda: None) -> None:
        self.wait, self.seconds = wait, list[float]()
        self.start()

    def start(self) -> None:
        """The next step begins here, not at the end of the last one."""
        self.wait()
        self.last = time.perf_counter()

    def end_step(self) -> None:
        self.wait()
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def print_result(spec: TrainSpec, times: StepTimes, first_loss: float, parameters: int, gpu_memory: float = 0) -> None:
    """Print the JSON line of a case. first_loss: per token; gpu_memory: peak bytes, 0 on a CPU."""
    median = statistics.median(times.seconds[WARMUP_STEPS:])
    result = {"tokens_per_second": spec.batch_size * spec.seq_len / median, "step_seconds": median,
              "first_loss": first_loss, "parameters": parameters}  # fmt: skip
    memory = gpu_memory / 2**20 or peak_resident_mb()
    print(json.dumps(result | ({"peak_memory_mb": memory} if memory else {})), flush=True)


def peak_resident_mb() -> float:
    """Return the largest resident set of this process in MiB, without that of its parent; 0 where it is unknown."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.is_file() else None
    return int(found[1]) / 2**10 if found else 0.0
