"""The curves of a training run: panels for out/{stage}_{size}.png and for the page of the runs (report_page.py).

Read next: metrics.py (the caller).
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.files import atomic_write
from trainer.reference import Curve, is_measured

Row = dict[str, Any]
Draw = Callable[[Axes], None]


def draw_curves(rows: list[Row], path: Path, title: str, reference: Curve | None = None) -> None:
    """Plot the panels of a run side by side, as a PNG."""
    drawings = panels(rows, reference)
    if not drawings:
        return
    figure = Figure(figsize=(4.7 * len(drawings) + 1.5 * (len(drawings) < 3), 4))
    for axes, draw in zip(figure.subplots(1, len(drawings)), drawings, strict=True):
        draw(axes)
    save_figure(figure, path, title)


def save_figure(figure: Figure, path: Path, title: str) -> None:
    """Write a figure as a PNG."""
    figure.suptitle(title)
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def panels(rows: list[Row], reference: Curve | None = None) -> list[Draw]:
    """Return the functions that draw the panels of a run, [] without training rows.

    Training and validation loss, then bits per byte by split, over the trained tokens; with a reference curve its band
    lies behind the training loss. For a stage with pairs reward accuracy instead of bits per byte. A run with rewards,
    over its steps: rewards and pass rates; entropy and KL; answer length.
    """
    train = [row for row in rows if "loss" in row]
    if not train:
        return []
    if "reward" in train[-1]:
        validations = [row for row in rows if "val_reward" in row]
        rewards = [name for name in train[-1] if name == "reward" or name.startswith("pass@")]
        shown = {
            "reward, pass rate": rewards,
            "nats per token, fractions": ["entropy", "kl", "clip_fraction", "no_signal"],
            "tokens per answer": ["answer_length"],
        }
        return [
            partial(draw_lines, train=train, names=names, label=label, validations=validations * (names is rewards))
            for label, names in shown.items()
        ]
    validations = [row for row in rows if "val_loss" in row]
    score = "val_reward_accuracy" if "pairs" in train[-1] else "bits_per_byte"
    return [
        partial(draw_losses, train=train, validations=validations, reference=reference),
        partial(draw_scores, train=train, validations=validations, score=score),
    ]


def trained(rows: list[Row]) -> tuple[list[float], str]:
    """Return the x of rows of a supervised stage and its label: pairs, or tokens in millions."""
    if any("pairs" in row for row in rows):
        return [row["pairs"] for row in rows], "pairs trained"
    return [row["tokens"] / 1e6 for row in rows], "million tokens trained"


def draw_losses(axes: Axes, train: list[Row], validations: list[Row], reference: Curve | None) -> None:
    x, label = trained(train)
    axes.plot(x, [row["loss"] for row in train], label="train", linewidth=1)
    if reference is not None:
        draw_band(axes, train, reference)
    draw_validations(axes, validations, "val_loss")
    finish(axes, label, "loss per pair" if "pairs" in label else "loss (nats per token)")


def draw_scores(axes: Axes, train: list[Row], validations: list[Row], score: str) -> None:
    draw_validations(axes, validations, score)
    name = "bits per byte" if score == "bits_per_byte" else "reward accuracy"
    finish(axes, trained(train)[1], f"{name}, validation")


def draw_validations(axes: Axes, validations: list[Row], name: str) -> None:
    for i, split in enumerate(sorted(validations[-1][name]) if validations else (), start=1):
        y = [row[name][split] for row in validations]
        axes.plot(trained(validations)[0], y, marker=".", color=f"C{i}", label=f"validation {split}")


def draw_lines(axes: Axes, train: list[Row], names: list[str], label: str, validations: list[Row]) -> None:
    """Plot metrics of a run with rewards over its steps, and the rewards of its validations."""
    for name in names:
        axes.plot([row["step"] for row in train], [row.get(name, math.nan) for row in train], label=name, linewidth=1)
    for i, split in enumerate(sorted(validations[-1]["val_reward"]) if validations else ()):
        points = [row["val_reward"].get(split, math.nan) for row in validations]
        steps = [row["step"] for row in validations]
        axes.plot(steps, points, marker=".", color=f"C{7 + i}", label=f"held-out reward {split}")
    finish(axes, "step", label)


def finish(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def draw_band(axes: Axes, train: list[Row], reference: Curve) -> None:
    """Draw the band of the reference runs in nats per token, by the run's mean ratio of them to bits per byte."""
    rows = list(filter(is_measured, train))
    tokens, low, median, high = reference.T
    nats = sum(row["loss"] for row in rows) / max(sum(row["train_bits_per_byte"] for row in rows), 1e-9)
    axes.fill_between(tokens / 1e6, nats * low, nats * high, alpha=0.25, color="C7", label="90 % of reference runs")
    axes.plot(tokens / 1e6, nats * median, color="C7", linewidth=0.8)
