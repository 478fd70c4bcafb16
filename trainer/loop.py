"""The training loop of all stages. The script supplies the loss function and the data (stage.py).

    for each step:
        N = number of trained tokens in all micro-batches of all processes
        for each micro-batch:   loss_sum = compute_loss(model, batch);   (loss_sum / N).backward()
        clip the gradient; optimizer step; log; validate; save

Dividing by N makes gradient accumulation exact: batch 8 = 4 x 2 accumulated = 2 processes x 2 x 2 accumulated, up to
floating-point rounding. Data, learning rate and dropout seed depend only on the step number, so a killed run resumes
from its last save and ends with the same weights as an uninterrupted one.
Read next: stage.py, sampler.py, loss.py, engine.py, train_state.py.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from corpus.provenance import data_provenance, format_provenance
from model.checkpoint import build_checkpoint
from trainer.checkpoint_writer import CheckpointWriter, clone_checkpoint, with_run_lock
from trainer.datasets import Batch, to_device
from trainer.distributed import DistContext
from trainer.engine import Engine
from trainer.loss import IGNORE_INDEX
from trainer.loss_guard import NonFiniteGuard
from trainer.metrics import MetricLogger, MetricRow, format_metrics, open_wandb, peak_memory_mb
from trainer.mixing import make_sampler
from trainer.optim import set_learning_rate
from trainer.parallel import make_engine
from trainer.sampler import BatchSampler, MicroBatches, prefetch_batches, validation_batches
from trainer.stage import Stage
from trainer.startup import check_first_loss, log_startup
from trainer.timer import TrainingTimer
from trainer.train_state import TrainState, load_train_state, resolve_global_batch_size


@with_run_lock
def train(dist: DistContext, args: argparse.Namespace, stage: Stage) -> Path:
    """Train until the last step, the time limit or a signal, then save. Returns the path of the checkpoint.

    Raises UserError if the run has no steps, if it diverges or ends with non-finite values (loss_guard.py; the last
    good save is kept), or if the resume folder belongs to another run.
    """
    path = stage.checkpoint_path(args.out_dir)
    stage.model.activation_checkpointing = args.checkpoint_activations
    rows_per_step = resolve_global_batch_size(dist, args, path)
    sampler = make_sampler(stage.data, rows_per_step, args)
    total = sampler.num_steps(args.max_steps, args.epochs)
    if total < 1:  # an untrained model would replace the one at `path`
        raise UserError(f"a run of {total} steps trains nothing: give --max_steps or --epochs above 0")
    train_state, saved_state = load_train_state(dist, args, stage, path, rows_per_step)
    log_startup(dist, args, stage, sampler, total)
    engine = make_engine(dist, args, stage)
    if saved_state:
        engine.load_state_dict(saved_state)
        if train_state.scaler:  # empty unless the saved run used fp16
            engine.scaler.load_state_dict(train_state.scaler)
    elif not stage.lineage:
        check_first_loss(dist, args, stage, sampler, engine)
    batches = MicroBatches(stage.data, sampler, args.batch_size, dist.rank, dist.world_size)
    # If the saved run had stopped early, only its final validation and save are missing.
    end = train_state.step if train_state.objection else total
    logger = open_metric_logger(dist, args, stage, path, total, train_state.step)
    writer = CheckpointWriter(dist, path, is_resuming=saved_state is not None)
    guard = NonFiniteGuard(dist, args, stage, sampler, logger)
    guard.start_from(train_state, resumed=saved_state is not None)
    step_batches: list[Batch] = []

    def save(final: bool = False) -> str:
        """Save and return "", or return why the state must not be saved."""
        writer.wait()  # until the previous save is on disk
        dist.barrier()  # wait for rank 0, which writes the most
        engine.gather_weights()
        if problem := guard.save_problem(engine, step_batches, final):
            return problem
        lineage = [*stage.lineage, lineage_entry(args, stage, train_state, stop_reason)]
        content = None
        if dist.is_rank0:
            content = clone_checkpoint(build_checkpoint(stage.model, stage.name, stage.tokenizer, lineage))
        writer.save(train_state, engine, content)
        guard.mark_saved()
        return ""

    timer = TrainingTimer(args.max_minutes, train_state.step / max(total, 1), train_state.seconds)
    # Why the run ends before its last step: pause_reason can be resumed (signal, time limit), stop_reason is final.
    pause_reason, stop_reason = "", train_state.objection
    is_save_due = is_stopped = False
    try:
        with dist.graceful_shutdown():
            for step_batches in prefetch_batches(batches, train_state.step, end, args.num_workers):
                if notice := sampler.notice_before(train_state.step):
                    logger.print(notice)
                progress = max(train_state.step / total, timer.fraction)
                lr = set_learning_rate(args, engine.optimizers, train_state.step, progress)
                torch.manual_seed(hash((args.seed, train_state.step, dist.rank)) % 2**63)  # dropout of this step
                timer.start_step()
                result = train_step(dist, args, engine, stage, step_batches)
                timer.end_step(dist)
                train_state.update(result, timer.seconds)
                dist.step = train_state.step
                guard.check_step(result)
                row = training_metrics(stage, train_state, result, lr, sampler, timer, total, dist.device.type)
                logger.update_bar(train_state.step, format_metrics(row))
                train_state.objection = stop_reason = stage.early_stop(row) if stage.early_stop else ""
                pause_reason = "" if train_state.step == total or stop_reason else interruption(result, timer)
                if is_stopped := bool(pause_reason and result["stop"]):
                    dist.stop_requested = dist.stop_requested or "SIGTERM"  # received by another process
                is_last = bool(pause_reason or stop_reason) or train_state.step == total
                if train_state.step % args.log_interval == 0 or train_state.step == 1 or is_last:
                    logger.log(row)
                if is_last:
                    break  # the final validation and save follow the loop
                if train_state.step % args.eval_interval == 0:
                    logger.log_validation(validate(dist, args, engine, stage, train_state, args.eval_tokens))
                if is_save_due or train_state.step % args.save_interval == 0:
                    is_save_due = guard.postpone_save(save(), is_save_due)
            if problem := save(final=True):
                raise guard.make_error(problem)
            writer.wait()  # still inside graceful_shutdown, so that a second signal cannot interrupt the write
        if stage.validation and not is_stopped:
            train_state.validation = validate(dist, args, engine, stage, train_state, 8 * args.eval_tokens)
            train_state.validation |= stage.final_metrics() if stage.final_metrics else {}
            logger.log_validation(train_state.validation)
            guard.check_validation(train_state.validation["val_loss"])
            save(final=True)  # save again, with the validation results in the lineage
        writer.close(complete=not pause_reason)
    finally:
        writer.abort()
        engine.close()
        logger.close()
    dist.print0(f"saved {path}{describe_stop(train_state.step, total, pause_reason, stop_reason)}")
    return path


def open_metric_logger(
    dist: DistContext, args: argparse.Namespace, stage: Stage, path: Path, total: int, last_step: int
) -> MetricLogger:
    """Open the log next to the checkpoint, continued after step `last_step`; with --use_wandb also a wandb run."""
    logger = MetricLogger(path.with_suffix(".jsonl"), stage.name, total, dist.is_rank0, last_step)
    if args.use_wandb and dist.is_rank0:
        logger.tracker = open_wandb(args.wandb_project, args.wandb_run_name, vars(args))
    return logger


def describe_stop(step: int, total: int, pause_reason: str, stop_reason: str) -> str:
    """Return why a run ended before its last step, in parentheses, or "" if it did not."""
    if stop_reason:
        return f" (stopped at step {step} of {total}: {stop_reason})"
    return f" ({pause_reason}, step {step} of {total}; run again to resume)" if pause_reason else ""


def train_step(
    dist: DistContext, args: argparse.Namespace, engine: Engine, stage: Stage, batches: list[Batch]
) -> dict[str, float]:
    """Make one optimizer step over this process's micro-batches. Returns sums over all processes.

    Keys: loss (sum), tokens (trained tokens or pairs), real_tokens (tokens that are not padding), positions (all),
    stop (number of processes with a stop signal), grad_norm (before clipping), skipped (1.0 if the loss or the norm is
    not finite), and the sums that compute_loss returns.
    """
    num_targets = dist.all_reduce_sum([float(sum(map(stage.count_targets, batches)))])[0]
    # 1 / N, times world_size because engines average gradients over processes.
    loss_scale = dist.world_size / max(num_targets, 1.0)
    sums: dict[str, float] = {"loss": 0.0, "tokens": 0.0, "real_tokens": 0.0, "positions": 0.0}
    for i, batch in enumerate(batches):
        is_last = i == len(batches) - 1
        loss, count, extras = engine.forward_backward(to_device(batch, dist.device), loss_scale, last=is_last)
        mask = batch["token_mask"]
        accumulate(sums, {"loss": loss, "tokens": count, "real_tokens": mask.sum(), "positions": mask.numel()})
        accumulate(sums, extras)
    sums["stop"] = float(bool(dist.stop_requested))
    total = dict(zip(sums, dist.all_reduce_sum(list(sums.values())), strict=True))
    assert total["tokens"] == num_targets, "compute_loss and Stage.count_targets differ"
    total["grad_norm"] = engine.optimizer_step(args.grad_clip, math.isfinite(total["loss"]))
    total["skipped"] = float(not math.isfinite(total["loss"]) or not math.isfinite(total["grad_norm"]))
    return total


def accumulate(sums: dict[str, float], values: dict[str, Any] | None = None) -> None:
    """sums[name] += value, for numbers and scalar tensors alike."""
    for name, value in (values or {}).items():
        sums[name] = sums.get(name, 0.0) + torch.as_tensor(value).item()


def validate(
    dist: DistContext, args: argparse.Namespace, engine: Engine, stage: Stage, train_state: TrainState, max_tokens: int
) -> MetricRow:
    """Return the mean loss and metrics per trained token (or pair) of every validation split, with the training loss.

    For token losses also bits_per_byte = loss sum / ln 2 / UTF-8 bytes of the trained tokens.
    """
    bytes_per_token = torch.from_numpy(stage.tokenizer.byte_lengths())
    row: MetricRow = {"step": train_state.step, f"{stage.loss_unit}s": train_state.tokens, "val_loss": {}}
    for split, data in stage.validation.items():
        sums = {"loss": 0.0, "count": 0.0, "bytes": 0.0}
        with engine.eval_mode():
            for batch in validation_batches(data, args.batch_size, dist.rank, dist.world_size, max_tokens):
                loss, count, extras = engine.evaluate(to_device(batch, dist.device))
                targets = batch["labels"][batch["labels"] != IGNORE_INDEX]
                accumulate(sums, {"loss": loss, "count": count, "bytes": bytes_per_token[targets].sum()})
                accumulate(sums, extras)
        total = dict(zip(sums, dist.all_reduce_sum(list(sums.values())), strict=True))
        loss_sum, trained, n_bytes = (total.pop(name) for name in ("loss", "count", "bytes"))
        row["val_loss"][split] = loss_sum / max(trained, 1)
        if stage.loss_unit == "token":
            row.setdefault("bits_per_byte", {})[split] = loss_sum / math.log(2) / max(n_bytes, 1)
        for name, value in mean_metrics(total, trained).items():
            row.setdefault(f"val_{name}", {})[split] = value
    return row


def interruption(result: dict[str, float], timer: TrainingTimer) -> str:
    """Return why the run has to pause before its last step, or ""."""
    if result["stop"]:
        return "SIGINT, SIGTERM or SIGHUP"
    return f"the time limit of {timer.limit_seconds / 60:g} minutes is reached" if timer.is_expired else ""


def mean_metrics(sums: dict[str, float], count: float) -> dict[str, float]:
    """Return the metrics per token or pair, without the auxiliary loss of a dense model, which is always 0."""
    return {name: value / max(count, 1) for name, value in sums.items() if value or name != "aux_loss"}


def training_metrics(
    stage: Stage,
    train_state: TrainState,
    result: dict[str, float],
    lr: float,
    sampler: BatchSampler,
    timer: TrainingTimer,
    total: int,
    device_type: str,
) -> MetricRow:
    """Return the log row of a training step: losses per token or pair, speed, memory, and the sampler's metrics."""
    own_keys = ("loss", "tokens", "real_tokens", "positions", "stop", "grad_norm", "skipped")
    extras = {name: value for name, value in result.items() if name not in own_keys}
    return {
        "step": train_state.step,
        "epoch": (train_state.step - 1) / sampler.steps_per_epoch,
        "loss": result["loss"] / max(result["tokens"], 1),
        **mean_metrics(extras, result["tokens"]),
        "lr": lr,
        f"{stage.loss_unit}s": train_state.tokens,
        "tokens_per_second": result["real_tokens"] / max(timer.step_seconds, 1e-9),
        "token_fraction": result["real_tokens"] / max(result["positions"], 1),
        "grad_norm": result["grad_norm"],
        **sampler.step_metrics(train_state.step),
        "seconds": train_state.seconds,
        "seconds_left": timer.seconds_left(total - train_state.step),
        "peak_memory_mb": peak_memory_mb(device_type),
    }


def lineage_entry(
    args: argparse.Namespace, stage: Stage, train_state: TrainState, stop_reason: str = ""
) -> dict[str, Any]:
    """Return the entry of this stage in the lineage of its checkpoint."""
    unit_key = f"{stage.loss_unit}s"
    return {
        "stage": stage.name,
        "data": str(args.data_path),
        **stage.mix,
        **({"data_history": provenance} if (provenance := format_provenance(data_provenance(args.data_path))) else {}),
        "steps": train_state.step,
        unit_key: train_state.tokens,
        "seconds": train_state.seconds,
        "loss": train_state.loss,
        "validation": {name: value for name, value in train_state.validation.items() if name not in ("step", unit_key)},
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        **({"stopped": stop_reason} if stop_reason else {}),
    }
