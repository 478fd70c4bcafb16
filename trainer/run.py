"""Run: one run of a stage between its steps. A loop makes the steps; Run counts, logs, validates, saves and stops.

    with Run(config, stage, dist, validate) as run:
        with dist.graceful_shutdown():
            for each step:  …;  run.end_step(sums, micro_batches, lr);  break if run.stop
            run.save()
        run.finish()

Read next: loop.py (the loop of the supervised stages), ../6-grpo_train.py (a loop of its own), checkpoint_writer.py.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from enum import Enum

import numpy as np
import torch

from common.errors import UserError
from trainer.checkpoint_writer import CheckpointWriter
from trainer.compilation import decide_compile
from trainer.config import TrainConfig
from trainer.datasets import Batch
from trainer.distributed import DistContext
from trainer.engine import Engine
from trainer.loss_guard import NonFiniteGuard
from trainer.metrics import MetricRow, one_line, peak_memory_mb
from trainer.optim import set_learning_rate
from trainer.samples import Samples
from trainer.stage import Stage
from trainer.startup import check_first_loss, log_startup, make_engine, open_logger
from trainer.throughput import Throughput
from trainer.timer import TrainingTimer
from trainer.train_state import TrainState, load_train_state

STEP_KEYS = (
    "loss", "num_targets", "num_tokens", "num_positions", "utf8_bytes", "stop_requests", "grad_norm", "skipped"
)  # fmt: skip
Validate = Callable[[Engine, TrainState, int], MetricRow]  # (engine, state, maximum of tokens per split) -> a log row


class StopReason(Enum):
    """Why the loop ends. After TIME and SIGNAL the same command resumes the run; the others are final."""

    NONE = "the run continues"
    COMPLETED = "the last step is done"
    EARLY_STOP = "the stage ends the run"
    TIME = "--max_minutes is over"
    DEADLINE = "--minutes are over"
    SIGNAL = "SIGINT, SIGTERM or SIGHUP"

    def __bool__(self) -> bool:
        return self is not StopReason.NONE

    @property
    def is_final(self) -> bool:
        return self in (StopReason.COMPLETED, StopReason.EARLY_STOP, StopReason.DEADLINE)


class Run:
    """The state, engine, log, guard, timer and checkpoints of a run. `stop`: why its loop ends, NONE before.

    The constructor resumes an interrupted run of the same stage. It raises UserError if the run has no steps or if the
    resume folder belongs to another run.
    """

    def __init__(self, config: TrainConfig, stage: Stage, dist: DistContext, validate: Validate) -> None:
        self.stage, self.dist, self.validate = stage, dist, validate
        self.path = stage.checkpoint_path(config.out_dir)
        stage.model.activation_checkpointing = config.checkpoint_activations
        self.state, saved = load_train_state(config, stage, self.path, dist)
        self.sampler = stage.data.batch_sampler(self.state.rows_per_step, config.seed)
        self.total_steps = self.sampler.num_steps(config.max_steps, config.epochs)
        if self.total_steps < 1:  # an untrained model would replace the one at `path`
            raise UserError(f"a run of {self.total_steps} steps trains nothing: give --max_steps or --epochs above 0")
        log_startup(config, stage, self.sampler, self.total_steps, dist)
        self.config = config = decide_compile(config, stage, dist, self.state.rows_per_step, self.total_steps)
        self.engine = make_engine(config, stage, dist)
        if saved:
            self.engine.load_optimizer(saved, self.state.scaler)
        elif not stage.lineage:
            check_first_loss(config, stage, self.sampler, self.engine)
        self.logger = open_logger(config, stage, self.total_steps, self.state, dist)
        self.guard = NonFiniteGuard(config, stage, self.sampler, self.logger, dist)
        self.guard.start_from(self.state, is_resumed=saved is not None)
        self.throughput = Throughput(stage, dist)
        done = self.state.step / self.total_steps
        self.timer = TrainingTimer(config.max_minutes, done, self.state.seconds, dist, bool(stage.plan))
        self.samples = Samples(config, stage, dist, self.total_steps)
        self.checkpoints = CheckpointWriter(config, stage, self.engine, self.guard, saved is not None)
        # An early stop whose final validation or save is missing.
        self.stop = stop_reason(self.state, self.total_steps, self.timer)
        self.exits = contextlib.ExitStack()

    def __enter__(self) -> "Run":
        for each in (self.engine, self.logger, self.checkpoints):
            self.exits.enter_context(each)
        if not self.state.step:
            self.samples.take(self.logger, 0, 0.0)
        return self

    def __exit__(self, *error: object) -> None:
        self.exits.__exit__(*error)  # type: ignore[arg-type]
        if self.dist.is_rank0:
            from trainer.report_page import write_page  # draws with matplotlib

            try:
                write_page(self.path.parent)
            except Exception as problem:
                self.logger.warn(f"cannot write {self.path.parent / 'report.html'} ({one_line(problem)})")

    @property
    def numbers(self) -> range:
        """The numbers of the steps that are left, from 0."""
        return range(self.state.step, self.state.step if self.stop else self.total_steps)

    def is_due(self, step: int) -> bool:
        """Whether a validation, samples or a save follow step number `step`, counted from 1."""
        return step % self.config.eval_interval == 0 or self.samples.is_due(step) or self.checkpoints.is_due(step)

    def steps(self) -> Iterator[tuple[int, float]]:
        """Yield (number, learning rate) of each step until the run stops, for loops that end one step before the next.

        A new run is validated before its first step. After the last one the state is saved.
        """
        with self.dist.graceful_shutdown():
            if self.stage.validation and not self.state.step:
                self.logger.log_validation(self.validate(self.engine, self.state, self.config.eval_tokens))
            for number in self.numbers:
                yield number, start_step(self.engine, self.timer, number, self.total_steps)
                if self.stop:
                    break
            self.save()

    def end_step(self, sums: dict[str, float], micro_batches: list[Batch], lr: float, **metrics: float) -> None:
        """Count a step with these sums over all processes, log it with further metrics, validate and save where due.

        Raises UserError if the run diverges (loss_guard.py).
        """
        state, config = self.state, self.config
        state.update(sums, self.timer.finish_step())
        self.dist.step = state.step
        self.guard.check_step(sums, micro_batches)
        row = step_metrics(self.engine, state, sums) | metrics | self.sampler.step_metrics(state.step) | {"lr": lr}
        row |= self.timer.metrics(sums["num_tokens"], self.total_steps - state.step)
        row |= self.throughput.step_metrics(sums["num_tokens"], self.timer.step_seconds)
        state.objection = state.objection or self.stage.early_stop(state.validation | row)
        self.stop = stop_reason(state, self.total_steps, self.timer, sums["stop_requests"]) or self.stop
        is_logged = bool(self.stop) or state.step == 1 or state.step % config.log_interval == 0
        self.logger.log(row, is_due=is_logged)
        if self.stop:
            return
        if state.step % config.eval_interval == 0:
            self.logger.log_validation(self.validate(self.engine, state, config.eval_tokens))
        if self.samples.is_due(state.step):
            self.samples.take(self.logger, state.step, self.timer.session_seconds)
        if self.checkpoints.is_due(state.step):
            self.checkpoints.save(state)

    def save(self) -> None:
        """Save the state after the last step. Inside graceful_shutdown, so that no signal interrupts the write."""
        if self.stop is StopReason.SIGNAL:  # which another process may have received
            self.dist.stop_requested = self.dist.stop_requested or "SIGTERM"
        self.checkpoints.save(self.state, final=True)
        self.checkpoints.wait()

    def finish(self) -> None:
        """Validate, save the results in the lineage, remove the resume folder of a complete run, print the end."""
        state, config = self.state, self.config
        if self.stage.validation and self.stop is not StopReason.SIGNAL:
            state.validation = self.validate(self.engine, state, 8 * config.eval_tokens) | self.stage.final_metrics()
            self.logger.log_validation(state.validation)
            self.guard.check_validation(state.validation.get("val_loss", {}))
            self.checkpoints.save(state, final=True)
        if self.stop.is_final:
            self.samples.take(self.logger, state.step, math.inf)
        self.checkpoints.finish(complete=self.stop.is_final)
        self.dist.print0(self.throughput.summary(peak_memory_mb(self.dist.device.type)))
        end = describe_stop(self.stop, state, self.total_steps, config.max_minutes)
        self.dist.print0(f"saved {self.path}{end}")


def start_step(engine: Engine, timer: TrainingTimer, number: int, total_steps: int) -> float:
    """Set the learning rate, seed dropout and start the clock of a step, counted from 0. Returns the learning rate."""
    progress = max(number / total_steps, timer.fraction)
    lr = set_learning_rate(engine.config, engine.optimizers, number, progress)
    seed_dropout(engine.config.seed, number, engine.dist.rank)
    timer.start_step()
    return lr


def to_bits_per_byte(nats: float, utf8_bytes: float) -> float:
    return nats / math.log(2) / max(utf8_bytes, 1)


def mean_metrics(sums: dict[str, float], count: float) -> dict[str, float]:
    """Return the metrics per token or pair, without the auxiliary loss of a dense model, which is always 0."""
    return {name: value / max(count, 1) for name, value in sums.items() if value or name != "aux_loss"}


def step_metrics(engine: Engine, state: TrainState, sums: dict[str, float]) -> MetricRow:
    """Return the entries of a log row that come from the sums of a training step."""
    extras = {name: value for name, value in sums.items() if name not in STEP_KEYS}
    nats = sums["loss"] - sums.get("aux_loss", 0.0)
    return {
        "step": state.step,
        "loss": state.loss,
        **({"train_bits_per_byte": to_bits_per_byte(nats, sums["utf8_bytes"])} if "utf8_bytes" in sums else {}),
        **mean_metrics(extras, sums["num_targets"]),
        f"{engine.stage.loss_unit}s": state.tokens,
        "token_fraction": sums["num_tokens"] / max(sums["num_positions"], 1),
        "grad_norm": sums["grad_norm"],
        "peak_memory_mb": peak_memory_mb(engine.dist.device.type),
    }


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed torch for the dropout of a step: a resumed run draws the same masks."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


def stop_reason(state: TrainState, total_steps: int, timer: TrainingTimer, stop_requests: float = 0) -> StopReason:
    """Return why the loop ends after this step, or NONE."""
    if state.objection:
        return StopReason.EARLY_STOP
    if state.step >= total_steps:
        return StopReason.COMPLETED
    if stop_requests:
        return StopReason.SIGNAL
    if timer.is_expired:
        return StopReason.DEADLINE if timer.is_final else StopReason.TIME
    return StopReason.NONE


def describe_stop(stop: StopReason, state: TrainState, total_steps: int, max_minutes: float) -> str:
    """Return why a run ended before its last step, in parentheses, or "" if it did not."""
    if stop is StopReason.COMPLETED:
        return ""
    if stop is StopReason.EARLY_STOP:
        return f" (stopped at step {state.step} of {total_steps}: {state.objection})"
    if stop is StopReason.DEADLINE:
        return f" (the minutes are over at step {state.step} of {total_steps})"
    reason = f"the time limit of {max_minutes:g} minutes is reached" if stop is StopReason.TIME else stop.value
    return f" ({reason}, step {state.step} of {total_steps}; run again to resume)"
