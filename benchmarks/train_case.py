"""Time our own training steps: python -m benchmarks.train_case SPEC, or under torchrun for several processes.

The steps are those of 1-pretrain.py with its default flags and those of the spec: its loss, train_step, the engine of
--parallel, MicroBatches of a PackedDataset. Left out are the log, the checks and the saves around them.
Read next: train_spec.py, ../trainer/loop.py.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import cast

import torch

from benchmarks.train_spec import StepTimes, TrainSpec, print_result
from common.cli import parse
from common.errors import fail_in_one_line
from model.config import ModelConfig
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer
from trainer.datasets import MicroBatches, PackedDataset, prefetch_batches
from trainer.distributed import DistContext, init_distributed
from trainer.loop import train_step
from trainer.optim import set_learning_rate
from trainer.stage import Stage
from trainer.startup import make_engine

LONG_RUN = 100_000  # --max_steps: the flags that depend on the length of a run are those of a long one


def time_steps(spec: TrainSpec, config, compute_loss, dist: DistContext) -> None:
    """Train for the steps of the spec; rank 0 prints the result. `config`: a PretrainConfig."""
    model = Transformer(ModelConfig(**spec.model))
    model.activation_checkpointing = config.checkpoint_activations
    parameters, _ = model.count_parameters()
    data = PackedDataset(config.data_path, "train", spec.seq_len)
    tokenizer = cast("ChatTokenizer", None)  # only validation reads it
    stage = Stage("pretrain", model, tokenizer, compute_loss, data)
    batches = MicroBatches(
        data, data.batch_sampler(spec.batch_size, config.seed), config.batch_size, dist.rank, dist.world_size
    )
    is_cuda, first_loss = dist.device.type == "cuda", 0.0
    with make_engine(config, stage, dist) as engine:
        times = StepTimes(torch.cuda.synchronize if is_cuda else lambda: None)
        for step, micro_batches in enumerate(prefetch_batches(batches, range(spec.all_steps), config.num_workers)):
            set_learning_rate(config, engine.optimizers, step, 0.0)
            sums = train_step(engine, micro_batches)
            first_loss = first_loss or sums["loss"] / sums["num_targets"]
            times.end_step()
    if dist.is_rank0:
        memory = torch.cuda.max_memory_allocated() if is_cuda else 0
        print_result(spec, times, first_loss, parameters, memory)


def main() -> None:
    spec = TrainSpec.from_json(sys.argv[1])
    pretrain = importlib.import_module("1-pretrain")
    rows = max(1, spec.batch_size // int(os.environ.get("WORLD_SIZE", 1)))
    flags = {"data_path": Path(spec.tokens).parent, "dtype": spec.dtype, "device": spec.device, "batch_size": rows,
             "max_steps": LONG_RUN}  # fmt: skip
    given = [f"--{name}={value}" for name, value in flags.items()]
    config = parse(pretrain.PretrainConfig, None, [*given, *spec.flags])
    with init_distributed(config.device, config.dtype, config.seed) as dist:
        time_steps(spec, config, pretrain.compute_loss, dist)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
