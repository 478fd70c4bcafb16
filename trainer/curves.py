"""The curves of a training run as a PNG: out/{stage}_{size}.png.

Read next: metrics.py (the caller).
"""

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.files import atomic_write
from trainer.reference import Curve, is_measured


def draw_curves(rows: list[dict[str, Any]], path: Path, title: str, reference: Curve | None = None) -> None:
    """Plot training loss, validation loss and bits per byte by split over the trained tokens, as a PNG.

    For a stage with pairs: reward accuracy instead of bits per byte, over the trained pairs; with rollouts see
    draw_reward_curves. With a reference curve its
    band is drawn behind the training loss.
    """
    train = [row for row in rows if "loss" in row]
    if not train:
        return
    if "reward" in train[-1]:
        return draw_reward_curves(rows, train, path, title)
    pairs = "pairs" in train[-1]
    unit, scale, score = ("pairs", 1, "val_reward_accuracy") if pairs else ("tokens", 1e6, "bits_per_byte")
    figure = Figure(figsize=(11, 4))
    left, right = figure.subplots(1, 2)
    left.plot([row[unit] / scale for row in train], [row["loss"] for row in train], label="train", linewidth=1)
    if reference is not None:
        draw_band(left, train, reference)
    validations = [row for row in rows if "val_loss" in row]
    seen = [row[unit] / scale for row in validations]
    for i, split in enumerate(sorted(validations[-1]["val_loss"]) if validations else (), start=1):
        style = {"marker": ".", "color": f"C{i}", "label": f"validation {split}"}
        left.plot(seen, [row["val_loss"][split] for row in validations], **style)
        right.plot(seen, [row[score][split] for row in validations], **style)
    names = ("loss per pair", "reward accuracy") if pairs else ("loss (nats per token)", "bits per byte")
    for axes, name in ((left, names[0]), (right, names[1] + ", validation")):
        axes.set_xlabel("pairs trained" if pairs else "million tokens trained")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    save_figure(figure, path, title)


def save_figure(figure: Figure, path: Path, title: str) -> None:
    figure.suptitle(title)
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def draw_reward_curves(rows: list[dict[str, Any]], train: list[dict[str, Any]], path: Path, title: str) -> None:
    """Plot a run with rewards over its steps: rewards and pass rates; entropy and KL; answer length."""
    steps, validations = [row["step"] for row in train], [row for row in rows if "val_reward" in row]
    figure = Figure(figsize=(14, 4))
    panels = figure.subplots(1, 3)
    shown = [
        (panels[0], [name for name in train[-1] if name == "reward" or name.startswith("pass@")], "reward, pass rate"),
        (panels[1], ["entropy", "kl", "clip_fraction", "no_signal"], "nats per token, fractions"),
        (panels[2], ["answer_length"], "tokens per answer"),
    ]
    for axes, names, label in shown:
        for name in names:
            axes.plot(steps, [row.get(name, math.nan) for row in train], label=name, linewidth=1)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    for i, split in enumerate(sorted(validations[-1]["val_reward"]) if validations else ()):
        points = [row["val_reward"].get(split, math.nan) for row in validations]
        style = {"marker": ".", "color": f"C{7 + i}", "label": f"held-out reward {split}"}
        panels[0].plot([row["step"] for row in validations], points, **style)
    for axes in panels:
        axes.legend()
    save_figure(figure, path, title)


def draw_band(axes: Axes, train: list[dict[str, Any]], reference: Curve) -> None:
    """Draw the band of the reference runs in nats per token, by the run's mean ratio of them to bits per byte."""
    rows = list(filter(is_measured, train))
    tokens, low, median, high = reference.T
    nats = sum(row["loss"] for row in rows) / max(sum(row["train_bits_per_byte"] for row in rows), 1e-9)
    axes.fill_between(tokens / 1e6, nats * low, nats * high, alpha=0.25, color="C7", label="90 % of reference runs")
    axes.plot(tokens / 1e6, nats * median, color="C7", linewidth=0.8)
