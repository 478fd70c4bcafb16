"""Measure the seconds of a training step: real steps of the run's engine and optimizer, on random token ids.

Read next: dial.py (the caller), engine.py, loop.py (train_step).
"""

import time

import numpy as np
import torch

from model.config import ModelConfig
from trainer.config import TrainConfig
from trainer.datasets import Batch, make_batch
from trainer.distributed import DistContext
from trainer.engine import Engine
from trainer.loop import train_step
from trainer.stage import Stage
from trainer.startup import make_engine
from trainer.train_state import micro_batch_size

MAX_TIMED_STEPS = 8  # timed steps of a size


def random_batch(rows: int, model_config: ModelConfig) -> Batch:
    """Return a batch of (rows, max_seq_len) random ids."""
    shape = (rows, model_config.max_seq_len + 1)
    ids = np.random.default_rng(0).integers(model_config.vocab_size, size=shape)
    mask = np.ones((rows, model_config.max_seq_len), bool)
    return make_batch(ids[:, :-1], np.ascontiguousarray(ids[:, 1:]), mask, np.arange(rows))


def from_rank0(dist: DistContext, *values: float) -> list[float]:
    """Return rank 0's values on every rank."""
    return dist.all_reduce_sum([*values] if dist.is_rank0 else [0.0] * len(values))


def measure_step(config: TrainConfig, stage: Stage, dist: DistContext, rows_per_step: int, seconds: float) -> float:
    """Return the seconds of a step of `rows_per_step` rows: the mean of the steps that fit into `seconds`.

    The first step, which allocates memory and compiles, counts only if it alone takes longer. All ranks get rank 0's
    time, and the same random numbers afterwards as without the measurement. The weights of stage.model change.
    """
    stage.model.activation_checkpointing = config.checkpoint_activations
    rows = micro_batch_size(config, rows_per_step, dist.world_size)
    batches = [random_batch(rows, stage.model.config)] * (rows_per_step // dist.world_size // rows)
    with make_engine(config, stage, dist) as engine:
        first = mean = timed_steps(engine, batches, 1, dist)
        if first < seconds:
            mean = timed_steps(engine, batches, 1, dist)
            if (count := min(MAX_TIMED_STEPS, int((seconds - first) / mean) - 1)) > 0:
                mean = timed_steps(engine, batches, count, dist)
    torch.manual_seed(config.seed)
    return mean


def timed_steps(engine: Engine, batches: list[Batch], count: int, dist: DistContext) -> float:
    """Return rank 0's mean seconds of `count` training steps."""
    start = time.monotonic()
    for _ in range(count):
        train_step(engine, batches)
    if dist.device.type != "cpu":
        getattr(torch, dist.device.type).synchronize()
    return from_rank0(dist, (time.monotonic() - start) / count)[0]
