"""Where a pretraining run lies among reference runs: its training loss in bits per byte at equal numbers of tokens.

    bits per byte = loss sum / ln 2 / UTF-8 bytes of the trained tokens
    place of run  = median * exp(mean of ln(bits per byte / median at the row's tokens) over the last log rows)

reference_curves.csv has the median of healthy runs, and the bounds below and above which 5 % of them lie, by size and
tokens. `python -m benchmarks.reference_curves --fit` computes it from docs/reference_runs.csv. Between the measured
sizes and tokens it is interpolated over their logarithms; there is no reference beyond them.
Read next: metrics.py (prints the statements), curves.py (draws the band), ../benchmarks/reference_curves.py (the runs).
"""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from model.config import ModelConfig
from model.parameters import count_parameters

REFERENCE_FILE = Path(__file__).with_name("reference_curves.csv")
REFERENCE_STEP_TOKENS = 4096  # tokens per step of the reference runs
MAX_BATCH_RATIO = 2  # a run is compared if its tokens per step are within this factor of them
FIRST_TOKENS = 100_000  # the first statement comes after these tokens
WARMUP_MARGIN = 1.2  # and after this multiple of the warm-up
GUESSING_MARGIN = 0.5  # nats; a training loss above ln(vocabulary) - this is that of guessing
MAX_STATEMENTS = 6  # and one at the end of the run

Curve = np.ndarray  # (points, 4): tokens, and bits per byte: low, median, high


def read_reference_curves(path: Path, tied: bool) -> dict[int, Curve]:
    """Return the curves by the number of parameters in layer matrices, both ascending.

    tied: of the models whose output layer is tied to the embeddings. Large ones learn more slowly at first.
    """
    points: dict[int, list[list[float]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["tied"] == str(int(tied)):
                values = [float(row[name]) for name in ("tokens", "low", "median", "high")]
                points.setdefault(int(row["layer_matrices"]), []).append(values)
    return {size: np.array(sorted(points[size])) for size in sorted(points)}


def interpolate_sizes(curves: Mapping[int, Curve], size: int) -> Curve | None:
    """Return the curve of a size at the tokens that both neighbours have, None beyond the measured sizes."""
    if not curves or not min(curves) <= size <= max(curves):
        return None
    small, large = max(each for each in curves if each <= size), min(each for each in curves if each >= size)
    weight = math.log(size / small) / math.log(large / small) if large > small else 0.0
    tokens = np.intersect1d(curves[small][:, 0], curves[large][:, 0])
    below, above = (np.log(curves[each][np.isin(curves[each][:, 0], tokens)]) for each in (small, large))
    return np.exp((1 - weight) * below + weight * above) if len(tokens) > 1 else None


def interpolate_tokens(curve: Curve, tokens: float) -> tuple[float, float, float]:
    """Return (low, median, high) at a number of tokens within the curve."""
    x, *columns = np.log(curve).T
    low, median, high = (math.exp(np.interp(math.log(tokens), x, y)) for y in columns)
    return low, median, high


def is_measured(row: dict[str, Any]) -> bool:
    """Whether a row of a log has a valid training loss in bits per byte. Logs of earlier versions have none."""
    tokens, value = row.get("tokens"), row.get("train_bits_per_byte")
    return type(tokens) is int and type(value) is float and tokens > 0 and 0 < value < math.inf


def training_points(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[float, float]]:
    """Yield (tokens, bits per byte) of the training rows of a log, the newest first.

    A row has the mean of the steps since the row before, so its tokens are those in the middle of these steps.
    """
    newer = None
    for row in filter(is_measured, reversed(rows)):
        if newer:
            yield (newer["tokens"] + row["tokens"]) / 2, newer["train_bits_per_byte"]
        newer = row
    if newer:
        yield newer["tokens"] / 2, newer["train_bits_per_byte"]


@dataclass(frozen=True)
class Reference:
    """The reference of one run: its curve, or the reason why it has none.

    first_tokens: of the first statement. guessing: ln(vocabulary), the loss of uniform predictions.
    """

    curve: Curve | None
    reason: str
    first_tokens: float
    guessing: float = math.inf

    def milestones(self) -> list[float]:
        """Return the numbers of tokens at which the run is compared: spread evenly over their logarithm."""
        if self.curve is None:
            return [self.first_tokens]
        span = float(self.curve[-1, 0]) / self.first_tokens
        if span < 1:
            return []
        count = min(MAX_STATEMENTS, 1 + math.ceil(math.log2(span) - 0.01))
        return [self.first_tokens * span ** (i / max(count - 1, 1)) for i in range(count)]

    def statement(self, rows: list[dict[str, Any]], is_last: bool) -> str:
        """Return what to print after the last row of the log, or "". is_last: the run is complete.

        It depends on the rows only, so a resumed run prints what an uninterrupted one prints.
        """
        seen = (row["tokens"] for row in filter(is_measured, reversed(rows)))
        now, before = next(seen, 0), next(seen, 0)
        is_due = any(before < each <= now for each in self.milestones())
        if not is_due and not (is_last and self.curve is not None and self.first_tokens <= now <= self.curve[-1, 0]):
            return ""
        step, loss = rows[-1]["step"], rows[-1]["loss"]
        if loss > self.guessing - GUESSING_MARGIN:  # random tokens have few bits per byte if the tokens are long
            guessing = f"the loss {loss:.2f} is about that of guessing, ln(vocabulary) = {self.guessing:.2f}"
            return f"step {step}: {guessing}: look at the learning rate and the data"
        if self.curve is None:
            return self.reason
        tokens = min(now, float(self.curve[-1, 0]))
        start = max(tokens / 2, float(self.curve[0, 0]))
        points = takewhile(lambda point: point[0] >= start, training_points(rows))
        recent = [point for point in points if point[0] <= tokens]
        if not recent:
            return ""
        ratio = math.exp(np.mean([math.log(value / interpolate_tokens(self.curve, at)[1]) for at, value in recent]))
        end = "" if now < self.curve[-1, 0] else "; the reference for this size ends here"
        return f"step {step}: {compare(ratio, interpolate_tokens(self.curve, tokens), tokens)}{end}"


def compare(ratio: float, bounds: tuple[float, float, float], tokens: float) -> str:
    """Return where a run lies whose bits per byte are `ratio` times the median."""
    low, median, high = bounds
    value, at = ratio * median, f"at {tokens / 1e6:.2g} M tokens"
    if value > high:
        verdict = f"slower than 95 % of the reference runs ({high:.2f} {at}): look at the learning rate and the data"
    elif value < low:
        verdict = f"below 95 % of the reference runs ({low:.2f} {at}): the text is simpler than theirs, or repeated"
    else:
        verdict = f"normal (90 % of the reference runs lie between {low:.2f} and {high:.2f} {at})"
    return f"{value:.2f} bits per byte in training: {verdict}"


def reference_for(config: ModelConfig, step_tokens: int, warmup_steps: float, optimizer: str) -> Reference:
    """Return the reference of a run from scratch with these tokens per step."""
    curves = read_reference_curves(REFERENCE_FILE, config.tie_embeddings)
    curve, reason = interpolate_sizes(curves, count_parameters(config).layer_matrices), ""
    if config.use_moe:
        reason = "its runs are of dense models"
    elif optimizer != "muon":  # AdamW is slower at first: 3.2 bits per byte at 0.25 M tokens, Muon 2.7
        reason = "its runs use Muon"
    elif curve is None:
        tied = "tied" if config.tie_embeddings else "untied"
        sizes = " to ".join(f"{each / 1e6:.1f}" for each in sorted({*list(curves)[:1], *list(curves)[-1:]}))
        reason = f"its runs with {tied} embeddings have {sizes or 'no'} M parameters in their layers"
    elif not 1 / MAX_BATCH_RATIO <= step_tokens / REFERENCE_STEP_TOKENS <= MAX_BATCH_RATIO:
        reason = f"its runs have {REFERENCE_STEP_TOKENS:,} tokens per step, this one {step_tokens:,}"
    first = max(FIRST_TOKENS, WARMUP_MARGIN * warmup_steps * step_tokens)
    return Reference(
        None if reason else curve, f"no reference curve for this run: {reason}", first, math.log(config.vocab_size)
    )
