"""Compare the speed and the peak memory of two commits, command by command.

    python -m benchmarks.compare_commits OLD_COMMIT                compare with HEAD, without uncommitted changes
    python -m benchmarks.compare_commits OLD_COMMIT NEW_COMMIT     compare two commits
    python -m benchmarks.compare_commits OLD_COMMIT --rounds 5     more rounds: steadier medians

Each commit is checked out in a temporary git worktree. A round runs every command in the old and then in the new
checkout (odd rounds: new, then old), on the CPU with one thread, so that both meet the same load of the machine:

    data      data_process.py pretrain and sft on a demo world       wall seconds
    train     1-pretrain.py, two model sizes                         optimizer steps per second, from the training log
    --help    every script                                           wall seconds
    memory    the largest peak resident set of a command (ru_maxrss) of each group, MB

Prints the medians over the rounds and new / old. Takes about 8 minutes with 3 rounds on a quiet machine.
Read next: bit_for_bit.py (the outputs of two commits are equal), journeys.py (files that data passes).
"""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bit_for_bit import CommandFailed, demo_world_module, run_git
from common import cli
from common.cli import MISSING, Config, flag
from common.errors import UserError, fail_in_one_line
from common.flag_types import positive_int

WORLD = "--seed 1 --statement_rounds 20 --chat_rounds 2 --questions 2 --out_dir {out}/world"
TOKENIZER = "train_tokenizer.py {out}/world/words.jsonl --vocab_size 2048 --out_dir {out}/tokenizer"
DATA = "data_process.py {kind} {out}/world/{file}.jsonl --tokenizer {out}/tokenizer --out_dir {out}/{kind}"
TRAIN = (
    "1-pretrain.py --data_path {out}/pretrain --tokenizer {out}/tokenizer --out_dir {out} --device cpu --dtype float32"
    " --seed 1 --batch_size 8 --log_interval 1 --max_seq_len 128 "
)
SIZES = {
    "dim 64, 2 layers": "--dim 64 --n_layers 2 --n_heads 4 --n_kv_heads 2 --max_steps 150",
    "demo": "--preset demo --max_steps 20",
}

Measured = dict[str, list[float]]  # row of the table -> one value per round


@dataclass(frozen=True)
class CompareConfig(Config):
    """The command line."""

    commits: tuple[str, ...] = flag(MISSING, "OLD_COMMIT and NEW_COMMIT (default: HEAD)", positional=True, nargs="+")
    rounds: int = flag(3, "rounds of every command", type=positive_int)

    def check(self) -> None:
        if len(self.commits) > 2:
            raise UserError("compare two commits at a time")


def run_command(tree: Path, words: list[str]) -> tuple[float, float]:
    """Run a Python command in a checkout. Returns its wall seconds and peak memory in MB; CommandFailed if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(  # fixed commands, no shell
            [sys.executable, *words], cwd=tree, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )  # nosec B603
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        if process.returncode:
            output.seek(0)
            last = output.read().decode(errors="replace")[-1000:]
            raise CommandFailed(f"exit code {process.returncode} in {tree}: python {' '.join(words)}\n{last}")
    return seconds, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def steps_per_second(log: Path, batch_tokens: int = 8 * 128) -> float:
    """The median over the steps of a training log, without the first, which warms up."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return statistics.median([e["tokens_per_second"] / batch_tokens for e in entries if "tokens_per_second" in e][1:])


def measure_round(tree: Path, measured: Measured) -> None:
    """Run every command once in a checkout and append to `measured`."""
    out = tree / "out/compare"
    for folder in ("pretrain", "sft"):
        shutil.rmtree(out / folder, ignore_errors=True)
    peak: dict[str, float] = defaultdict(float)

    def run(group: str, command: str) -> float:
        seconds, memory = run_command(tree, command.format(out=out).split())
        peak[group] = max(peak[group], memory)
        return seconds

    for kind, file in (("pretrain", "pretrain"), ("sft", "chats")):
        seconds = run("data", DATA.replace("{kind}", kind).replace("{file}", file))
        measured[f"data_process.py {kind}, seconds"].append(seconds)
    for name, size in SIZES.items():
        run("train", TRAIN + size)
        measured[f"1-pretrain.py ({name}), steps per second"].append(steps_per_second(max(out.glob("*.jsonl"))))
        for path in out.glob("pretrain_*"):
            path.unlink()
    for script in sorted(path.name for path in tree.glob("*.py")):
        measured[f"{script} --help, seconds"].append(run("--help", f"{script} --help"))
    for group, memory in peak.items():
        measured[f"peak memory of {group}, MB"].append(memory)


@contextlib.contextmanager
def checked_out(commits: list[str]) -> Iterator[list[Path]]:
    """Check the commits out in temporary worktrees, which are removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="compare_commits_"))
    trees = [folder / f"{i}" for i in range(len(commits))]
    try:
        for commit, tree in zip(commits, trees, strict=True):
            run_git("worktree", "add", "--detach", "--quiet", str(tree), commit)
        yield trees
    finally:
        for tree in trees:
            with contextlib.suppress(CommandFailed):
                run_git("worktree", "remove", "--force", str(tree))
        shutil.rmtree(folder, ignore_errors=True)


def compare(commits: list[str], rounds: int) -> list[Measured]:
    """Measure the commits in interleaved rounds. Returns one table per commit."""
    tables: list[Measured] = [defaultdict(list) for _ in commits]
    with checked_out(commits) as trees:
        for tree in trees:
            for command in (f"-m {demo_world_module(tree)} {WORLD}", TOKENIZER):
                run_command(tree, command.format(out=tree / "out/compare").split())
        for i in range(rounds):
            order = list(zip(trees, tables, strict=True))
            for tree, table in order[:: -1 if i % 2 else 1]:
                print(f"round {i + 1} of {rounds}: {commits[trees.index(tree)]}", file=sys.stderr, flush=True)
                measure_round(tree, table)
    return tables


def main() -> None:
    config = cli.parse(CompareConfig, __doc__)
    commits = [*config.commits, "HEAD"][:2]
    try:
        old, new = compare(commits, config.rounds)
    except CommandFailed as error:
        raise UserError(str(error)) from None
    print(f"| median of {config.rounds} | {commits[0]} | {commits[1]} | new / old |\n|---|---:|---:|---:|")
    for row in old:
        medians = [statistics.median(table[row]) if row in table else float("nan") for table in (old, new)]
        print(f"| {row} | {medians[0]:.2f} | {medians[1]:.2f} | {medians[1] / medians[0]:.2f} |")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
