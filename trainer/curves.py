"""The curves of a training run as a PNG: out/{stage}_{size}.png.

Read next: metrics.py (the caller).
"""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from common.files import atomic_write


def draw_curves(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Plot training loss, validation loss and bits per byte by split over the trained tokens, as a PNG.

    For a stage with pairs: reward accuracy instead of bits per byte, over the trained pairs.
    """
    train = [row for row in rows if "loss" in row]
    if not train:
        return
    pairs = "pairs" in train[-1]
    unit, scale, score = ("pairs", 1, "val_reward_accuracy") if pairs else ("tokens", 1e6, "bits_per_byte")
    figure = Figure(figsize=(11, 4))
    left, right = figure.subplots(1, 2)
    left.plot([row[unit] / scale for row in train], [row["loss"] for row in train], label="train", linewidth=1)
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
