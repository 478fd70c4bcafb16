"""Train reference runs that vary as healthy runs do, and compute the curve and the band that runs are compared with.

    python -m benchmarks.reference_curves --data dataset/pretrain                   the missing runs of RUNS
    python -m benchmarks.reference_curves --data dataset/pretrain --only small      those of one size
    python -m benchmarks.reference_curves --fit                                     the bands and the picture

A run is one of 1-pretrain.py with one thread. Its log is kept as rows of docs/reference_runs.csv; it is not run again.
--fit writes trainer/reference_curves.csv and docs/reference_curves.png:

    ln(bits per byte) = level(size, tokens) + effect(variation) + residual        fitted by least squares
    median = exp(level)        low, high = exp(level -+ 1.645 s sqrt(1 + 1/n))        n: runs with this size and tokens
    s^2 = variance of the effects + variance of the residuals

1.645 s leaves 5 % of a normal distribution on each side. The variations are chosen, not drawn: text (Chinese, English,
both), learning rate and batch size by a factor of two, decay or none, seeds. Most of them run at the smallest size; the
model assumes that a variation has the same effect at other sizes and tokens. With ten runs s is known within a third.
Read next: ../trainer/reference.py (the comparison).
"""

import csv
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.harness import save_figure
from common.cli import Config, NameList, flag, parse
from common.errors import UserError, fail_in_one_line
from common.files import write_text
from common.flag_types import path_string
from model.config import PRESETS, ModelConfig
from model.parameters import count_parameters
from trainer.reference import (
    FIRST_TOKENS,
    REFERENCE_FILE,
    REFERENCE_STEP_TOKENS,
    training_points,
)

ROOT = Path(__file__).resolve().parent.parent
CSV, PICTURE = ROOT / "docs" / "reference_runs.csv", ROOT / "docs" / "reference_curves.png"
UNTIED = {"max_seq_len": 256, "tie_embeddings": False}  # as the sizes of --minutes
SIZES = {
    "128x3": {"dim": 128, "n_layers": 3, "n_heads": 2, "n_kv_heads": 1, **UNTIED},
    "384x6": {"dim": 384, "n_layers": 6, "n_heads": 6, "n_kv_heads": 2, "qk_norm": True, **UNTIED},
    **{name: PRESETS[name] for name in ("demo", "small", "base")},
}
TEXTS = {"zh": "zh=1", "en": "en=1", "both": "zh=0.5,en=0.5"}
LEARNING_RATE = 8e-3  # the default of 1-pretrain.py
GRID = FIRST_TOKENS * 2.0 ** (np.arange(-1, 17) / 2)  # tokens at which the curves are computed
QUANTILE = 1.645  # of the normal distribution, at 95 %


@dataclass(frozen=True)
class ReferenceRun:
    """A run, and how it varies. learning_rate and batch: multiples of the default."""

    size: str
    steps: int  # of REFERENCE_STEP_TOKENS
    text: str = "both"
    learning_rate: float = 1.0
    batch: float = 1.0
    decays: bool = False  # the learning rate, to 0 at the end; if not, it stays constant after the warm-up
    seed: int = 42

    @property
    def variation(self) -> str:
        decay = "decay" if self.decays else "constant"
        return f"{self.text} lr x{self.learning_rate:g} batch x{self.batch:g} {decay} seed {self.seed}"

    @property
    def flags(self) -> list[str]:
        """The flags of 1-pretrain.py."""
        fields = SIZES[self.size]
        steps = round(self.steps / self.batch)
        flags = {
            **fields, "batch_size": round(self.batch * REFERENCE_STEP_TOKENS / ModelConfig(**fields).max_seq_len),
            "max_steps": steps, "learning_rate": f"{self.learning_rate * LEARNING_RATE:g}",
            "min_lr_ratio": int(not self.decays), "mix": TEXTS[self.text], "seed": self.seed, "log_interval": 5,
            "eval_interval": steps, "save_interval": steps, "eval_tokens": 1, "compile": "off",
        }  # fmt: skip
        return [str(part).lower() for name, value in flags.items() for part in (f"--{name}", value)]


SMALLEST = ReferenceRun("128x3", 120)
RUNS = (  # the most informative ones first
    replace(SMALLEST, steps=300),
    replace(SMALLEST, steps=200, text="zh"),
    replace(SMALLEST, text="en"),
    replace(SMALLEST, learning_rate=0.5),
    replace(SMALLEST, learning_rate=2),
    replace(SMALLEST, decays=True, seed=1),
    ReferenceRun("small", 50),
    ReferenceRun("384x6", 60),
    ReferenceRun("demo", 100),
    replace(SMALLEST, text="zh", learning_rate=2, batch=0.5, seed=2),
    replace(SMALLEST, text="en", learning_rate=0.5, batch=2, seed=3),
    replace(SMALLEST, batch=0.5),
    replace(SMALLEST, batch=2),
    replace(SMALLEST, steps=4952, decays=True),  # ran as --minutes 20, which took these flags
    ReferenceRun("base", 50),
)


class Band(NamedTuple):
    """A row of trainer/reference_curves.csv: bits per byte of the runs of a size at a number of tokens."""

    size: str
    tied: int  # whether the output layer is tied to the embeddings
    layer_matrices: int  # their parameters
    tokens: int
    low: float
    median: float
    high: float
    runs: int


Points = list[tuple[float, float]]  # (tokens, bits per byte)
Curves = dict[tuple[str, str], Points]  # (size, variation) -> the log of the run


@dataclass(frozen=True)
class ReferenceConfig(Config):
    """The command line."""

    data: str = flag("dataset/pretrain", "folder written by data_process.py pretrain", type=path_string)
    tokenizer: str = flag("model/tokenizer", "its tokenizer", type=path_string)
    only: tuple[str, ...] = flag((), "sizes to run, as 128x3,small (default: all)", action=NameList)
    fit: bool = flag(False, "compute the bands from the runs there are, and draw them")
    points: str = flag(str(CSV), "file of the runs", type=path_string)

    def check(self) -> None:
        if unknown := [name for name in self.only if name not in SIZES]:
            raise UserError(f"--only {unknown[0]}: choose from {', '.join(SIZES)}")


# ---- the runs --------------------------------------------------------------------------------------------------------
def read_runs(path: Path) -> Curves:
    """Return the runs of a file, {} if there is none."""
    curves: Curves = {}
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                point = float(row["tokens"]), float(row["bits_per_byte"])
                curves.setdefault((row["size"], row["variation"]), []).append(point)
    return curves


def write_runs(path: Path, curves: Curves) -> None:
    rows = [(*key, round(tokens), f"{value:.4f}") for key, points in curves.items() for tokens, value in points]
    write_rows(path, ("size", "variation", "tokens", "bits_per_byte"), rows)


def write_rows(path: Path, names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([names, *rows])
    write_text(path, text.getvalue())


def train_run(config: ReferenceConfig, run: ReferenceRun) -> Points:
    """Train one run in a new process with one thread. Raises UserError if it fails."""
    with tempfile.TemporaryDirectory(prefix="reference_curves_") as out:
        where = ["--data_path", config.data, "--tokenizer", config.tokenizer, "--out_dir", out]
        done = subprocess.run(  # this project's own script, no shell
            [sys.executable, "1-pretrain.py", *run.flags, *where], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # nosec B603  # fmt: skip
        if done.returncode:
            raise UserError(f"{run.size}, {run.variation}: {(done.stderr or done.stdout).strip()[-500:]}")
        lines = next(Path(out).glob("*.jsonl")).read_text(encoding="utf-8").splitlines()
    return sorted(training_points([json.loads(line) for line in lines]))


def train_missing(config: ReferenceConfig) -> None:
    """Train the runs that the file lacks, and add each to the file."""
    path = Path(config.points)
    for run in RUNS:
        curves = read_runs(path)
        if (run.size, run.variation) in curves or (config.only and run.size not in config.only):
            continue
        curves[run.size, run.variation] = points = train_run(config, run)
        write_runs(path, curves)
        print(f"{run.size}, {run.variation}: {points[-1][1]:.3f} bits per byte", flush=True)


# ---- the bands -------------------------------------------------------------------------------------------------------
def smooth(points: Points, tokens: np.ndarray) -> np.ndarray:
    """Return ln of bits per byte at these numbers of tokens, NaN beyond the last row: (len(tokens),).

    A line is fitted to the rows from half to twice the tokens; their weights fall linearly to 0 at these limits. Up to
    3 % beyond the last row, which is the middle of its steps.
    """
    x, y = np.log(np.array(points).T)
    found = np.full(len(tokens), np.nan)
    for i, at in enumerate(np.log(tokens)):
        weights = np.clip(1 - np.abs(x - at) / np.log(2), 0, None)
        if at <= x[-1] + 0.03 and (weights > 0).sum() >= 3:
            found[i] = np.polyval(np.polyfit(x - at, y, 1, w=np.sqrt(weights)), 0.0)
    return found


def fit_bands(curves: Curves) -> tuple[list[Band], float]:
    """Return the rows of the bands by size and tokens, and s (module docstring). Raises UserError for too few runs."""
    values = {key: smooth(points, GRID) for key, points in curves.items()}
    seen = [(size, i, variation) for (size, variation), y in values.items() for i in np.flatnonzero(~np.isnan(y))]
    levels = sorted({(list(SIZES).index(size), i) for size, i, _ in seen})
    variations = sorted({variation for _, _, variation in seen})
    if len(variations) < 3:
        raise UserError(f"{len(variations)} runs do not show how healthy runs vary: run more of them first")
    matrix = np.zeros((len(seen) + 1, len(levels) + len(variations)))
    matrix[-1, len(levels) :] = 1  # the effects have the mean 0
    for row, (size, i, variation) in enumerate(seen):
        matrix[row, levels.index((list(SIZES).index(size), i))] = 1
        matrix[row, len(levels) + variations.index(variation)] = 1
    target = np.array([*(values[size, variation][i] for size, i, variation in seen), 0.0])
    found = np.linalg.lstsq(matrix, target)[0]
    residuals = (target - matrix @ found)[:-1]
    free = len(seen) - len(levels) - len(variations) + 1  # degrees of freedom of the residuals
    spread = math.sqrt(np.var(found[len(levels) :], ddof=1) + (residuals**2).sum() / max(free, 1))
    rows = []
    for (place, i), level in zip(levels, found, strict=False):
        size = list(SIZES)[place]
        config, runs = ModelConfig(**SIZES[size]), sum(each[:2] == (size, i) for each in seen)
        width = QUANTILE * spread * math.sqrt(1 + 1 / runs)
        low, median, high = (round(math.exp(level + sign * width), 4) for sign in (-1, 0, 1))
        matrices = count_parameters(config).layer_matrices
        rows.append(Band(size, int(config.tie_embeddings), matrices, round(GRID[i]), low, median, high, runs))
    return rows, spread


def draw(curves: Curves, bands: Sequence[Band], path: Path) -> None:
    """Draw the runs of every size and their band, bits per byte against tokens."""
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(band.size for band in bands))
    figure = Figure(figsize=(4 * len(sizes), 4))
    for axes, size in zip(figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0], sizes, strict=True):
        mine = [band for band in bands if band.size == size]
        tokens = [band.tokens for band in mine]
        axes.fill_between(tokens, [band.low for band in mine], [band.high for band in mine], color="C7", alpha=0.3)
        axes.plot(tokens, [band.median for band in mine], "k--", linewidth=1)
        for (name, variation), points in curves.items():
            if name == size:
                axes.plot(*np.array(points).T, linewidth=0.7, label=variation)
        axes.set(title=size, xscale="log", xlabel="tokens trained", ylim=(1.7, 3.6))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=5)
        axes.set_ylabel("bits per byte of the training text" if size == sizes[0] else "")
    save_figure(figure, path)


def main() -> None:
    config = parse(ReferenceConfig, __doc__)
    if not config.fit:
        return train_missing(config)
    curves = read_runs(Path(config.points))
    bands, spread = fit_bands(curves)
    write_rows(REFERENCE_FILE, Band._fields, bands)
    for band in bands:
        print(f"{band.size}, {band.tokens / 1e6:.2f} M tokens: {band.low:.3f} {band.median:.3f} {band.high:.3f}")
    print(f"s = {spread:.1%}")
    draw(curves, bands, PICTURE)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
