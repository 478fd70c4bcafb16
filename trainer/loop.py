"""The training loop of all stages. The script supplies the loss function and the data (stage.py).

    for each step:
        N = number of trained tokens in all micro-batches of all processes
        for each micro-batch:   loss_sum = compute_loss(model, batch);   (loss_sum / N).backward()
        clip the gradient; optimizer step; log; validate; save

Dividing by N makes gradient accumulation exact: batch 8 = 4 x 2 accumulated = 2 processes x 2 x 2 accumulated, up to
floating-point rounding. Data, learning rate and dropout seed depend only on the step number, so a killed run resumes
from its last save and ends with the same weights as an uninterrupted one.
Read next: stage.py, run.py (logs, validates, saves), datasets.py, loss.py, engine.py, train_state.py.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.checkpoint_writer import with_run_lock
from trainer.config import TrainConfig
from trainer.datasets import Batch, MicroBatches, prefetch_batches, to_device, validation_batches
from trainer.distributed import DistContext, MetricSums, PendingSums
from trainer.engine import Engine
from trainer.metrics import MetricRow
from trainer.run import Run, mean_metrics, start_step, to_bits_per_byte
from trainer.stage import Stage
from trainer.timer import TrainingTimer
from trainer.train_state import TrainState, micro_batch_size


def train(config: TrainConfig, stage: Stage, dist: DistContext) -> Path:
    """Train the stage. Returns the checkpoint's path. --explain prints the first step instead and ends the process."""
    if config.explain:
        from trainer.explain import explain

        explain(config, stage, dist, train_step)
        raise SystemExit(0)
    return run_training(config, stage, dist)


@with_run_lock
def run_training(config: TrainConfig, stage: Stage, dist: DistContext) -> Path:
    """Train until the last step, the time limit, an early stop or a signal, then save. Returns the checkpoint's path.

    Resumes an interrupted run of the same stage. Raises UserError if the run has no steps, if it diverges or ends with
    non-finite values (loss_guard.py; the last good save is kept), or if the resume folder belongs to another run.
    """
    with Run(config, stage, dist, validate) as run:
        rows = micro_batch_size(config, run.state.rows_per_step, dist.world_size)
        batches = MicroBatches(stage.data, run.sampler, rows, dist.rank, dist.world_size)
        steps = TrainingSteps(run.engine, run.timer, batches, run.numbers, run.total_steps, run.is_due)
        with dist.graceful_shutdown():
            for step in steps:
                run.logger.print(run.sampler.notice_before(run.state.step))
                run.end_step(step.read(), step.micro_batches, step.lr)
                if run.stop:
                    steps.end()
            run.save()
        run.finish()
    return run.path


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
        stage = self.engine.stage
        if stage.loss_unit == "token":
            for batch in micro_batches:
                batch["utf8_bytes"] = stage.utf8_bytes(batch["labels"])
        lr = start_step(self.engine, self.timer, number, self.total_steps)
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
