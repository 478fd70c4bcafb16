"""Before the first step: the engine of --parallel, the log, the printed size of the run, a check of the first loss.

Read next: loop.py.
"""

import math

from corpus.provenance import data_provenance, format_provenance
from model.rope import rope_summary
from trainer.config import TrainConfig
from trainer.datasets import to_device
from trainer.distributed import DistContext
from trainer.engine import DDPEngine, Engine, FSDPEngine
from trainer.memory import training_memory
from trainer.metrics import MetricLogger
from trainer.reference import reference_for
from trainer.sampler import BatchSampler
from trainer.stage import Stage
from trainer.trackers import open_tracker
from trainer.train_state import TrainState

NEEDS_CHAT_MODEL = ("lora_sft", "dpo", "grpo")
FIRST_LOSS_TOLERANCE = 0.15  # nats; an untrained model's loss is ln(vocabulary) ± this


def make_engine(config: TrainConfig, stage: Stage, dist: DistContext) -> Engine:
    """Return the engine of --parallel. One process always gets DDPEngine."""
    if dist.world_size == 1 or config.parallel == "ddp":
        return DDPEngine(config, stage, dist)
    if config.parallel == "fsdp":
        return FSDPEngine(config, stage, dist)
    from trainer.zero import ZeroEngine  # needs DeepSpeed

    return ZeroEngine(config, stage, dist)


def log_startup(config: TrainConfig, stage: Stage, sampler: BatchSampler, total_steps: int, dist: DistContext) -> None:
    """Print parameters, tokens per step, steps and the memory estimate."""
    if not dist.is_rank0:
        return
    model_config = stage.model.config
    parameters, active = stage.model.count_parameters()
    size_text = f"{parameters / 1e6:.1f} M parameters" + (
        f" ({active / 1e6:.1f} M active)" if active != parameters else ""
    )
    how = f"{config.parallel}, " if dist.world_size > 1 else ""
    dist.print0(
        f"{stage.name}: {size_text}, vocabulary {model_config.vocab_size}, {dist.world_size} process(es) on "
        f"{dist.device}, {str(dist.dtype).removeprefix('torch.')}, {how}{config.optimizer}, "
        f"peak lr {config.learning_rate:g}"
    )
    if stage.source:
        dist.print0(f"starts from {stage.source}")
    if stage.name in NEEDS_CHAT_MODEL and stage.lineage and stage.lineage[-1].get("stage") == "pretrain":
        dist.print0("WARNING: that is a pretrained model, which has not learned to answer: run 3-full_sft.py first")
    if scaling := rope_summary(model_config):
        dist.print0(f"RoPE scaling: {scaling}")
    if provenance := format_provenance(data_provenance(config.data_path)):
        dist.print0(f"data: {provenance}")
    lengths = stage.data.lengths()
    mean_length = model_config.max_seq_len if lengths is None else float(lengths.mean())
    rows = {"pair": "pairs", "answer": "prompts"}.get(stage.loss_unit, "rows")
    sequences = sampler.global_batch_size * stage.data.group_size
    minutes = f", at most {config.max_minutes:g} minutes" if config.max_minutes else ""
    dist.print0(
        f"{len(stage.data):,} {rows}, {sampler.global_batch_size} {rows} = "
        f"{sequences * mean_length:,.0f} tokens per step, "
        f"{sampler.steps_per_epoch:,} steps per epoch, {total_steps:,} steps in all{minutes}"
    )
    longest = model_config.max_seq_len if lengths is None else int(lengths.max())
    num_trainable = sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
    estimate = training_memory(
        model_config, config.batch_size, longest, optimizer=config.optimizer, compute_bytes=dist.dtype.itemsize,
        parallel=config.parallel, processes=dist.world_size, recompute=config.checkpoint_activations,
        device=dist.device.type, num_trainable=num_trainable,
    )  # fmt: skip
    dist.print0(f"estimated memory {estimate.total / 2**30:.1f} GiB per process")
    if sampler.summary():
        dist.print0(sampler.summary())


def open_logger(
    config: TrainConfig, stage: Stage, total_steps: int, state: TrainState, dist: DistContext
) -> MetricLogger:
    """Open the log. A run from scratch on text is compared with reference runs."""
    path = stage.checkpoint_path(config.out_dir).with_suffix(".jsonl")
    reference, model_config = None, stage.model.config
    if stage.name == "pretrain" and not stage.lineage:
        steps, ratio = config.warmup
        warmup, step_tokens = max(steps, ratio * total_steps), state.rows_per_step * model_config.max_seq_len
        reference = reference_for(model_config, step_tokens, warmup, config.optimizer)
    logger = MetricLogger(path, stage.name, total_steps, state.step, dist.is_rank0, reference)
    if dist.is_rank0:
        logger.tracker = open_tracker(config, path, state.step)
    return logger


def check_first_loss(config: TrainConfig, stage: Stage, sampler: BatchSampler, engine: Engine) -> None:
    """Compare the first loss with ln(vocabulary), the loss of uniform predictions, and print the result.

    The loss of an untrained model is near it. Another value indicates an error in the data or the initialisation.
    """
    batch = stage.data.batch(sampler.row_ids(0)[: config.batch_size])
    with engine.eval_mode():
        loss, _ = engine.evaluate(to_device(batch, engine.dist.device))
    first, expected = loss.item() / max(batch["num_targets"], 1), math.log(stage.model.config.vocab_size)
    assessment = (
        "ok"
        if abs(first - expected) <= FIRST_LOSS_TOLERANCE
        else "unexpected: check the data and the model initialisation"
    )
    engine.dist.print0(f"first loss {first:.3f}, ln(vocabulary) {expected:.3f} ± {FIRST_LOSS_TOLERANCE}: {assessment}")
