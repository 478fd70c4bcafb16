"""Measure the speed of this machine for the demo.

    python -m demo_world.speed      prints the slowdown, for example 1.7: a training step takes 1.7 times as long as on
                                    two quiet cores with AVX-512 in fp32

Read next: timing.py (the estimate of the demo's time).
"""

import statistics
import time

import torch

from common.device import autocast, keep_freed_memory, pick_device, pick_dtype
from model.config import PRESETS, ModelConfig
from model.transformer import Transformer
from trainer.loss import cross_entropy_sum
from trainer.optim import make_optimizers

REFERENCE_STEP = 0.277  # seconds of a step on the reference machine
MEASURED_STEPS = 5
MODEL = ModelConfig(
    vocab_size=5120, hidden_dim=384, qk_norm=True, tie_embeddings=False, **PRESETS["demo"]
)  # as the recipe
ROWS = 16


def measure_demo_step() -> float:
    """Return the seconds of a training step of the demo's model, the median of several."""
    keep_freed_memory()
    device = pick_device()
    model = Transformer(MODEL).to(device)
    optimizers = make_optimizers(model, "muon", learning_rate=1e-3, weight_decay=0.1)
    ids = torch.randint(MODEL.vocab_size, (ROWS, MODEL.max_seq_len + 1), device=device)
    seconds = []
    for _ in range(1 + MEASURED_STEPS):  # the first allocates memory
        started = time.perf_counter()
        with autocast(device, pick_dtype("auto", device)):
            hidden, _ = model(ids[:, :-1])
            loss = cross_entropy_sum(hidden, model.lm_head.weight, ids[:, 1:])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    print(round(measure_demo_step() / REFERENCE_STEP, 2))
