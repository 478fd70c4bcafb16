"""Run 1-pretrain.py and read tokens per second from its log: the second half of the steps, without compilation.

    python -m benchmarks.pretrain_throughput FOLDER --steps 200 --flags "--preset small --batch_size 64"

FOLDER is written by `python -m benchmarks.inputs FOLDER --tokens N`; the checkpoint and the log are deleted. Prints
{"tokens_per_second": …} and on a GPU peak_memory_mb. The time of the loader and of the log counts, that of validation
and saves does not.
Read next: gpu.py (the table), ../trainer/loop.py.
"""

import importlib
import json
import shlex
import sys
import tempfile
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch

from common import cli
from common.cli import Config, flag
from common.errors import fail_in_one_line
from common.flag_types import int_at_least, pathlib_path

NEVER = str(10**9)  # an interval in steps


@dataclass(frozen=True)
class PretrainRunConfig(Config):
    """The command line."""

    folder: Path = flag(MISSING, "written by benchmarks/inputs.py", type=pathlib_path, positional=True)
    steps: int = flag(200, "optimizer steps; the first half is warm-up", type=int_at_least(4))
    flags: str = flag("", "further flags of 1-pretrain.py")


def throughput(rows: list[dict[str, Any]]) -> float:
    """Return tokens per second between the middle and the last of the log's rows."""
    steps = [row for row in rows if "tokens_per_second" in row]
    middle, last = steps[len(steps) // 2], steps[-1]
    return float((last["tokens"] - middle["tokens"]) / max(last["seconds"] - middle["seconds"], 1e-9))


def main() -> None:
    config = cli.parse(PretrainRunConfig, __doc__)
    with tempfile.TemporaryDirectory(prefix="benchmark_") as out:
        flags = ["--data_path", str(config.folder / "shards"), "--tokenizer", str(config.folder / "tokenizer")]
        flags += ["--out_dir", out, "--max_steps", str(config.steps), "--log_interval", str(max(1, config.steps // 20))]
        flags += ["--eval_interval", NEVER, "--save_interval", NEVER, *shlex.split(config.flags)]
        sys.argv = ["1-pretrain.py", *flags]
        importlib.import_module("1-pretrain").main()
        log = next(Path(out).glob("*.jsonl"))
        speed = throughput([json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()])
    memory = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0
    print(json.dumps({"tokens_per_second": speed} | ({"peak_memory_mb": memory} if memory else {})))


if __name__ == "__main__":
    with fail_in_one_line():
        main()
