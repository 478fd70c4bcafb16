"""Time commands side by side: interleaved rounds, medians, ratios and their spread, as markdown and as a picture.

A case is a command that prints a JSON object of numbers as its last line, for example {"tokens_per_second": 812.5}. A
round runs every case once, and each round starts with another case, so that a change in the load of the machine
affects all of them. A ratio is the median over the rounds of case / reference within the same round.

    cases = [Case("transformers", [peer_python, "-m", …]), Case("mengya", [sys.executable, "-m", …])]
    results = run_rounds(cases, rounds=5)
    print(markdown_table(results, ["tokens_per_second", "peak_memory_mb"], reference="transformers"))

Read next: training.py, generation.py (two tables).
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from common.errors import UserError
from common.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
Results = dict[str, dict[str, list[float]]]  # case -> metric -> one value per round


@dataclass(frozen=True)
class Case:
    """A row of a table: a command, its folder, its additional environment variables, the numbers it must print."""

    name: str
    command: Sequence[str]
    folder: Path = ROOT
    environment: Mapping[str, str] = field(default_factory=dict)
    metrics: Sequence[str] = ()


def run_case(case: Case, timeout: float = 1800) -> dict[str, float]:
    """Run the command. Returns the numbers of its last line, and peak_memory_mb, if it does not print that itself.

    It is then its largest resident set, which is at least the memory of this process, so this one imports no large
    library. Raises UserError if the command fails, is too slow, or does not print a JSON object with the metrics.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(  # a command of the benchmark or of its user, no shell
                case.command, cwd=case.folder, env={**os.environ, **case.environment}, stdin=subprocess.DEVNULL,
                stdout=output, stderr=errors,
            )  # nosec B603  # fmt: skip
        except OSError as error:
            raise UserError(f"{case.name}: {case.command[0]}: {error.strerror or error}") from None
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            is_late = not timer.is_alive()
        except BaseException:  # interrupted: end the case too
            process.kill()
            raise
        finally:
            timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        if is_late:
            raise UserError(f"{case.name}: no result after {timeout:g} seconds")
        if process.returncode:
            raise UserError(f"{case.name}: exit code {process.returncode}: {error_line(errors)[:500]}")
        last = last_line(output)
    try:
        numbers = {name: float(value) for name, value in json.loads(last).items()}
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{case.name}: its last line is not a JSON object of numbers: {last[:200]!r}") from None
    numbers = {"peak_memory_mb": usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), **numbers}
    if missing := [metric for metric in case.metrics if metric not in numbers]:
        raise UserError(f"{case.name}: its last line has no {missing[0]}: {last[:200]}")
    return numbers


def last_line(file: IO[bytes]) -> str:
    """Return the last line of a file that is not empty, or ""."""
    file.seek(0)
    return next((line for line in reversed(file.read().decode(errors="replace").splitlines()) if line.strip()), "")


def error_line(file: IO[bytes]) -> str:
    """Return the last line that names an error, as `RuntimeError: …`, or the last line: torchrun prints a summary."""
    file.seek(0)
    found = [line for line in file.read().decode(errors="replace").splitlines() if re.search(r"\b\w*[Ee]rror: ", line)]
    return found[-1] if found else last_line(file)


def run_rounds(cases: Sequence[Case], rounds: int, timeout: float = 1800) -> Results:
    """Run every case `rounds` times, interleaved; round i starts with case i. Progress goes to stderr."""
    results: Results = {case.name: defaultdict(list) for case in cases}
    for i in range(rounds):
        first = i % len(cases)
        for case in [*cases[first:], *cases[:first]]:
            print(f"round {i + 1} of {rounds}: {case.name}", file=sys.stderr, flush=True)
            for metric, value in run_case(case, timeout).items():
                results[case.name][metric].append(value)
    return results


def ratios(results: Results, metric: str, case: str, reference: str) -> list[float]:
    """Return case / reference of every round."""
    pairs = zip(results[case][metric], results[reference][metric], strict=True)
    return [value / base if base else math.nan for value, base in pairs]


def with_spread(values: Sequence[float], digits: int) -> str:
    """`1.23 (1.10 to 1.31)`: the median and the range; one value alone has no range."""
    text = f"{statistics.median(values):,.{digits}f}"
    return text if len(values) < 2 else f"{text} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def markdown_table(results: Results, metrics: str | Sequence[str], reference: str, digits: int = 0) -> str:
    """Return a table: case; for each metric its median and that of the ratio to the reference, both with the range."""
    metrics = [metrics] if isinstance(metrics, str) else metrics
    columns = [text for metric in metrics for text in (label(metric), f"/ {reference}")]
    rounds = len(results[reference][metrics[0]])
    lines = [f"| median of {rounds} (range) | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for case, values in results.items():
        if metrics[0] in values:
            cells = []
            for metric in metrics:
                ratio = with_spread(ratios(results, metric, case, reference), 2) if metric in values else ""
                cells += [with_spread(values[metric], digits) if metric in values else "", ratio]
            lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def label(metric: str) -> str:
    """`peak_memory_mb` -> `peak memory, MB`"""
    return re.sub(" mb$", ", MB", metric.replace("_", " "))


def bar_chart(results: Results, metrics: str | Sequence[str], path: Path, title: str) -> None:
    """Draw the median of every case as a horizontal bar with its range, one panel per metric, as a PNG."""
    from matplotlib.figure import Figure  # after the measurements: see run_case

    metrics = [metrics] if isinstance(metrics, str) else metrics
    figure = Figure(figsize=(4 + 4 * len(metrics), 1 + 0.45 * len(results)))
    panels = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    for i, (metric, axes) in enumerate(zip(metrics, panels, strict=True)):
        cases = [case for case in reversed(results) if metric in results[case]]
        medians = [statistics.median(results[case][metric]) for case in cases]
        below = [median - min(results[case][metric]) for case, median in zip(cases, medians, strict=True)]
        above = [max(results[case][metric]) - median for case, median in zip(cases, medians, strict=True)]
        axes.barh(cases, medians, xerr=[below, above], color=f"C{i}", capsize=3)
        axes.set_xlabel(label(metric))
    figure.suptitle(title)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as a PNG."""
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def describe_machine() -> str:
    """`Intel(R) Xeon(R) CPU, 2 threads, torch 2.13.0+cpu`: the CPU, the threads of torch by default, its version."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    threads = os.environ.get("OMP_NUM_THREADS") or os.cpu_count()
    return f"{cpu}, {threads} threads, torch {importlib.metadata.version('torch')}"
