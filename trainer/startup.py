"""What is said before the first step: sizes, steps, memory, and whether the first loss is that of an untrained model.

Read next: loop.py.
"""

import argparse
import math

from corpus.provenance import history_in_words, history_of_data
from model.rope import describe
from trainer.distributed import Run
from trainer.engine import Engine
from trainer.memory import training_memory
from trainer.sampler import StepPlan
from trainer.stage import Stage

FIRST_LOSS_BAND = 0.15  # nats around ln(vocab)


def announce(run: Run, args: argparse.Namespace, stage: Stage, plan: StepPlan, total_steps: int) -> None:
    """Print parameters, tokens per step, steps, memory."""
    if not run.is_main:
        return
    config = stage.model.config
    parameters, active = stage.model.count_parameters()
    shown = f"{parameters / 1e6:.1f} M parameters" + (f" ({active / 1e6:.1f} M active)" if active != parameters else "")
    how = f"{args.parallel}, " if run.world > 1 else ""
    run.say(
        f"{stage.name}: {shown}, vocabulary {config.vocab_size}, {run.world} process(es) on {run.device}, "
        f"{str(run.dtype).removeprefix('torch.')}, {how}{args.optimizer}, peak lr {args.learning_rate:g}"
    )
    if scaling := describe(config):
        run.say(f"RoPE scaling: {scaling}")
    if known := history_in_words(history_of_data(args.data_path)):
        run.say(f"data: {known}")
    lengths = stage.data.row_lengths()
    mean_length = config.max_seq_len if lengths is None else float(lengths.mean())
    rows = "rows" if stage.unit == "token" else f"{stage.unit}s"
    minutes = f", at most {args.max_minutes:g} minutes" if args.max_minutes else ""
    run.say(
        f"{len(stage.data):,} {rows}, {plan.global_batch} {rows} = {plan.global_batch * mean_length:,.0f} tokens "
        f"a step, {plan.steps_per_epoch:,} steps an epoch, {total_steps:,} steps in all{minutes}"
    )
    longest = config.max_seq_len if lengths is None else int(lengths.max())
    trained = sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
    estimate = training_memory(
        config, args.batch_size, longest, optimizer=args.optimizer, compute_bytes=run.dtype.itemsize,
        parallel=args.parallel, processes=run.world, recompute=args.checkpoint_activations, device=run.device.type,
        trained=trained,
    )  # fmt: skip
    run.say(f"estimated memory {estimate.total / 2**30:.1f} GiB per process")
    if plan.about():
        run.say(plan.about())


def check_first_loss(run: Run, args: argparse.Namespace, stage: Stage, plan: StepPlan, engine: Engine) -> None:
    """An untrained model knows nothing, so its loss is ln(vocabulary); anything else is a mistake in model or data."""
    batch = stage.data.batch(plan.rows(0)[: args.batch_size])
    with engine.evaluating():
        loss, count, _ = engine.evaluate({name: tensor.to(run.device) for name, tensor in batch.items()})
    first, expected = loss.item() / max(count, 1), math.log(stage.model.config.vocab_size)
    verdict = (
        "as it should be" if abs(first - expected) <= FIRST_LOSS_BAND else "SUSPICIOUS: look at the data and the model"
    )
    run.say(f"first loss {first:.3f}, ln(vocabulary) {expected:.3f} ± {FIRST_LOSS_BAND}: {verdict}")
