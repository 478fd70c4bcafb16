"""Time our own training steps: python -m benchmarks.train_case SPEC, or under torchrun for several processes.

The steps are those of 1-pretrain.py with its default flags and those of the spec: its loss, TrainingSteps, the engine
of --parallel, batches of a PackedDataset. Left out are the log, the checks and the saves around them.
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
from trainer.compilation import decide_compile
from trainer.datasets import MicroBatches, PackedDataset
from trainer.distributed import DistContext, init_distributed
from trainer.loop import TrainingSteps
from trainer.stage import Stage
from trainer.startup import make_engine
from trainer.timer import TrainingTimer

LONG_RUN = 100_000  # --max_steps: the flags that depend on the length of a run are those of a long one


def time_steps(spec: TrainSpec, config, compute_loss, dist: DistContext) -> None:
    """Train for the steps of the spec; rank 0 prints the result. `config`: a PretrainConfig."""
    model = Transformer(ModelConfig(**spec.model))
    model.activation_checkpointing = config.checkpoint_activations
    parameters, _ = model.count_parameters()
    data = PackedDataset(config.data_path, "train", spec.seq_len)
    tokenizer = cast("ChatTokenizer", None)  # only validation and the count of bytes read it
    stage = Stage("pretrain", model, tokenizer, compute_loss, data)
    stage.byte_lengths = torch.ones(model.config.vocab_size, dtype=torch.long)
    batches = MicroBatches(
        data, data.batch_sampler(spec.batch_size, config.seed), config.batch_size, dist.rank, dist.world_size
    )
    times, losses = StepTimes(), list[float]()  # reading the sums of a step waits for the device
    config = decide_compile(config, stage, dist, spec.batch_size, LONG_RUN)
    numbers, timer = range(spec.all_steps), TrainingTimer(0, 0.0, 0.0, dist)
    with make_engine(config, stage, dist) as engine:
        for step in TrainingSteps(engine, timer, batches, numbers, config.max_steps, lambda number: False):
            sums = step.read()
            timer.finish_step()
            losses.append(sums["loss"] / sums["num_targets"])
            times.end_step()
    if dist.is_rank0:
        memory = torch.cuda.max_memory_allocated() if dist.device.type == "cuda" else 0
        print_result(spec, times, losses[0], parameters, memory)


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
