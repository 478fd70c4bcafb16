"""The curves of a training run as a PNG: out/{stage}_{size}.png.

Read next: metrics.py (the caller).
"""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.files import atomic_write
from trainer.reference import Curve, is_measured


def draw_curves(rows: list[dict[str, Any]], path: Path, title: str, reference: Curve | None = None) -> None:
    """Plot training loss, validation loss and bits per byte by split over the trained tokens, as a PNG.

    For a stage with pairs: reward accuracy instead of bits per byte, over the trained pairs. With a reference curve its
    band is drawn behind the training loss.
    """
    train = [row for row in rows if "loss" in row]
    if not train:
        return
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
    figure.suptitle(title)
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def draw_band(axes: Axes, train: list[dict[str, Any]], reference: Curve) -> None:
    """Draw the band of the reference runs in nats per token, by the run's mean ratio of them to bits per byte."""
    rows = list(filter(is_measured, train))
    tokens, low, median, high = reference.T
    nats = sum(row["loss"] for row in rows) / max(sum(row["train_bits_per_byte"] for row in rows), 1e-9)
    axes.fill_between(tokens / 1e6, nats * low, nats * high, alpha=0.25, color="C7", label="90 % of reference runs")
    axes.plot(tokens / 1e6, nats * median, color="C7", linewidth=0.8)
