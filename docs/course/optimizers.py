"""Exercise of chapter 5: SGD, AdamW and Muon on the same small model and batches, and what Muon does to an update.

    python -m docs.course.optimizers
    python -m docs.course.optimizers --steps 120 --width 128

SGD is gradient descent with momentum. Each has the best of the learning rates that were tried: 0.03 to 1 (SGD),
0.003 to 0.03 (AdamW), 0.004 to 0.02 (Muon).
Read next: ../../trainer/optim.py.
"""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure

from common.cli import flag, parse
from common.errors import fail_in_one_line
from common.flag_types import positive_int
from docs.course.exercise import ExerciseConfig, save_picture
from docs.course.training_step import SEQ_LEN, mean_loss
from model.config import ModelConfig
from model.tokenizer import load_tokenizer
from model.transformer import Transformer
from trainer.config import TrainConfig
from trainer.datasets import PackedDataset
from trainer.optim import lr_multiplier, make_optimizers, muon_momentum, orthogonalize

ROWS = 8
RATES = {"sgd": 0.1, "adamw": 3e-3, "muon": 2e-2}  # the best of three or four each, for 100 steps of width 64


@dataclass(frozen=True)
class OptimizerConfig(ExerciseConfig):
    steps: int = flag(100, "training steps of each optimizer", type=positive_int)
    width: int = flag(64, "dim of the model, a multiple of 4", type=positive_int)


def train_briefly(config: OptimizerConfig, kind: str, data: PackedDataset, model: Transformer) -> list[float]:
    """Return the loss before every step. The rate warms up and decays as in 1-pretrain.py."""
    if kind == "sgd":
        optimizers = [torch.optim.SGD(model.parameters(), lr=RATES[kind], momentum=0.9)]
    else:
        optimizers = make_optimizers(model, kind, RATES[kind], weight_decay=0.1)
    schedule, losses = TrainConfig(warmup_iters=10), []
    peaks = [[group["lr"] * group.get("lr_multiplier", 1) for group in each.param_groups] for each in optimizers]
    for step in range(config.steps):
        multiplier = lr_multiplier(schedule, step, step / config.steps)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = peak * multiplier
                if "weight_decay" in group and kind == "muon" and "betas" not in group:
                    group["momentum"] = muon_momentum(step)
        loss = mean_loss(model, data.batch(np.arange(step * ROWS, (step + 1) * ROWS) % len(data)))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def gradient_of_a_new_model(model: Transformer, data: PackedDataset) -> torch.Tensor:
    mean_loss(model, data.batch(np.arange(ROWS))).backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    return gradient


def main() -> None:
    config = parse(OptimizerConfig, __doc__)
    tokenizer = load_tokenizer(config.file("tokenizer"))
    data = PackedDataset(str(config.file("pretrain")), "train", SEQ_LEN)
    size = ModelConfig(vocab_size=tokenizer.vocab_size, dim=config.width, n_layers=2, n_heads=2, n_kv_heads=2)
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    for kind in RATES:
        torch.manual_seed(0)
        losses = train_briefly(config, kind, data, Transformer(size))
        print(
            f"{kind:>5}: first loss {losses[0]:.2f}, mean of the last ten {sum(losses[-10:]) / len(losses[-10:]):.2f}"
        )
        left.plot(losses, label=kind)
    left.set_xlabel("step")
    left.set_ylabel("loss (nats per token)")
    torch.manual_seed(0)
    gradient = gradient_of_a_new_model(Transformer(size), data)
    for name, matrix in (("gradient", gradient), ("Muon's update", orthogonalize(gradient[None])[0])):
        values = torch.linalg.svdvals(matrix)
        print(f"{name}: singular values {values[0] / values[0]:.2f} to {values[-1] / values[0]:.4f} of the largest")
        right.semilogy((values / values[0]).numpy(), label=name)
    right.set_xlabel("number of the singular value")
    right.set_ylabel("fraction of the largest")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    save_picture(config, figure, "05-optimizer")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
