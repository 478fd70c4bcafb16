"""The one training loop. A script says what is learnt (its loss and data), this file says when things happen.

    for each step:
        count the trained tokens of all micro-batches of all processes
        for each micro-batch:   sum of losses = compute_loss(model, batch);   backward of it / that number
        clip; step; log; validate; save

So batch 8 = 4 x 2 accumulated = 2 processes x 2 x 2, to rounding. The step number alone decides the data, the learning
rate and the seed of dropout: a run that was killed goes on from its last save and ends with the very same weights.
Read next: stage.py, sampler.py, loss.py, engine.py, train_state.py.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from corpus.provenance import history_in_words, history_of_data
from model.checkpoint import model_content
from trainer.checkpoint_writer import Saver, detached, one_writer
from trainer.datasets import Batch, to_device
from trainer.distributed import Run
from trainer.engine import Engine
from trainer.loss import IGNORE
from trainer.loss_guard import Watch
from trainer.metrics import Logbook, Row, describe, open_wandb, peak_memory_mb
from trainer.mixing import step_plan
from trainer.optim import set_schedule
from trainer.parallel import share_out
from trainer.sampler import StepBatches, StepPlan, iterate, validation_batches
from trainer.stage import Stage
from trainer.startup import announce, check_first_loss
from trainer.timer import Clock
from trainer.train_state import Progress, global_batch, load_progress


@one_writer
def train(run: Run, args: argparse.Namespace, stage: Stage) -> Path:
    """Run the stage to its end (steps, minutes, or a signal) and save; returns the path of the model.

    Raises UserError when the run has no step, when it ends with non-finite numbers or diverges (loss_guard.py: the last
    good save stays), or when a resume file belongs to another run.
    """
    path = stage.path(args.out_dir)
    stage.model.activation_checkpointing = args.checkpoint_activations
    rows_per_step = global_batch(run, args, path)
    plan = step_plan(stage.data, rows_per_step, args)
    total = plan.run_steps(args.max_steps, args.epochs)
    if total < 1:  # an untrained model would replace the one at `path`
        raise UserError(f"a run of {total} steps trains nothing: give --max_steps or --epochs above 0")
    progress, saved = load_progress(run, args, stage, path, rows_per_step)
    announce(run, args, stage, plan, total)
    engine = share_out(run, args, stage)
    if saved:
        engine.load(saved)
        if progress.scaler:  # fp16 then and now
            engine.scaler.load_state_dict(progress.scaler)
    elif not stage.lineage:
        check_first_loss(run, args, stage, plan, engine)
    batches = StepBatches(stage.data, plan, args.batch_size, run.rank, run.world)
    end = progress.step if progress.objection else total  # a run that had ended only lacks its last validation and save
    log = open_log(run, args, stage, path, total, progress.step)
    saver = Saver(run, path, going_on=saved is not None)
    watch = Watch(run, args, stage, plan, log)
    watch.start(progress, resumed=saved is not None)
    step_batches: list[Batch] = []

    def save(final: bool = False) -> str:
        """Save, and return ""; or, when the state is not good, return why."""
        saver.finish()  # the one before
        run.wait()  # for the first process, which has the most to write
        engine.refresh()
        if problem := watch.problem(engine, step_batches, final):
            return problem
        lineage = [*stage.lineage, entry(args, stage, progress, objection)]
        content = detached(model_content(stage.model, stage.name, stage.tokenizer, lineage)) if run.is_main else None
        saver.begin(progress, engine, content)
        watch.saved()
        return ""

    clock = Clock(args.max_minutes, progress.step / max(total, 1), progress.seconds)
    reason, objection = "", progress.objection  # why the run ends early: for now, or because the guard objects
    save_is_due = stopped = False
    try:
        with run.polite_stop():
            for step_batches in iterate(batches, progress.step, end, args.num_workers):
                if news := plan.news(progress.step):
                    log.say(news)
                lr = set_schedule(args, engine.optimizers, progress.step, max(progress.step / total, clock.share))
                torch.manual_seed(hash((args.seed, progress.step, run.rank)) % 2**63)  # dropout of this step
                clock.step_begins()
                result = train_step(run, args, engine, stage, step_batches)
                clock.step_ends(run)
                progress.advance(result, clock.seconds)
                run.step = progress.step
                watch.check(result)
                row = training_row(stage, progress, result, lr, plan, clock, total, run.device.type)
                log.step(progress.step, describe(row))
                progress.objection = objection = stage.guard(row) if stage.guard else ""
                reason = "" if progress.step == total or objection else run_over(result, clock)
                if stopped := bool(reason and result["stop"]):
                    run.stop_asked = run.stop_asked or "SIGTERM"  # that another process received
                last = bool(reason or objection) or progress.step == total
                if progress.step % args.log_interval == 0 or progress.step == 1 or last:
                    log.row(row)
                if last:
                    break  # the final validation and save come below
                if progress.step % args.eval_interval == 0:
                    log.validation(validate(run, args, engine, stage, progress, args.eval_tokens))
                if save_is_due or progress.step % args.save_interval == 0:
                    save_is_due = watch.postponed(save(), save_is_due)
            if problem := save(final=True):
                raise watch.ending(problem)
            saver.finish()  # before a second signal can interrupt it
        if stage.validation and not stopped:
            progress.validation = validate(run, args, engine, stage, progress, 8 * args.eval_tokens)
            progress.validation |= stage.examine() if stage.examine else {}
            log.validation(progress.validation)
            watch.check_validation(progress.validation["val_loss"])
            save(final=True)  # once more, with the final scores in the lineage
        saver.close(complete=not reason)
    finally:
        saver.abandon()
        engine.close()
        log.close()
    run.say(f"saved {path}{ending(progress.step, total, reason, objection)}")
    return path


def open_log(run: Run, args: argparse.Namespace, stage: Stage, path: Path, total: int, keep_until: int) -> Logbook:
    """The run's log beside its model, continued behind step `keep_until`; with --use_wandb it is sent there too."""
    log = Logbook(path.with_suffix(".jsonl"), stage.name, total, run.is_main, keep_until)
    if args.use_wandb and run.is_main:
        log.send_elsewhere = open_wandb(args.wandb_project, args.wandb_run_name, vars(args))
    return log


def ending(step: int, total: int, reason: str, objection: str) -> str:
    """Why a run ended before its last step, in brackets; nothing when it did not."""
    if objection:
        return f" (stopped at step {step} of {total}: {objection})"
    return f" ({reason}, step {step} of {total}; run again to go on)" if reason else ""


def train_step(
    run: Run, args: argparse.Namespace, engine: Engine, stage: Stage, batches: list[Batch]
) -> dict[str, float]:
    """One optimizer step over this process's micro-batches. Returns what all processes saw together."""
    units = run.sum([float(sum(map(stage.count, batches)))])[0]
    share = run.world / max(units, 1.0)  # of the summed loss of everybody; engines average over processes
    sums: dict[str, float] = {"loss": 0.0, "tokens": 0.0, "real": 0.0, "positions": 0.0}
    for i, batch in enumerate(batches):
        loss, count, extras = engine.learn(to_device(batch, run.device), share, last=i == len(batches) - 1)
        add(sums, {"loss": loss, "tokens": count, "real": batch["real"].sum(), "positions": batch["real"].numel()})
        add(sums, extras)
    sums["stop"] = float(bool(run.stop_asked))
    total = dict(zip(sums, run.sum(list(sums.values())), strict=True))
    assert total["tokens"] == units, "compute_loss counts otherwise than Stage.count"
    total["grad_norm"] = engine.step(args.grad_clip, math.isfinite(total["loss"]))
    total["skipped"] = float(not math.isfinite(total["loss"]) or not math.isfinite(total["grad_norm"]))
    return total


def add(sums: dict[str, float], values: dict[str, Any] | None = None) -> None:
    """sums[name] += value, for numbers and scalar tensors alike."""
    for name, value in (values or {}).items():
        sums[name] = sums.get(name, 0.0) + torch.as_tensor(value).item()


def validate(
    run: Run, args: argparse.Namespace, engine: Engine, stage: Stage, progress: Progress, max_tokens: int
) -> Row:
    """Loss and extras per trained token (or pair) of every validation split, by the very loss that is trained.

    For tokens also bits per byte = summed loss / ln 2 / UTF-8 bytes that the trained tokens stand for.
    """
    bytes_of = torch.from_numpy(stage.tokenizer.byte_lengths())
    row: Row = {"step": progress.step, f"{stage.unit}s": progress.tokens, "val_loss": {}}
    for split, data in stage.validation.items():
        sums = {"loss": 0.0, "count": 0.0, "bytes": 0.0}
        with engine.evaluating():
            for batch in validation_batches(data, args.batch_size, run.rank, run.world, max_tokens):
                loss, count, extras = engine.evaluate(to_device(batch, run.device))
                labels = batch["labels"]
                add(sums, {"loss": loss, "count": count, "bytes": bytes_of[labels[labels != IGNORE]].sum()})
                add(sums, extras)
        total = dict(zip(sums, run.sum(list(sums.values())), strict=True))
        loss_sum, trained, n_bytes = (total.pop(name) for name in ("loss", "count", "bytes"))
        row["val_loss"][split] = loss_sum / max(trained, 1)
        if stage.unit == "token":
            row.setdefault("bits_per_byte", {})[split] = loss_sum / math.log(2) / max(n_bytes, 1)
        for name, value in averages(total, trained).items():
            row.setdefault(f"val_{name}", {})[split] = value
    return row


def run_over(result: dict[str, float], clock: Clock) -> str:
    """Why the run ends before its last step; empty when it does not."""
    if result["stop"]:
        return "SIGINT, SIGTERM or SIGHUP"
    return f"{clock.limit / 60:g} minutes are over" if clock.is_over else ""


def averages(sums: dict[str, float], count: float) -> dict[str, float]:
    """What a loss wants logged, per token or pair; not the balance loss of a model without a router, which is 0."""
    return {name: value / max(count, 1) for name, value in sums.items() if value or name != "balance_loss"}


def training_row(
    stage: Stage,
    progress: Progress,
    result: dict[str, float],
    lr: float,
    plan: StepPlan,
    clock: Clock,
    total: int,
    device_type: str,
) -> Row:
    known = ("loss", "tokens", "real", "positions", "stop", "grad_norm", "skipped")
    extras = {name: value for name, value in result.items() if name not in known}
    return {
        "step": progress.step,
        "epoch": (progress.step - 1) / plan.steps_per_epoch,
        "loss": result["loss"] / max(result["tokens"], 1),
        **averages(extras, result["tokens"]),
        "lr": lr,
        f"{stage.unit}s": progress.tokens,
        "tokens_per_second": result["real"] / max(clock.step_seconds, 1e-9),
        "real_token_share": result["real"] / max(result["positions"], 1),
        "grad_norm": result["grad_norm"],
        **plan.facts(progress.step),
        "seconds": progress.seconds,
        "seconds_left": clock.seconds_left(total - progress.step),
        "peak_memory_mb": peak_memory_mb(device_type),
    }


def entry(args: argparse.Namespace, stage: Stage, progress: Progress, objection: str = "") -> dict[str, Any]:
    """This stage's line in the lineage of its checkpoint."""
    units = f"{stage.unit}s"
    return {
        "stage": stage.name,
        "data": str(args.data_path),
        **stage.mix,
        **({"data_history": known} if (known := history_in_words(history_of_data(args.data_path))) else {}),
        "steps": progress.step,
        units: progress.tokens,
        "seconds": progress.seconds,
        "loss": progress.loss,
        "validation": {name: value for name, value in progress.validation.items() if name not in ("step", units)},
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        **({"stopped": objection} if objection else {}),
    }
