"""MetricLogger: terminal output, a JSON line per logged step, a plot of the curves, and optionally a tracker.

    out/{stage}_{size}.jsonl    {"step", "loss", "lr", "tokens", "tokens_per_second", ...}, validations and samples
    out/{stage}_{size}.png      the curves

Only rank 0 writes. A failing logger prints a warning and does not stop the training.
Read next: loop.py.
"""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from common.errors import escape_controls
from common.files import write_text
from common.metric_keys import with_current_metric_keys
from trainer.reference import Reference
from trainer.trackers import Tracker

MetricRow = dict[str, Any]
SHOWN_PROMPT, SHOWN_ANSWER = 60, 100  # characters of a sample on the screen


def peak_memory_mb(device_type: str) -> float:
    """Return the peak memory in MiB: of the GPU with "cuda", else of this process; 0 where the system reports none.

    Reads counters of the host's allocator, so it does not wait for a GPU.
    """
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file() and (peak := re.search(r"VmHWM:\s*(\d+)", status.read_text())):
        return int(peak[1]) / 2**10  # not ru_maxrss: on Linux a child inherits the peak of its parent
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10


class MetricLogger:
    """The log of one run: `log` for training steps, `log_validation` for validations, `close` draws the curves.

    It prints a line per logged step; on a terminal a progress bar stays below them. With a `reference` it prints now
    and then where the run lies among the reference runs.
    """

    def __init__(
        self, path: Path, title: str, total_steps: int, last_step: int, is_rank0: bool,
        reference: Reference | None = None,
    ) -> None:  # fmt: skip
        self.path, self.title, self.is_rank0, self.reference = path, title, is_rank0, reference
        self.total_steps = total_steps
        self.recent_bits: list[float] = []  # per byte, of the steps since the last logged row
        self.bar: Progress | None = None
        self.tracker: Tracker | None = None
        if not is_rank0:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = read_log_rows(path, last_step)  # without the rows after the saved step: those steps run again
        write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.file = path.open("a", encoding="utf-8")
        if reference and reference.curve is not None and not self.rows:
            self.write_row({"step": 0, "reference": reference.curve.tolist()})  # for the page, also of later stages
        console = Console()
        if console.is_terminal:
            columns = (
                TextColumn("{task.description} {task.completed}/{task.total}"),
                BarColumn(bar_width=None),  # takes the columns that the others leave
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
            )
            self.bar = Progress(*columns, console=console, expand=True)
            self.task = self.bar.add_task(title, total=total_steps, completed=last_step, text="")
            self.bar.start()

    def __enter__(self) -> "MetricLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def print(self, text: str) -> None:
        """Print a line, above the progress bar if there is one. "" prints nothing."""
        if self.is_rank0 and text:
            if self.bar:
                self.bar.console.print(text, highlight=False, markup=False)  # wraps between words
            else:
                print(text, flush=True)

    def log(self, row: MetricRow, is_due: bool) -> None:
        """Show a training step in the progress bar. If it is due, log it to the file, the tracker and the terminal.

        train_bits_per_byte of a logged row is the mean of the steps since the row before: single steps vary by 5 %.
        """
        if self.is_rank0 and self.bar:
            self.bar.update(self.task, completed=row["step"], text=bar_text(row))
        if not self.is_rank0:
            return
        self.recent_bits.append(row.get("train_bits_per_byte", math.nan))
        if not is_due:
            return
        if finite := [value for value in self.recent_bits if math.isfinite(value)]:
            row = row | {"train_bits_per_byte": sum(finite) / len(finite)}
        self.recent_bits.clear()
        self.write_row(row)
        title = "" if self.bar else f"{self.title} "
        self.print(f"{title}{row['step']}/{self.total_steps} {format_metrics(row)}")
        if self.reference:
            self.print(self.reference.statement(self.rows, is_last=row["step"] == self.total_steps))

    def log_validation(self, row: MetricRow) -> None:
        """Log {"step", "val_loss": {split: x}, "bits_per_byte": {split: x}}; with pairs reward metrics instead.

        Rollouts have {"val_reward": {split: x}, "val_pass@1": {split: x}}.
        """
        if not self.is_rank0:
            return
        is_known = any(old["step"] == row["step"] and is_validation(old) for old in self.rows)
        if not is_known:  # else repeated by a resumed run
            self.write_row(row)
        shown = [
            f"{split}{format_reward_metrics(reward, row['val_pass@1'][split])}"
            for split, reward in row.get("val_reward", {}).items()
        ]
        for split, loss in row.get("val_loss", {}).items():
            if "bits_per_byte" in row:
                more = f" = {row['bits_per_byte'][split]:.3f} bits/byte"
            else:
                more = format_preference_metrics(row["val_reward_accuracy"][split], row["val_reward_margin"][split])
            shown.append(f"{split} loss {loss:.3f}{more}")
        self.print(f"step {row['step']}: validation {', '.join(shown)}")

    def log_samples(self, row: MetricRow) -> None:
        """Log {"step", "samples": [{"language", "prompt", "answer", "reference"}]} and print the answers."""
        if not self.is_rank0:
            return
        self.write_row(row)
        for sample in row["samples"]:
            prompt = shorten(sample["prompt"], SHOWN_PROMPT)
            self.print(f"step {row['step']}: {prompt} → {shorten(sample['answer'], SHOWN_ANSWER)}")

    def write_row(self, row: MetricRow) -> None:
        self.rows.append(row)
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            self.warn(f"cannot write {self.path}: {error}; training continues")
        if self.tracker:
            try:
                self.tracker.log(row)
            except Exception as error:  # no error of a tracker may end the run
                self.warn(f"{self.tracker.name} failed ({one_line(error)}); training continues without it")
                self.tracker = None

    def warn(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop the progress bar, close the file and draw the curves."""
        if not self.is_rank0:
            return
        if self.bar:
            self.bar.stop()
        try:
            self.file.close()
        except OSError as error:
            self.warn(f"cannot write {self.path}: {error}")
        if self.tracker:
            try:
                self.tracker.close()
            except Exception as error:
                self.warn(f"{self.tracker.name} failed ({one_line(error)})")
        from trainer.curves import draw_curves  # matplotlib takes a second to import

        curve = self.reference.curve if self.reference else None
        try:
            draw_curves(self.rows, self.path.with_suffix(".png"), self.title, curve)
        except Exception as error:
            self.warn(f"cannot draw the curves ({error})")


def read_log_rows(path: Path, last_step: int) -> list[MetricRow]:
    """Read the rows of an earlier part of this run up to `last_step`. Raises OSError if the file cannot be read.

    Skips invalid lines (truncated by a kill, or damaged): see `is_log_row`.
    """
    if not last_step or not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if is_log_row(row) and row["step"] <= last_step:
            rows.append(with_current_metric_keys(row))
    return rows


def is_validation(row: MetricRow) -> bool:
    """Whether a row of a log is a validation: with the losses or, of rollouts, the rewards of held-out rows."""
    return "val_loss" in row or "val_reward" in row


def is_log_row(row: Any) -> bool:
    """Whether `row` is a valid row of a log: it has a step, and its losses are numbers, in validations by split."""
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return False
    by_split = [row.get(name, {}) for name in ("val_loss", "val_reward", "val_pass@1")]
    losses = [row["loss"]] if "loss" in row else []
    return all(isinstance(values, dict) for values in by_split) and all(
        type(number) in (int, float) for number in [*losses, *(each for values in by_split for each in values.values())]
    )


def one_line(error: Exception) -> str:
    """Return the type and the first line of an error."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def shorten(text: str, limit: int) -> str:
    """Return a text of a model on one line, safe to print, with at most `limit` characters."""
    text = escape_controls(" ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def bar_text(row: MetricRow) -> str:
    """Return the few figures that stand beside the progress bar; `format_metrics` has all of them."""
    left = row.get("seconds_left")
    eta = "" if left is None else f" eta {int(left) // 60}:{int(left) % 60:02d}"
    value = f"reward {row['reward']:.3f}" if "reward" in row else f"loss {row['loss']:.3f}"
    return f"{value} {row['tokens_per_second']:,.0f} tok/s{eta}"


def format_metrics(row: MetricRow) -> str:
    """Return the line of a training step: loss, learning rate, tokens and FLOPs per second, time left, memory."""
    left = row.get("seconds_left")
    eta = "" if left is None else f" eta {int(left) // 60}:{int(left) % 60:02d}"
    memory = f" mem {row['peak_memory_mb'] / 1024:.1f}G" if row.get("peak_memory_mb") else ""
    pairs = format_preference_metrics(row["reward_accuracy"], row["reward_margin"]) if "reward_accuracy" in row else ""
    if "reward" in row:
        pairs = (
            format_reward_metrics(row["reward"], row["pass@1"]) + f" entropy {row['entropy']:.3f} kl {row['kl']:.4f}"
        )
    speed = f"{row['tokens_per_second']:,.0f} tok/s" + (f" {format_flops(row)}" if "tflops" in row else "")
    return f"loss {row['loss']:.3f}{pairs} lr {row['lr']:.2e} {speed}{eta}{memory}"


def format_flops(metrics: dict[str, float]) -> str:
    """Return "1.23 TFLOP/s", with "(MFU 12.3 %)" where it is known."""
    return f"{metrics['tflops']:.3g} TFLOP/s" + (f" (MFU {metrics['mfu']:.1%})" if "mfu" in metrics else "")


def format_preference_metrics(accuracy: float, margin: float) -> str:
    return f" accuracy {accuracy:.1%} margin {margin:.3f}"


def format_reward_metrics(reward: float, passed: float) -> str:
    return f" reward {reward:.3f} pass@1 {passed:.1%}"
