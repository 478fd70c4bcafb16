"""Exercise of chapter 3: one training step of a new model, and the loss along its gradient.

    python -m docs.course.training_step

Prints the shapes of a step, compares one entry of the gradient with a difference quotient, and draws the loss after a
step of plain gradient descent by the size of the step.
Read next: ../../trainer/loop.py (train_step), ../../1-pretrain.py (compute_loss).
"""

import math

import numpy as np
import torch
from matplotlib.figure import Figure

from common.cli import parse
from common.errors import fail_in_one_line
from docs.course.exercise import ExerciseConfig, save_picture
from model.config import PRESETS, ModelConfig
from model.tokenizer import load_tokenizer
from model.transformer import Transformer
from trainer.datasets import Batch, PackedDataset
from trainer.loss import cross_entropy_sum

ROWS, SEQ_LEN = 8, 128
STEP_SIZES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 4.0)


def mean_loss(model: Transformer, batch: Batch) -> torch.Tensor:
    hidden, _ = model(batch["input_ids"])
    return cross_entropy_sum(hidden, model.lm_head.weight, batch["labels"]) / batch["num_targets"]


@torch.no_grad()
def loss_after(model: Transformer, batch: Batch, size: float) -> float:
    """Return the loss after W = W - size * gradient; the weights are restored."""
    before = [weight.clone() for weight in model.parameters()]
    for weight in model.parameters():
        weight -= size * weight.grad
    loss = float(mean_loss(model, batch))
    for weight, old in zip(model.parameters(), before, strict=True):
        weight.copy_(old)
    return loss


def main() -> None:
    config = parse(ExerciseConfig, __doc__)
    tokenizer = load_tokenizer(config.file("tokenizer"))
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **PRESETS["demo"]))
    data = PackedDataset(str(config.file("pretrain")), "train", SEQ_LEN)
    batch = data.batch(np.arange(ROWS))
    for name in ("input_ids", "labels"):
        beginning = tokenizer.decode(batch[name][0, :8].tolist())
        print(f"{name} {tuple(batch[name].shape)}, starting with {beginning!r}")
    print(f"hidden {tuple(model(batch['input_ids'])[0].shape)}")
    loss = mean_loss(model, batch)
    loss.backward()
    start = float(loss.detach())
    print(f"loss {start:.3f}; ln {tokenizer.vocab_size} = {math.log(tokenizer.vocab_size):.3f}")
    norm = math.sqrt(sum(float(weight.grad.square().sum()) for weight in model.parameters()))
    print(f"{model.count_parameters()[0]:,} weights, gradient norm {norm:.2f}")
    compare_gradient(model, batch)
    losses = [loss_after(model, batch, size) for size in STEP_SIZES]
    for size, after in zip(STEP_SIZES, losses, strict=True):
        print(f"step size {size:5}: loss {after:.3f}, promised {start - size * norm**2:.3f}")
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.semilogx(STEP_SIZES, losses, marker=".", label="loss after the step")
    slope = [start - size * norm**2 for size in STEP_SIZES]
    axes.plot(STEP_SIZES, slope, linestyle="--", label="what the gradient promises")
    axes.axhline(start, color="C7", linewidth=0.8, label="loss before")
    axes.set_ylim(min(losses) - 1, max(*losses, start) + 0.5)
    axes.set_xlabel("size of the step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    save_picture(config, figure, "03-training-step")


@torch.no_grad()
def compare_gradient(model: Transformer, batch: Batch) -> None:
    """Print the largest entry of one gradient beside (loss(w + h) - loss(w - h)) / 2 h."""
    weight, h = model.model.layers[0].self_attn.v_proj.weight, 0.01
    index = np.unravel_index(int(weight.grad.abs().argmax()), weight.shape)
    losses = []
    for change in (h, -2 * h, h):
        weight[index] += change
        losses.append(float(mean_loss(model, batch)))
    print(
        f"gradient of one weight {weight.grad[index]:.5f}, difference quotient {(losses[0] - losses[1]) / (2 * h):.5f}"
    )


if __name__ == "__main__":
    with fail_in_one_line():
        main()
