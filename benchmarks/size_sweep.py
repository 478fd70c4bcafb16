"""Train models of several sizes on several numbers of tokens, and fit the scaling law that --minutes uses.

    python -m benchmarks.size_sweep --data dataset/pretrain --mix zh=0.5,en=0.5     the missing points of POINTS
    python -m benchmarks.size_sweep --data dataset/pretrain --only 128x3,256x4      those of two sizes
    python -m benchmarks.size_sweep --fit                                           the law and the picture

Every point is a run of 1-pretrain.py with its default flags, one thread, at the batch that --minutes takes. It must be
scored on as much held-out text as --minutes uses (the default of --eval_tokens): other text has another level. Rows
with the flags `--minutes M` are such runs on two cores; what they read twice counts as new text in the fit. A finished
point is a row of docs/size_sweep.csv, and is not run again. --fit writes trainer/scaling_law.json and
docs/size_sweep.png. The law is fitted as in Hoffmann et al. 2022, arXiv:2203.15556, section 3.3: Huber loss of the
logarithm of the bits per byte. For given exponents it is linear in E, A and B, so only the exponents are searched.
Read next: ../trainer/scaling_law.py (the formula), ../trainer/dial.py (its use).
"""

import csv
import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import save_figure
from common.cli import Config, NameList, flag, parse
from common.errors import UserError, fail_in_one_line
from common.files import write_json, write_text
from common.flag_types import path_string, seed
from model.config import ModelConfig
from model.parameters import count_parameters
from model.tokenizer import load_tokenizer
from trainer.dial import STEP_TOKENS
from trainer.scaling_law import LADDER, LAW_FILE, ScalingLaw, ladder_fields
from trainer.throughput import flops_per_token

ROOT = Path(__file__).resolve().parent.parent
CSV, PICTURE = ROOT / "docs" / "size_sweep.csv", ROOT / "docs" / "size_sweep.png"
# Size -> millions of tokens of its runs.
POINTS = {
    "128x3": (0.8, 2.5, 20.28),
    "192x3": (0.7, 1.8, 5),
    "256x4": (0.5, 1.2, 2.5),
    "320x6": (0.2, 0.5, 1.2),
    "384x6": (0.2, 0.4),
    "512x8": (0.16, 0.35),
}
TEXT = "half Chinese, half English"  # of --mix, and of the mean of zh and en
HUBER_DELTA = 1e-3  # as in the paper, of the logarithm of the loss
SIZE_MEASURES = ("layer_matrices", "matmul", "total")  # fields of ParameterCount that N may be
FIT_STEPS = 60  # runs of fewer steps are mostly warm-up: they are drawn, but not fitted
# alpha and beta are searched in the range of published laws (0.28 to 0.37: arXiv:2203.15556, 2305.16264, 2404.10102),
# with a margin: few points of short runs do not determine them together with E. First this grid, then around the best.
EXPONENTS = np.linspace(0.25, 0.4, 16)


@dataclass(frozen=True)
class SweepConfig(Config):
    """The command line."""

    data: str = flag("dataset/pretrain", "folder written by data_process.py pretrain", type=path_string)
    tokenizer: str = flag("model/tokenizer", "its tokenizer", type=path_string)
    mix: str = flag("zh=0.5,en=0.5", "mixture, as --mix of 1-pretrain.py", type=path_string)
    only: tuple[str, ...] = flag((), "sizes to run, as 128x3,256x4 (default: all)", action=NameList)
    seed: int = flag(42, "random seed of the runs", type=seed)
    fit: bool = flag(False, "fit the law to the points there are, and draw them")
    points: str = flag(str(CSV), "file of the points", type=path_string)

    def check(self) -> None:
        if unknown := [name for name in self.only if name not in POINTS]:
            raise UserError(f"--only {unknown[0]}: choose from {', '.join(POINTS)}")


@dataclass(frozen=True)
class Point:
    """A run: a row of the file. zh, en, bits_per_byte (their mean): on held-out text."""

    size: str
    parameters: int
    tokens: int
    zh: float
    en: float
    bits_per_byte: float
    seed: int
    flags: str

    @property
    def config(self) -> ModelConfig:
        return size_config(self.size)

    @property
    def flops(self) -> float:
        """The FLOPs of the run."""
        return self.tokens * flops_per_token(self.config, self.config.max_seq_len)


def fields_of(name: str) -> dict[str, Any]:
    """Return the fields of an entry of LADDER by its name, `dim`x`layers`."""
    return {f"{rung[0]}x{rung[1]}": ladder_fields(rung) for rung in LADDER}[name]


def size_config(name: str) -> ModelConfig:
    """Return the config of an entry of LADDER by its name, with the default vocabulary."""
    return ModelConfig(**fields_of(name))


# ---- the runs --------------------------------------------------------------------------------------------------------
def read_points(path: Path) -> list[Point]:
    """Return the points of a file, [] if there is none."""
    if not path.exists():
        return []
    kinds = {"size": str, "flags": str, "parameters": int, "tokens": int, "seed": int}
    with path.open(encoding="utf-8", newline="") as file:
        return [Point(**{k: kinds.get(k, float)(v) for k, v in row.items()}) for row in csv.DictReader(file)]


def write_points(path: Path, points: Sequence[Point]) -> None:
    """Write the points, sorted by size, tokens and seed."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Point)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(point) for point in sorted(points, key=point_key))
    write_text(path, text.getvalue())


def point_key(point: Point) -> tuple[int, int, int]:
    return point.parameters, point.tokens, point.seed


def point_steps(million_tokens: float) -> int:
    return max(1, round(million_tokens * 1e6 / STEP_TOKENS))


def run_point(config: SweepConfig, name: str, steps: int) -> Point:
    """Train one point in a new process with one thread. Raises UserError if it fails."""
    size = size_config(name)
    flags = {
        **fields_of(name), "batch_size": STEP_TOKENS // size.max_seq_len, "max_steps": steps,
        "mix": config.mix, "seed": config.seed, "eval_interval": steps, "save_interval": steps,
    }  # fmt: skip
    shown = " ".join(f"--{flag} {value}".lower() for flag, value in flags.items())
    with tempfile.TemporaryDirectory(prefix="size_sweep_") as out:
        where = ["--data_path", config.data, "--tokenizer", config.tokenizer, "--out_dir", out]
        done = subprocess.run(  # this project's own script, no shell
            [sys.executable, "1-pretrain.py", *shown.split(), *where], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # nosec B603  # fmt: skip
        if done.returncode:
            raise UserError(f"{name}, {steps} steps: {(done.stderr or done.stdout).strip()[-500:]}")
        lines = (Path(out) / f"pretrain_{size.dim}.jsonl").read_text(encoding="utf-8").splitlines()
    scores = [row for row in map(json.loads, lines) if "bits_per_byte" in row][-1]["bits_per_byte"]
    zh, en, tokens = round(scores["zh"], 4), round(scores["en"], 4), steps * STEP_TOKENS
    return Point(name, count_parameters(size).total, tokens, zh, en, round((zh + en) / 2, 4), config.seed, shown)


def run_missing(config: SweepConfig) -> None:
    """Run the points that the file lacks, those with few FLOPs first, and add each to the file."""
    if (found := load_tokenizer(config.tokenizer).vocab_size) != ModelConfig.vocab_size:
        raise UserError(
            f"the sweep is one of a vocabulary of {ModelConfig.vocab_size:,}, {config.tokenizer} has {found:,}"
        )
    path = Path(config.points)
    wanted = [(name, point_steps(tokens)) for name in config.only or POINTS for tokens in POINTS[name]]
    wanted.sort(key=lambda run: run[1] * flops_per_token(size_config(run[0]), 0))
    for name, steps in wanted:
        done = ((point.size, point.tokens, point.seed) for point in read_points(path))
        if (name, steps * STEP_TOKENS, config.seed) in done:
            continue
        point = run_point(config, name, steps)
        write_points(path, [*read_points(path), point])  # another process may have added some meanwhile
        print(f"{name}, {point.tokens / 1e6:.2f} M tokens: {point.bits_per_byte:.3f} bits per byte", flush=True)


# ---- the law ---------------------------------------------------------------------------------------------------------
def fit_factors(powers: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return E, A and B of at least 0 with the least Huber loss of the relative error, for given exponents.

    powers: (points, 3), the columns 1, N^-alpha and D^-beta. Iteratively reweighted least squares: an error above
    HUBER_DELTA counts linearly.
    """
    found, weights = np.zeros(3), 1 / scores
    for _ in range(20):
        columns = [0, 1, 2]
        while True:  # a negative factor becomes 0, the most negative one first
            part = np.linalg.lstsq(powers[:, columns] * weights[:, None], scores * weights, rcond=None)[0]
            if part.min() >= 0 or len(columns) == 1:
                break
            columns.pop(int(part.argmin()))
        found = np.zeros(3)
        found[columns] = np.maximum(part, 0)
        errors = np.abs(powers @ found / scores - 1)
        weights = np.sqrt(np.minimum(1, HUBER_DELTA / np.maximum(errors, 1e-12))) / scores
    return found


def huber_loss(errors: np.ndarray) -> float:
    small = np.minimum(np.abs(errors), HUBER_DELTA)
    return float((small * (np.abs(errors) - small / 2)).sum())


def fit_law(sizes: np.ndarray, tokens: np.ndarray, scores: np.ndarray) -> tuple[dict[str, float], float]:
    """Return the coefficients of the law with the least Huber loss of log(prediction / score), and that loss.

    sizes, tokens, scores: (points,). Raises UserError if there are fewer points than coefficients.
    """
    if len(scores) < 6:
        raise UserError(f"{len(scores)} points do not determine five coefficients: run more of them first")
    exponents, spacing = (EXPONENTS, EXPONENTS), float(EXPONENTS[1] - EXPONENTS[0])
    best, found = np.inf, dict[str, float]()
    for _ in range(4):
        for alpha, beta in itertools.product(*exponents):
            powers = np.stack([np.ones(len(sizes)), sizes**-alpha, tokens**-beta], axis=1)
            factors = fit_factors(powers, scores)
            loss = huber_loss(np.log(powers @ factors / scores))
            if loss < best:
                best = loss
                found = dict(zip("EAB", map(float, factors), strict=True)) | {
                    "alpha": float(alpha),
                    "beta": float(beta),
                }
        spacing /= 5  # then around the best
        near = spacing * np.arange(-6, 7)
        exponents = tuple(np.clip(found[name] + near, EXPONENTS[0], EXPONENTS[-1]) for name in ("alpha", "beta"))
    return found, best


def fit_points(points: Sequence[Point]) -> ScalingLaw:
    """Return the law of the points of at least FIT_STEPS steps, with the N of SIZE_MEASURES that fits best."""
    points = fitted_points(points)
    tokens, scores = (np.array([getattr(p, name) for p in points], float) for name in ("tokens", "bits_per_byte"))
    fits = []
    for measure in SIZE_MEASURES:
        sizes = np.array([getattr(count_parameters(point.config), measure) for point in points], float)
        found, loss = fit_law(sizes, tokens, scores)
        fits.append((loss, ScalingLaw(measure, **found, flops=max(p.flops for p in points), text=TEXT)))
    return min(fits, key=lambda fit: fit[0])[1]


def fitted_points(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if point.tokens >= FIT_STEPS * STEP_TOKENS]


def errors_table(law: ScalingLaw, points: Sequence[Point]) -> str:
    """Return a markdown table of the points: measured, predicted, relative error."""
    lines = ["| size | parameters, M | tokens, M | bits per byte | law | error |", "|---|---:|---:|---:|---:|---:|"]
    for point in points:
        expected = law.bits_per_byte(point.config, point.tokens)
        lines.append(
            f"| {point.size} | {point.parameters / 1e6:.1f} | {point.tokens / 1e6:.2f} | {point.bits_per_byte:.3f} | "
            f"{expected:.3f} | {expected / point.bits_per_byte - 1:+.1%} |"
        )
    return "\n".join(lines)


def draw(law: ScalingLaw, points: Sequence[Point], path: Path) -> None:
    """Draw bits per byte against FLOPs: points, the law's curve of every size, and the lowest of all curves.

    Points that are not fitted are hollow.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    flops = np.geomspace(min(p.flops for p in points) / 2, 30 * max(p.flops for p in points), 100)

    def curve(config: ModelConfig) -> np.ndarray:
        tokens = flops / flops_per_token(config, config.max_seq_len)
        return np.array([law.bits_per_byte(config, each) for each in tokens])

    for i, name in enumerate(dict.fromkeys(point.size for point in points)):
        mine = [point for point in points if point.size == name]
        label = f"{mine[0].parameters / 1e6:.1f} M parameters"
        for point in mine:
            fill = "full" if fitted_points([point]) else "none"
            axes.plot(point.flops, point.bits_per_byte, "o", color=f"C{i}", fillstyle=fill)
        axes.plot(flops, curve(mine[0].config), color=f"C{i}", linewidth=0.8, label=label)
    lowest = np.min([curve(ModelConfig(**ladder_fields(rung))) for rung in LADDER], axis=0)
    axes.plot(flops, lowest, "k--", label="best size of the ladder")
    scores = [point.bits_per_byte for point in points]
    axes.set(xscale="log", xlabel="FLOPs of training", ylabel="bits per byte, held-out text (mean of zh and en)")
    axes.set_ylim(float(lowest.min()) * 0.97, 1.05 * max(scores))
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def main() -> None:
    config = parse(SweepConfig, __doc__)
    if not config.fit:
        return run_missing(config)
    points = read_points(Path(config.points))
    law = fit_points(points)
    print(errors_table(law, points))
    print(law)
    write_json(LAW_FILE, dataclasses.asdict(law))
    draw(law, points, PICTURE)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
