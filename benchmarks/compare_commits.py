"""Compare the speed and the peak memory of two commits, command by command.

    python -m benchmarks.compare_commits OLD_COMMIT [NEW_COMMIT]    NEW_COMMIT: HEAD, without uncommitted changes
    python -m benchmarks.compare_commits OLD_COMMIT --rounds 5      more rounds: steadier medians

Each commit is checked out in a temporary git worktree. A round runs every command in both checkouts, one after the
other, on the CPU with one thread; every other round starts with the new one.

    data     data_process.py pretrain and sft on a demo world    CPU seconds
    train    1-pretrain.py, two model sizes                      steps per second, from the training log
    help     --help of every script                              CPU seconds: nearly the wall time of a quiet machine
    memory   the largest peak resident set of each group         MB (ru_maxrss)

Prints the medians over the rounds and new / old. Three rounds take about 6 minutes on a quiet machine.
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
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path

from common import cli
from common.cli import Config, flag
from common.errors import UserError, fail_in_one_line
from common.flag_types import positive_int

ROOT = Path(__file__).resolve().parent.parent
WORLD = "-m demo_world.generator --seed 1 --statement_rounds 60 --chat_rounds 8 --questions 2 --out_dir {out}/world"
TOKENIZER = "train_tokenizer.py {out}/world/words.jsonl --vocab_size 2048 --out_dir {out}/tokenizer"
DATA = "data_process.py {kind} {out}/world/{file}.jsonl --tokenizer {out}/tokenizer --out_dir {out}/{kind}"
TRAIN = (
    "1-pretrain.py --data_path {out}/pretrain --tokenizer {out}/tokenizer --out_dir {out} --device cpu --dtype float32"
    " --seed 1 --batch_size 8 --log_interval 1 --max_seq_len 128 "
)
SIZES = {64: "--dim 64 --n_layers 2 --n_heads 4 --n_kv_heads 2 --max_steps 150", 256: "--preset demo --max_steps 20"}
STEP_TOKENS = 8 * 128

Measured = dict[str, list[float]]  # row of the table -> one value per round


@dataclass(frozen=True)
class CompareConfig(Config):
    """The command line."""

    old: str = flag(MISSING, "commit to compare with", positional=True)
    new: str = flag("HEAD", "commit to measure (default: HEAD)", positional=True)
    rounds: int = flag(3, "rounds of every command", type=positive_int)


def run_git(*arguments: str) -> None:
    completed = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)  # nosec B603, B607
    if completed.returncode:
        raise UserError(f"git {' '.join(arguments)}: {completed.stderr.strip()}")


def run_command(tree: Path, words: list[str]) -> tuple[float, float]:
    """Run a Python command in a checkout. Returns its CPU seconds and peak memory in MB. UserError if it fails.

    The peak of a child process is at least the memory of this process, which therefore imports no large library.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(  # fixed commands, no shell
            [sys.executable, *words], cwd=tree, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )  # nosec B603
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            last = output.read().decode(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"exit code {process.returncode} in {tree}: python {' '.join(words)}: {' '.join(last)}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def steps_per_second(out: Path) -> float:
    """The median over the steps of the training log in `out`, without the first, which warms up. Removes the log."""
    log = next(out.glob("pretrain_*.jsonl"))
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    log.unlink()
    return statistics.median([e["tokens_per_second"] / STEP_TOKENS for e in entries if "tokens_per_second" in e][1:])


def commands(tree: Path) -> list[tuple[str, str, str]]:
    """(group, row of the table, command) of every measurement."""
    found = [("data", f"data_process.py {kind}, CPU seconds", DATA.format(out="{out}", kind=kind, file=file))
             for kind, file in (("pretrain", "pretrain"), ("sft", "chats"))]  # fmt: skip
    found += [("train", f"1-pretrain.py --dim {dim}, steps per second", TRAIN + size) for dim, size in SIZES.items()]
    scripts = sorted(path.name for path in tree.glob("*.py"))
    return found + [("help", f"{script} --help, CPU seconds", f"{script} --help") for script in scripts]


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
            with contextlib.suppress(UserError):
                run_git("worktree", "remove", "--force", str(tree))
        shutil.rmtree(folder, ignore_errors=True)


def compare(commits: list[str], rounds: int) -> list[Measured]:
    """Measure the commits, interleaved. Returns {row of the table: one value per round} of each commit."""
    tables: list[Measured] = [defaultdict(list) for _ in commits]
    with checked_out(commits) as trees:
        for tree in trees:
            for command in (WORLD, TOKENIZER):
                run_command(tree, command.format(out=tree / "out/compare").split())
        for i in range(rounds):
            print(f"round {i + 1} of {rounds}", file=sys.stderr, flush=True)
            peaks = [defaultdict[str, float](float) for _ in commits]
            for group, row, command in commands(trees[0]):
                for k in (0, 1) if i % 2 == 0 else (1, 0):
                    out = trees[k] / "out/compare"
                    seconds, memory = run_command(trees[k], command.format(out=out).split())
                    value = steps_per_second(out) if group == "train" else seconds
                    tables[k][row].append(value)
                    peaks[k][group] = max(peaks[k][group], memory)
            for table, peak in zip(tables, peaks, strict=True):
                for group, memory in peak.items():
                    table[f"peak memory of {group}, MB"].append(memory)
    return tables


def main() -> None:
    config = cli.parse(CompareConfig, __doc__)
    old, new = compare([config.old, config.new], config.rounds)
    print(f"| median of {config.rounds} | {config.old} | {config.new} | new / old |\n|---|---:|---:|---:|")
    for row in old:
        before, after = statistics.median(old[row]), statistics.median(new[row])
        print(f"| {row} | {before:.2f} | {after:.2f} | {after / before:.2f} |")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
