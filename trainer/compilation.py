"""--compile auto, on or off: whether torch.compile compiles the loss of a stage, which contains the model.

    auto    CUDA     yes, if Triton is installed
            CPU      yes, with a C++ compiler, fast bf16 matrix products and a run of at least MIN_CPU_FLOPS
            else     no; nor with ZeRO, whose hooks torch.compile does not support

The answer depends on the configuration, the number of steps and the machine only: a resumed run gets the same one.
Compiled kernels are kept in $TORCHINDUCTOR_CACHE_DIR, if unset in ~/.cache/mengya/torchinductor: a second run compiles
in seconds. The optimizers and evaluation are not compiled. CUDA graphs (mode="reduce-overhead") are not used: a replay
overwrites the losses and gradients of the micro-batch before.
Read next: engine.py (the caller), https://pytorch.org/docs/stable/torch.compiler.html.
"""

import contextlib
import dataclasses
import importlib.util
import os
import shutil
from pathlib import Path

import torch

from common.device import has_fast_bf16
from common.errors import UserError
from trainer.config import TrainConfig
from trainer.distributed import DistContext
from trainer.stage import Stage
from trainer.throughput import stage_flops_per_token

CPU_FLOPS = 4e11  # FLOP/s of training on two cores with AMX
# Compiling takes about 3 minutes on two cores and saves a quarter of a step: it pays for itself after 12 minutes. The
# limit is 20 minutes, because a short run is more often interrupted, repeated with other flags, or a test.
MIN_CPU_FLOPS = 20 * 60 * CPU_FLOPS


def decide_compile(
    config: TrainConfig, stage: Stage, dist: DistContext, rows_per_step: int, total_steps: int
) -> TrainConfig:
    """Return the configuration with --compile on or off. Raises UserError for "on" without a compiler."""
    choice = config.compile
    if choice == "auto":
        choice = "on" if pays_off(config, stage, dist, rows_per_step, total_steps) else "off"
        if choice == "on" and (missing := missing_compiler(dist.device)):
            dist.print0(f"not compiled: {missing} is missing")
            choice = "off"
        if choice == "on":
            torch._dynamo.config.suppress_errors = True  # where compiling fails, that part runs uncompiled
    elif choice == "on" and (missing := missing_compiler(dist.device)):
        raise UserError(f"--compile on needs {missing}: install it, or use --compile off")
    if choice == "on":
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mengya" / "torchinductor"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
        dist.print0(f"the loss is compiled in the first steps; kernels in {os.environ.get('TORCHINDUCTOR_CACHE_DIR')}")
    return dataclasses.replace(config, compile=choice)


def pays_off(config: TrainConfig, stage: Stage, dist: DistContext, rows_per_step: int, total_steps: int) -> bool:
    """Whether --compile auto compiles, if there is a compiler."""
    if config.parallel.startswith("zero") and dist.world_size > 1:
        return False
    if dist.device.type != "cpu":
        return dist.device.type == "cuda"
    if dist.dtype != torch.bfloat16 or not has_fast_bf16(dist.device):
        return False
    flops_per_token, seq = stage_flops_per_token(stage)
    flops = flops_per_token * seq * rows_per_step / dist.world_size * total_steps
    seconds = 60 * config.max_minutes
    return min(flops, seconds * CPU_FLOPS or flops) >= MIN_CPU_FLOPS


def missing_compiler(device: torch.device) -> str:
    """Return the name of the compiler that torch.compile needs for this device and does not find, or ""."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "Triton (pip install triton)"
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl")):
        return "a C++ compiler (g++, clang++ or cl)"
    return ""
