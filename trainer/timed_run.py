"""1-pretrain.py --minutes: measures the machine, chooses size and steps, and compares the result with the prediction.

    20 minutes here: 6.1 M parameters, 9.0 M tokens, expect 1.90 bits per byte

Real training steps of a small size are timed, then those of the size that seems best, until that is a measured one. The
minutes include measuring, validation and saving. The learning rate decays by steps, or by time where training is slower
than measured, so the run ends in time with a low learning rate. The choice is saved with the run (`Stage.plan`): a
resumed run keeps it.
Read next: dial.py (the choice), speed.py (the measurement), timer.py.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from common.errors import UserError
from corpus.dataset_meta import read_meta
from model.config import ModelConfig
from model.parameters import count_parameters
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer
from trainer.compilation import decide_compile
from trainer.config import PlanConfig
from trainer.datasets import TokenDataset
from trainer.dial import (
    Budget,
    batch_size_for,
    candidate_sizes,
    choice_text,
    choose,
    describe_repeats,
    interpolate_seconds,
    law_text,
    longest_run,
    size_text,
    texts_of_run,
)
from trainer.distributed import DistContext
from trainer.memory import machine_memory, training_memory
from trainer.metrics import read_log_rows
from trainer.mixing import MixSchedule
from trainer.scaling_law import read_law
from trainer.speed import from_rank0, measure_step
from trainer.stage import ComputeLoss, Stage
from trainer.train_state import read_train_state, resume_path

MEASURE_FRACTION, MEASURE_SECONDS = 0.04, 8.0  # time for measuring: this fraction of the run, at most these seconds
COMPILE_SECONDS = 60.0  # of compiling, about; runs for which that is more than MEASURE_FRACTION do not compile
USABLE_MEMORY_FRACTION = 0.9  # the rest is for fragmentation and other programs
SLOWER = 0.99  # fraction of the steps below which the result says that training was slower than measured
CLOSING_SECONDS = 3.0  # for the curves, and for what else a run does before and after its steps

RunConfigT = TypeVar("RunConfigT", bound=PlanConfig)
Plan = dict[str, Any]  # what was chosen; saved with the run


@dataclass(frozen=True)
class TimedRun:
    """What the choice needs. start: time.monotonic() at the start of the program."""

    config: PlanConfig
    tokenizer: ChatTokenizer
    compute_loss: ComputeLoss
    mixture: MixSchedule | None
    dist: DistContext
    start: float

    def choose(self) -> tuple[Any, Plan]:
        """Return the configuration with size and steps, and the plan. All ranks get the same.

        An interrupted run of these minutes keeps its own. Raises UserError if no size fits into memory.
        """
        config, dist = self.config, self.dist
        if config.global_batch_size % dist.world_size:
            raise UserError(f"{dist.world_size} processes cannot share --global_batch_size {config.global_batch_size}")
        sizes: Sequence[ModelConfig] = candidate_sizes(config, self.tokenizer.vocab_size)
        if found := interrupted_run(config, sizes):
            size, plan, seconds_left = found
            dist.print0(
                f"an interrupted run of {config.minutes:g} minutes continues: {size_text(size)}, {plan['steps']:,} "
                f"steps, {seconds_left / 60:.1f} minutes left"
            )
            return apply_plan(config, size, plan, seconds_left), plan
        sizes = self.fitting_sizes(sizes)
        measured, compiles = self.measure(sizes)
        budget = self.budget()
        choice = choose(sizes, interpolate_seconds(measured, budget), budget, law := read_law())
        plan = {
            "minutes": config.minutes, "steps": choice.steps, "tokens": choice.tokens,
            "batch_size": batch_size_for(config, choice.size), "eval_tokens": choice.eval_tokens, "compile": compiles,
            "train_seconds": choice.train_seconds, "bits_per_byte": choice.bits_per_byte,
        }  # fmt: skip
        speeds = (
            f"{count_parameters(size).total / 1e6:.1f} M {budget.step_tokens(size) / seconds:,.0f}"
            for size, seconds in measured.items()
        )
        dist.print0(f"{config.minutes:g} minutes here: {choice_text(choice)}")
        dist.print0(f"measured tokens/s: {', '.join(speeds)}; {law_text(choice, law)}")
        if repeats := describe_repeats(choice.tokens, budget.texts):
            dist.print0(repeats)
        return apply_plan(config, choice.size, plan, choice.train_seconds), plan

    def budget(self) -> Budget:
        """Return what is left of the minutes now, for training and validation. The same on all ranks."""
        seconds = 60 * self.config.minutes - (time.monotonic() - self.start) - CLOSING_SECONDS
        splits = [name for name in read_meta(self.config.data_path)["splits"] if name != "train"]
        texts = texts_of_run(self.config.data_path, self.mixture)
        (seconds,) = from_rank0(self.dist, max(seconds, 1.0))
        return Budget(seconds, texts, len(splits), self.config, self.dist.world_size)

    def fitting_sizes(self, sizes: Sequence[ModelConfig]) -> Sequence[ModelConfig]:
        """Return the sizes whose training fits into memory; a size that the user gives is not checked."""
        (memory,) = from_rank0(self.dist, USABLE_MEMORY_FRACTION * usable_memory(self.dist))
        fitting = [size for size in sizes if needed_memory(self.config, size, self.dist) <= memory]
        if not fitting and len(sizes) > 1:
            raise UserError(f"no size fits into {memory / 1e9:.1f} GB of memory: use a smaller --batch_size")
        return fitting if len(sizes) > 1 else sizes

    def measure(self, sizes: Sequence[ModelConfig]) -> tuple[dict[ModelConfig, float], str]:
        """Return the seconds of a step of the smallest size and of those that then seem best in turn; and --compile.

        Runs that are too short to compile do not, with --compile auto. In others the last size is measured once more,
        compiled: the ratio is taken for all.
        """
        law, budget, measured = read_law(), self.budget(), dict[ModelConfig, float]()
        left = min(MEASURE_SECONDS, 60 * MEASURE_FRACTION * self.config.minutes)
        best = sizes[0]
        while best not in measured:
            size, start = best, time.monotonic()
            measured[size] = self.measure_size(size, "off", left / min(len(sizes), 3))
            left -= from_rank0(self.dist, time.monotonic() - start)[0]
            step_seconds = interpolate_seconds(measured, budget)
            best = choose(sizes, step_seconds, budget, law).size
            if 2 * step_seconds(best) > left:
                break
        if 60 * MEASURE_FRACTION * self.config.minutes < COMPILE_SECONDS and self.config.compile == "auto":
            return measured, "off"
        stage, rows = self.stage(size), budget.step_tokens(size) // size.max_seq_len
        steps = longest_run(size, measured[size], budget, law).steps
        compiles = decide_compile(self.config, stage, self.dist, rows, steps).compile
        ratio = self.measure_size(size, "on", COMPILE_SECONDS) / measured[size] if compiles == "on" else 1.0
        return {size: ratio * seconds for size, seconds in measured.items()}, compiles

    def measure_size(self, size: ModelConfig, compiles: str, seconds: float) -> float:
        """Return the seconds of a step of this size, measured for about these seconds. compiles: as --compile."""
        config = dataclasses.replace(self.config, batch_size=batch_size_for(self.config, size), compile=compiles)
        rows = self.budget().step_tokens(size) // size.max_seq_len
        return measure_step(config, self.stage(size), self.dist, rows, seconds)

    def stage(self, size: ModelConfig) -> Stage:
        """Return a stage with a new model of this size and without data."""
        return Stage("pretrain", Transformer(size), self.tokenizer, self.compute_loss, TokenDataset())


def apply_plan(config: RunConfigT, size: ModelConfig, plan: Plan, train_seconds: float) -> RunConfigT:
    """Return the configuration of the planned run: size, steps, batch, validation and time limit."""
    fields = {name: value for name, value in size.to_dict().items() if name not in ("vocab_size", "rope_scaling")}
    return dataclasses.replace(
        config, preset=None, model=fields, minutes=0.0, max_steps=plan["steps"], max_minutes=train_seconds / 60,
        batch_size=plan["batch_size"], eval_tokens=plan["eval_tokens"], compile=plan["compile"],
    )  # fmt: skip


def interrupted_run(config: PlanConfig, sizes: Sequence[ModelConfig]) -> tuple[ModelConfig, Plan, float] | None:
    """Return size, plan and seconds left of an interrupted run of these minutes and one of these sizes, or None."""
    for folder in sorted(Path(config.out_dir).glob("pretrain_*.resume")):
        found = read_train_state(config, folder.with_suffix(".pth"))
        plan = found[1].identity.get("plan") if found else None
        for size in sizes:
            if found and plan and plan["minutes"] == config.minutes and found[1].identity["config"] == size.to_dict():
                return size, plan, max(plan["train_seconds"] - found[1].seconds, 1.0)
    return None


def usable_memory(dist: DistContext) -> float:
    """Return the bytes that a process may use: of its GPU, or its share of the main memory."""
    if dist.device.type == "cuda":
        return float(torch.cuda.mem_get_info(dist.device)[0])
    return machine_memory() / dist.world_size


def needed_memory(config: PlanConfig, size: ModelConfig, dist: DistContext) -> float:
    """Return the estimated bytes of a process that trains this size."""
    return training_memory(
        size, batch_size_for(config, size), size.max_seq_len, optimizer=config.optimizer,
        compute_bytes=dist.dtype.itemsize, parallel=config.parallel, processes=dist.world_size,
        recompute=config.checkpoint_activations, device=dist.device.type,
    ).total  # fmt: skip


def describe_result(plan: Plan, path: Path, start: float) -> str:
    """Return the line that compares a complete run with its plan, from its log; "" if the run is not complete."""
    rows = read_log_rows(path.with_suffix(".jsonl"), plan["steps"])
    scored = [row for row in rows if row.get("bits_per_byte")]
    if resume_path(path).exists() or not scored:
        return ""
    by_split, done = scored[-1]["bits_per_byte"], scored[-1]["step"] / plan["steps"]
    seconds = max(time.monotonic() - start, *(row.get("seconds", 0.0) for row in rows))  # a resumed run: of all parts
    reached = sum(by_split.values()) / len(by_split)
    parts = ", ".join(f"{name} {value:.2f}" for name, value in by_split.items())
    predicted, error = "", ""
    if expected := plan["bits_per_byte"]:
        predicted, error = f"predicted {expected:.2f}, ", f", {reached / expected - 1:+.1%}"
    minutes = f"{seconds / 60:.1f} of {plan['minutes']:g} minutes"
    slower = f"; training was slower than measured: {done:.0%} of the steps" if done < SLOWER else ""
    return f"{predicted}reached {reached:.2f} bits per byte ({parts}){error}, after {minutes}{slower}"
