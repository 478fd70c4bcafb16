"""This project's data commands as programs that print their speed as JSON: MB are those of the UTF-8 text.

    python -m benchmarks.data_case FOLDER pretrain|sft|clean|tokenizer|exam

FOLDER is written by data_inputs.py. A program runs the command in this process; importing it is not timed.
Read next: data_inputs.py, data.py (the table), peer_cases/datasets_map.py, peer_cases/plain_tools.py.
"""

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from pathlib import Path

from common import cli
from common.cli import Config, flag
from common.errors import fail_in_one_line
from common.flag_types import pathlib_path

SHOTS = 5  # examples before each question of the exam


@dataclass(frozen=True)
class DataCaseConfig(Config):
    """The command line."""

    folder: Path = flag(MISSING, "the inputs; results go to FOLDER/out", type=pathlib_path, positional=True)
    what: str = flag(MISSING, "the program", positional=True, choices=("pretrain", "sft", "clean", "tokenizer", "exam"))


def run_command(script: str, arguments: list[str]) -> None:
    """Run a script of this project with these arguments; its output goes to stderr."""
    sys.argv = [script, *arguments]
    with contextlib.redirect_stdout(sys.stderr):
        importlib.import_module(script.removesuffix(".py")).main()


def command_of(what: str, folder: Path, exam: str) -> tuple[str, list[str]]:
    """Return the script and its arguments."""
    out, tokenizer = str(folder / "out" / f"{what}_{os.getpid()}"), str(folder / "tokenizer")
    text, chats = str(folder / "text.jsonl"), str(folder / "chats.jsonl")
    data = ["--tokenizer", tokenizer, "--out_dir", out]
    return {
        "pretrain": ("data_process.py", ["pretrain", text, *data]),
        "sft": ("data_process.py", ["sft", chats, *data]),
        "clean": ("data_process.py", ["clean", text, "--out_dir", out]),
        "tokenizer": ("train_tokenizer.py", [text, "--out_dir", out, "--byte_budget", str(10**9)]),
        "exam": ("eval_ceval.py", ["--data", exam, "--checkpoint", str(folder / "model.pth"), "--shots", str(SHOTS),
                                   "--out_dir", out, "--json", f"{out}.json"]),
    }[what]  # fmt: skip


def cpu_seconds() -> float:
    """CPU seconds of this process and of its finished children."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Return (seconds, CPU seconds) of a call."""
    start, cpu_start = time.perf_counter(), cpu_seconds()
    work()
    return time.perf_counter() - start, cpu_seconds() - cpu_start


def main() -> None:
    config = cli.parse(DataCaseConfig, __doc__)
    sizes = json.loads((config.folder / "sizes.json").read_text(encoding="utf-8"))
    script, arguments = command_of(config.what, config.folder, sizes["exam"])
    importlib.import_module(script.removesuffix(".py"))
    seconds, cpu = timed(lambda: run_command(script, arguments))
    if config.what == "exam":
        result = json.loads(Path(arguments[-1]).read_text(encoding="utf-8"))
        numbers = {"questions_per_second": sizes["questions"] / max(result["seconds"], 0.05)}
    else:
        megabytes = sizes["chats" if config.what == "sft" else "text"] / 1e6
        numbers = {"mb_per_second": megabytes / seconds, "mb_per_cpu_second": megabytes / cpu}
    print(json.dumps(numbers | {"seconds": seconds}))


if __name__ == "__main__":
    with fail_in_one_line():
        main()
