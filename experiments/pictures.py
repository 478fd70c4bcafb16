"""Draws the arms of an experiment, and states their difference as text.

Read next: training.py (Arm), ../trainer/curves.py (save_figure).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.training import Arm

WINDOW = 10  # steps whose mean is one point of a curve


def new_picture(columns: int = 2) -> tuple[Figure, list[Any]]:
    """Return a figure and its panels, from left to right."""
    figure = Figure(figsize=(5.5 * columns, 4.2))
    return figure, list(np.atleast_1d(figure.subplots(1, columns)))


def loss_curve(arm: Arm, x: str = "tokens") -> tuple[np.ndarray, np.ndarray]:
    """Return (x, training loss) of an arm: means over WINDOW steps, each (points,)."""
    window = max(1, min(WINDOW, len(arm.steps) // 3))
    points = len(arm.steps) // window * window
    columns = np.array([[row[x], row["loss"]] for row in arm.steps[:points]]).reshape(-1, window, 2)
    return columns[:, -1, 0], columns[:, :, 1].mean(axis=1)


def draw_arm_losses(axes: Axes, groups: Mapping[str, Sequence[Arm]], x: str = "tokens", scale: float = 1e3) -> None:
    """Plot the training loss of every group: the mean over its seeds, and the range between them."""
    for color, (name, arms) in enumerate(groups.items()):
        curves = [loss_curve(arm, x) for arm in arms]
        length = min(len(values) for _, values in curves)
        values = np.array([values[:length] for _, values in curves])
        seen = curves[0][0][:length] / scale
        axes.plot(seen, values.mean(axis=0), color=f"C{color}", label=name, linewidth=1.3)
        axes.fill_between(seen, values.min(axis=0), values.max(axis=0), color=f"C{color}", alpha=0.25)
    label_axes(axes, f"trained {x}, thousands" if scale == 1e3 else x, "training loss (nats per token)")
    axes.legend()


def draw_points(axes: Axes, groups: Mapping[str, Sequence[float]], label: str, text: str = "{:.2f}") -> None:
    """Plot one number per seed and group as points, and the mean of each group as a bar."""
    for color, (name, values) in enumerate(groups.items()):
        finite = [value for value in values if np.isfinite(value)]
        mean = sum(finite) / len(finite) if finite else 0.0
        axes.bar([name], [mean], color=f"C{color}", alpha=0.4, width=0.6)
        axes.plot([color] * len(finite), finite, "o", color=f"C{color}", markersize=4)
        axes.annotate(text.format(mean) if finite else "diverged", (color, max([mean, *finite])), ha="center",
                      va="bottom", xytext=(0, 4), textcoords="offset points")  # fmt: skip
    axes.margins(y=0.15)
    if "%" in text:
        axes.set_ylim(0, 1.1)
    label_axes(axes, "", label)


def draw_rates(axes: Axes, groups: Mapping[str, Mapping[float, Sequence[float]]]) -> None:
    """Plot the validation losses of every group {learning rate: losses} over the rate. Diverged runs are left out."""
    for color, (name, losses) in enumerate(groups.items()):
        finite = {rate: [each for each in values if np.isfinite(each)] for rate, values in losses.items()}
        finite = {rate: values for rate, values in finite.items() if values}
        means = [sum(values) / len(values) for values in finite.values()]
        axes.plot(list(finite), means, "-", color=f"C{color}", label=name)
        for rate, values in finite.items():
            axes.plot([rate] * len(values), values, "o", color=f"C{color}", markersize=4)
    rates = sorted({rate for losses in groups.values() for rate in losses})
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.set_xticks([], minor=True)
    axes.legend()
    label_axes(axes, "peak learning rate", "validation loss (nats per token)")


def label_axes(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


# ---- words -----------------------------------------------------------------------------------------------------------
def span(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Return "2.31", or "2.31 to 2.35" if the seeds differ in the printed digits."""
    low, high = (form.format(each) if np.isfinite(each) else "diverged" for each in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def compared(values: Sequence[float], control: Sequence[float]) -> str:
    """Return "higher", "lower", "not clearly different" or "unknown": whether the ranges of the seeds lie apart.

    Apart means by more than the wider of both ranges, so that two seeds do not suggest a difference by chance.
    Unknown: a run diverged, so it has no value.
    """
    if not np.isfinite([*values, *control]).all():
        return "unknown"
    spread = max(max(values) - min(values), max(control) - min(control))
    if min(values) - max(control) > spread:
        return "higher"
    return "lower" if min(control) - max(values) > spread else "not clearly different"


def rate_words(values: Mapping[float, Sequence[float]], control: Mapping[float, Sequence[float]]) -> str:
    """Return for every learning rate how the losses compare with the control's."""
    return "; ".join(
        f"at rate {rate} the validation loss is {compared(values[rate], control[rate])} ({span(values[rate])} against "
        f"{span(control[rate])} nats per token)"
        for rate in values
    )
