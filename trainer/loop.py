"""The training loop of all stages. The script supplies the loss function and the data (stage.py).

    for each step:
        N = number of trained tokens in all micro-batches of all processes
        for each micro-batch:   loss_sum = compute_loss(model, batch);   (loss_sum / N).backward()
        clip the gradient; optimizer step; log; validate; save

Dividing by N makes gradient accumulation exact: batch 8 = 4 x 2 accumulated = 2 processes x 2 x 2 accumulated, up to
floating-point rounding. Data, learning rate and dropout seed depend only on the step number, so a killed run resumes
from its last save and ends with the same weights as an uninterrupted one.
Read next: stage.py, datasets.py, loss.py, engine.py, train_state.py.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from trainer.checkpoint_writer import CheckpointWriter, with_run_lock
from trainer.compilation import decide_compile
from trainer.config import TrainConfig
from trainer.datasets import Batch, MicroBatches, prefetch_batches, to_device, validation_batches
from trainer.distributed import DistContext, MetricSums, PendingSums
from trainer.engine import Engine
from trainer.loss_guard import NonFiniteGuard
from trainer.metrics import MetricRow, peak_memory_mb
from trainer.optim import set_learning_rate
from trainer.stage import Stage
from trainer.startup import check_first_loss, log_startup, make_engine, open_logger
from trainer.throughput import Throughput
from trainer.timer import TrainingTimer
from trainer.train_state import TrainState, load_train_state, micro_batch_size

STEP_KEYS = (
    "loss", "num_targets", "num_tokens", "num_positions", "utf8_bytes", "stop_requests", "grad_norm", "skipped"
)  # fmt: skip


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


@with_run_lock
def train(config: TrainConfig, stage: Stage, dist: DistContext) -> Path:
    """Train until the last step, the time limit, an early stop or a signal, then save. Returns the checkpoint's path.

    Resumes an interrupted run of the same stage. Raises UserError if the run has no steps, if it diverges or ends with
    non-finite values (loss_guard.py; the last good save is kept), or if the resume folder belongs to another run.
    """
    path = stage.checkpoint_path(config.out_dir)
    stage.model.activation_checkpointing = config.checkpoint_activations
    state, saved = load_train_state(config, stage, path, dist)
    sampler = stage.data.batch_sampler(state.rows_per_step, config.seed)
    total_steps = sampler.num_steps(config.max_steps, config.epochs)
    if total_steps < 1:  # an untrained model would replace the one at `path`
        raise UserError(f"a run of {total_steps} steps trains nothing: give --max_steps or --epochs above 0")
    log_startup(config, stage, sampler, total_steps, dist)
    config = decide_compile(config, stage, dist, state.rows_per_step, total_steps)
    engine = make_engine(config, stage, dist)
    if saved:
        engine.load_optimizer(saved, state.scaler)
    elif not stage.lineage:
        check_first_loss(config, stage, sampler, engine)
    logger = open_logger(config, stage, total_steps, state, dist)
    guard = NonFiniteGuard(config, stage, sampler, logger, dist)
    guard.start_from(state, is_resumed=saved is not None)
    rows = micro_batch_size(config, state.rows_per_step, dist.world_size)
    batches = MicroBatches(stage.data, sampler, rows, dist.rank, dist.world_size)
    throughput = Throughput(stage, dist)
    timer = TrainingTimer(config.max_minutes, state.step / total_steps, state.seconds, dist, bool(stage.plan))
    stop = stop_reason(state, total_steps, timer)  # an early stop whose final validation or save is missing
    numbers = range(state.step, state.step if stop else total_steps)
    with engine, logger, CheckpointWriter(config, stage, engine, guard, saved is not None) as checkpoints:
        with dist.graceful_shutdown():
            is_due = lambda step: step % config.eval_interval == 0 or checkpoints.is_due(step)
            steps = TrainingSteps(engine, timer, batches, numbers, total_steps, is_due)
            for step in steps:
                logger.print(sampler.notice_before(state.step))
                sums = step.read()
                state.update(sums, timer.finish_step())
                dist.step = state.step
                guard.check_step(sums, step.micro_batches)
                row = step_metrics(engine, state, sums) | sampler.step_metrics(state.step) | {"lr": step.lr}
                row |= timer.metrics(sums["num_tokens"], total_steps - state.step)
                row |= throughput.step_metrics(sums["num_tokens"], timer.step_seconds)
                state.objection = state.objection or stage.early_stop(row)
                stop = stop_reason(state, total_steps, timer, sums["stop_requests"]) or stop
                logger.log(row, is_due=bool(stop) or state.step == 1 or state.step % config.log_interval == 0)
                if stop:
                    steps.end()
                    continue
                if state.step % config.eval_interval == 0:
                    logger.log_validation(validate(engine, state, config.eval_tokens))
                if checkpoints.is_due(state.step):
                    checkpoints.save(state)
            if stop is StopReason.SIGNAL:  # which another process may have received
                dist.stop_requested = dist.stop_requested or "SIGTERM"
            checkpoints.save(state, final=True)
            checkpoints.wait()  # still inside graceful_shutdown, so that a second signal cannot interrupt the write
        if stage.validation and stop is not StopReason.SIGNAL:
            state.validation = validate(engine, state, 8 * config.eval_tokens) | stage.final_metrics()
            logger.log_validation(state.validation)
            guard.check_validation(state.validation["val_loss"])
            checkpoints.save(state, final=True)  # save again, with the validation results in the lineage
        checkpoints.finish(complete=stop.is_final)
    dist.print0(throughput.summary(peak_memory_mb(dist.device.type)))
    dist.print0(f"saved {path}{describe_stop(stop, state, total_steps, config.max_minutes)}")
    return path


@dataclasses.dataclass
class LaunchedStep:
    """A step that the device may still compute."""

    lr: float
    micro_batches: list[Batch]
    sums: PendingSums

    def read(self) -> dict[str, float]:
        """Wait for the step. Returns its sums over all processes, and whether it was skipped (see train_step)."""
        sums = self.sums.read()
        return sums | {"skipped": not (math.isfinite(sums["loss"]) and math.isfinite(sums["grad_norm"]))}


class TrainingSteps:
    """Iterates over the steps of a run: launches them and yields each one when its sums are to be read.

    With dist.reads_late a step is yielded after the next one is launched, so that the device never waits for the host.
    A step that `is_due` (a validation or save follows) and the last one are yielded at once. After `end` no step is
    launched; one that already is, is yielded, so such a run ends one step later.
    """

    def __init__(
        self, engine: Engine, timer: TrainingTimer, batches: MicroBatches, numbers: range, total_steps: int,
        is_due: Callable[[int], bool],
    ) -> None:  # fmt: skip
        self.engine, self.timer, self.batches, self.is_due = engine, timer, batches, is_due
        self.numbers, self.total_steps, self.is_ended = numbers, total_steps, False

    def end(self) -> None:
        self.is_ended = True

    def __iter__(self) -> Iterator[LaunchedStep]:
        waiting: LaunchedStep | None = None
        config, device = self.engine.config, self.engine.dist.device
        loaded = prefetch_batches(self.batches, self.numbers, config.num_workers, device.type)
        for number, micro_batches in zip(self.numbers, loaded, strict=True):
            launched = self.launch(number, micro_batches)
            if waiting:
                yield waiting
            waiting = launched
            if not self.engine.dist.reads_late or self.is_due(number + 1):
                yield waiting
                waiting = None
            if self.is_ended:
                break
        if waiting:
            yield waiting

    def launch(self, number: int, micro_batches: list[Batch]) -> LaunchedStep:
        config, dist = self.engine.config, self.engine.dist
        progress = max(number / self.total_steps, self.timer.fraction)
        lr = set_learning_rate(config, self.engine.optimizers, number, progress)
        seed_dropout(config.seed, number, dist.rank)
        if self.engine.stage.loss_unit == "token":
            for batch in micro_batches:
                batch["utf8_bytes"] = self.engine.stage.utf8_bytes(batch["labels"])
        self.timer.start_step()
        return LaunchedStep(lr, micro_batches, train_step(self.engine, micro_batches))


def train_step(engine: Engine, micro_batches: list[Batch]) -> PendingSums:
    """Make one optimizer step over this process's micro-batches. Returns sums over all processes.

    Names: loss (sum), num_targets (trained tokens or pairs), num_tokens (tokens that are not padding), num_positions
    (all), utf8_bytes (of trained tokens), stop_requests (number of processes with a stop signal), grad_norm (before
    clipping), and the sums that compute_loss returns. If loss or norm are not finite, the step is skipped. The host
    does not wait for the device.
    """
    dist, sums = engine.dist, MetricSums(engine.dist)
    num_targets = dist.all_reduce(sums.number(sum(batch["num_targets"] for batch in micro_batches)))
    # 1 / N, times world_size because engines average gradients over processes.
    loss_scale = dist.world_size / num_targets.clamp(min=1)
    for i, batch in enumerate(micro_batches):
        is_last = i == len(micro_batches) - 1
        loss, metrics = engine.forward_backward(to_device(batch, dist.device), loss_scale, is_last)
        sums.add(loss=loss, num_targets=batch["num_targets"], num_tokens=batch["num_tokens"])
        sums.add(num_positions=batch["labels"].numel(), **metrics)
        if "utf8_bytes" in batch:
            sums.add(utf8_bytes=batch["utf8_bytes"])
    norm = engine.clip_gradient(engine.config.grad_clip) / dist.world_size  # equal on all of them
    sums.add(grad_norm=norm, stop_requests=bool(dist.stop_requested))
    total = sums.reduce()
    engine.optimizer_step(total["loss"].isfinite() & total["grad_norm"].isfinite())
    return total


def validate(engine: Engine, state: TrainState, max_tokens: int) -> MetricRow:
    """Return the mean loss and metrics per trained token (or pair) of every validation split.

    For token losses also bits_per_byte = loss sum / ln 2 / UTF-8 bytes of the trained tokens.
    """
    dist, stage = engine.dist, engine.stage
    row: MetricRow = {"step": state.step, f"{stage.loss_unit}s": state.tokens, "val_loss": {}}
    for split, data in stage.validation.items():
        sums = MetricSums(dist)
        with engine.eval_mode():
            for batch in validation_batches(data, engine.config.batch_size, dist.rank, dist.world_size, max_tokens):
                loss, metrics = engine.evaluate(to_device(batch, dist.device))
                sums.add(loss=loss, num_targets=batch["num_targets"], utf8_bytes=stage.utf8_bytes(batch["labels"]))
                sums.add(**metrics)
        total = sums.reduce().read()
        loss_sum, num_targets, utf8_bytes = (total.pop(name) for name in ("loss", "num_targets", "utf8_bytes"))
        row["val_loss"][split] = loss_sum / max(num_targets, 1)
        if stage.loss_unit == "token":
            row.setdefault("bits_per_byte", {})[split] = to_bits_per_byte(loss_sum, utf8_bytes)
        for name, value in mean_metrics(total, num_targets).items():
            row.setdefault(f"val_{name}", {})[split] = value
    return row


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
