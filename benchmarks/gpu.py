"""Training and generation on a CUDA GPU beside transformers with torch.compile: one command, one table to paste.

    python -m benchmarks.gpu                         under ten minutes; prints markdown, writes out/benchmarks/gpu.md
    python -m benchmarks.gpu --minutes 30            rows that ran out of time get more
    python -m benchmarks.gpu --quick                 one size and length
    python -m benchmarks.gpu --device cpu --preset demo --quick        tries all of it without a GPU

    MFU = tokens per second x FLOPs per token / peak FLOP/s        (trainer/plan.py)

Ours is 1-pretrain.py with its default flags: Muon, its loader, its log. transformers is a plain loop with fused AdamW
and torch.compile, which waits for the GPU only at the end. Both train the same model on the same number of rows, with
fp32 weights and autocast. Needs no packages but those of requirements.txt; every row is a process with its own time
limit. A row that fails or is too slow says so, and the others run.
Read next: pretrain_throughput.py, peer_cases/llama_throughput.py, decoding.py (the rows), inputs.py (the data).
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.decoding import CONTEXT, LONG_PROMPT_TOKENS, PROMPT_TOKENS, speed_metric
from benchmarks.harness import ROOT, Case, describe_machine, run_case
from benchmarks.inputs import InputsConfig, make_inputs
from benchmarks.train_spec import TrainSpec
from common.cli import Config, flag, parse
from common.device import pick_device, pick_dtype
from common.errors import UserError, fail_in_one_line
from common.files import write_text
from common.flag_types import device_name, path_string, positive_float
from model.config import PRESETS, ModelConfig
from trainer.plan import GPUS, flops_per_token

SECONDS_PER_ROW = 6.0  # of steps, if they reach 30 % of the peak
ASSUMED_TFLOPS = 100.0  # of a GPU that trainer/plan.py does not list
NO_TIME = "no time left: --minutes"
MIN_SECONDS = 15.0  # a row with less time left is not started
Numbers = dict[str, float] | str  # of a row; a text: why there are none


@dataclass(frozen=True)
class GpuConfig(Config):
    """The command line."""

    minutes: float = flag(10.0, "time limit of the whole table", type=positive_float)
    quick: bool = flag(False, "one size and length, few steps, small batches")
    device: str = flag("auto", "cuda; cpu only tries the program out", type=device_name)
    preset: str = flag("", "one size instead of small and base", choices=tuple(PRESETS))
    out_dir: str = flag("out/benchmarks", "folder for gpu.md", type=path_string)

    @property
    def step_tokens(self) -> int:
        return 512 if self.quick else 32_768

    def runs(self) -> list[tuple[str, int]]:
        """The presets and lengths that are trained beside transformers, the most telling first."""
        if self.preset or self.quick:
            lengths = (128,) if self.quick else (2048, 512)
            return [(self.preset or "small", length) for length in lengths]
        return [("base", 2048), ("small", 512), ("base", 512), ("small", 2048)]


@dataclass(frozen=True)
class Row:
    """A row of one of the two tables. flops: FLOPs per trained token, 0 for generation; group: rows of the same run."""

    group: str
    name: str
    case: Case
    flops: float = 0.0


def peak_flops(device: torch.device) -> float:
    """Return the peak FLOP/s of the GPU in 16 bits, or 0 if it is not listed in trainer/plan.py."""
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else ""
    return next((1e12 * gpu.tflops for key, gpu in GPUS.items() if key in name), 0.0)


class Rows:
    """The rows of a run, in the order in which they are measured."""

    def __init__(self, config: GpuConfig, folder: Path, device: torch.device) -> None:
        self.config, self.folder, self.device = config, folder, device
        self.dtype = str(pick_dtype("auto", device)).removeprefix("torch.")
        self.peak = peak_flops(device)

    def all(self) -> Iterator[Row]:
        first, *others = self.config.runs()
        preset = others[0] if others else first
        yield from self.training(*first)
        if others:
            yield from self.training(*preset)
        yield from self.generation()
        yield self.ours(*preset, "Mengya, MoE", "--use_moe")
        for run in others[1:]:
            yield from self.training(*run)
        if not self.config.quick:
            yield self.ours(*preset, "Mengya, --optimizer adamw", "--optimizer adamw")

    def training(self, preset: str, length: int) -> Iterator[Row]:
        model = self.model(preset, length)
        steps, rows = self.steps(model), self.batch_size(length)
        path = next((self.folder / "shards").glob("train*.bin"))
        spec = TrainSpec(model.to_dict(), str(path), rows, length, steps, self.dtype, self.device.type)
        kind = "compile" if self.device.type == "cuda" else "plain"
        command = [sys.executable, "-m", "benchmarks.peer_cases.llama_throughput", spec.to_json(), kind]
        title = "transformers + compile" if kind == "compile" else "transformers"
        yield Row(f"{preset}, {rows} x {length}", title, Case(title, command), flops_per_token(model, length))
        yield self.ours(preset, length, "Mengya")

    def ours(self, preset: str, length: int, name: str, flags: str = "") -> Row:
        model, rows = self.model(preset, length), self.batch_size(length)
        if "--use_moe" in flags:
            model = replace(model, use_moe=True)
        options = f"--preset {preset} --max_seq_len {length} --batch_size {rows} --device {self.device} {flags}"
        command = [sys.executable, "-m", "benchmarks.pretrain_throughput", str(self.folder)]
        command += ["--steps", str(self.steps(model)), f"--flags={options}"]
        return Row(f"{preset}, {rows} x {length}", name, Case(name, command), flops_per_token(model, length))

    def generation(self) -> Iterator[Row]:
        for title, module in (("transformers", "peer_cases.transformers_generate"), ("Mengya", "decode_mengya")):
            command = [sys.executable, "-m", f"benchmarks.{module}", str(self.folder), "--dtype", self.dtype]
            command += ["--device", self.device.type, "--rows", "1,16"]
            command += ["--new_tokens", "4"] if self.config.quick and self.device.type == "cpu" else []
            yield Row(f"generation, {self.dtype}", title, Case(title, command))

    def model(self, preset: str, length: int) -> ModelConfig:
        return ModelConfig(**{**PRESETS[preset], "max_seq_len": length, "vocab_size": 6400})

    def batch_size(self, length: int) -> int:
        return max(1, self.config.step_tokens // length)

    def steps(self, model: ModelConfig) -> int:
        if self.config.quick:
            return 8
        flops = flops_per_token(model, model.max_seq_len) * self.config.step_tokens
        budget = 0.3 * (self.peak or 1e12 * ASSUMED_TFLOPS) * SECONDS_PER_ROW
        return min(400, max(30, round(budget / flops)))


def run_row(row: Row, seconds_left: float, rows_left: int) -> Numbers:
    """Return the numbers of a row, or why there are none. A row may take twice its part of the time that is left."""
    if seconds_left < MIN_SECONDS:
        return NO_TIME
    try:
        return run_case(row.case, min(seconds_left, max(60.0, 2 * seconds_left / rows_left)))
    except UserError as error:
        return str(error).replace("|", "/")[:200]


def training_table(results: Sequence[tuple[Row, Numbers]], peak: float) -> str:
    """Return the table of the rows that train. The ratio is to transformers on the same model, rows and length."""
    lines = [
        "| training, rows x tokens | | tokens/s | / transformers | MFU | peak GiB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    bases = {row.group: numbers for row, numbers in results if row.name.startswith("transformers")}
    for row, numbers in results:
        if row.flops:
            cells = f"{numbers} | | |"
            if isinstance(numbers, dict):
                speed, base = numbers["tokens_per_second"], bases.get(row.group)
                ratio = f"{speed / base['tokens_per_second']:.2f}" if isinstance(base, dict) else ""
                mfu = f"{speed * row.flops / peak:.1%}" if peak else "–"
                cells = f"{speed:,.0f} | {ratio} | {mfu} | {numbers['peak_memory_mb'] / 1024:.2f}"
            lines.append(f"| {row.group} | {row.name} | {cells} |")
    return "\n".join(lines)


def generation_table(results: Sequence[tuple[Row, Numbers]]) -> str:
    """Return the table of the rows that generate."""
    metrics = [speed_metric(1), speed_metric(16)]
    metrics += [f"first_token_ms_{tokens}" for tokens in (PROMPT_TOKENS, LONG_PROMPT_TOKENS)]
    lines = [f"| generation | {' | '.join(metric.replace('_', ' ') for metric in metrics)} | peak GiB |"]
    lines.append("|---|" + "---:|" * (len(metrics) + 1))
    for row, numbers in results:
        if not row.flops:
            cells = f"{numbers}" + " |" * len(metrics)
            if isinstance(numbers, dict):
                cells = " | ".join(f"{numbers[metric]:,.1f}" for metric in metrics)
                cells += f" | {numbers['peak_memory_mb'] / 1024:.2f}"
            lines.append(f"| {row.group}, {row.name} | {cells} |")
    return "\n".join(lines)


def describe_software(device: torch.device, seconds: float) -> str:
    """Return the last line: GPU or CPU, versions, commit, duration."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)  # nosec
    commit = done.stdout.strip() or "unknown"
    machine = describe_machine()
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        machine = f"{torch.cuda.get_device_name(device)} ({memory:.0f} GiB), torch {torch.__version__}"
    return f"{machine}, transformers {version('transformers')}, commit {commit}, {seconds / 60:.1f} minutes."


def main() -> None:
    config, start = parse(GpuConfig, __doc__), time.monotonic()
    device = pick_device(config.device)
    if device.type != "cuda" and config.device == "auto":
        raise UserError("no CUDA GPU: run this on a machine with one, or try it out with --device cpu --preset demo "
                        "--quick")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
        tokens = 50_000 if config.quick else 2_000_000
        make_inputs(InputsConfig(Path(name), config.preset or "small", CONTEXT, tokens=tokens))
        rows = Rows(config, Path(name), device)
        todo, results = list(rows.all()), list[tuple[Row, Numbers]]()
        for i, row in enumerate(todo):
            print(f"{i + 1} of {len(todo)}: {row.group}: {row.name}", file=sys.stderr, flush=True)
            left = 60 * config.minutes - (time.monotonic() - start)
            results.append((row, run_row(row, left, len(todo) - i)))
    closing = describe_software(device, time.monotonic() - start)
    text = "\n".join([training_table(results, rows.peak), "", generation_table(results), "", closing])
    print(text)
    write_text(Path(config.out_dir) / "gpu.md", text + "\n")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
