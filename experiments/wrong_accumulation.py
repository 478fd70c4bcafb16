"""What if gradient accumulation took the mean of the means of the micro-batches?

    right    sum over micro-batches of (sum of losses), divided once by the N trained tokens of the step
    wrong    mean over micro-batches of (sum of losses / their own number of trained tokens)

In the wrong mean a token of a micro-batch with n_i of the N trained tokens counts N / (M n_i) times, M micro-batches.
Read next: ../trainer/loop.py (train_step).
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from experiments.pictures import label_axes, new_picture, span
from experiments.training import Arm, Workspace
from trainer.curves import save_figure
from trainer.datasets import Batch, ChatDataset
from trainer.sampler import BatchSampler
from trainer.stage import ComputeLoss, LossAndMetrics, Stage

_ROWS, _MICRO_ROWS = 32, 2
Weights = dict[str, Tensor]


class UnsortedChats(ChatDataset):
    """The rows of a ChatDataset in random order: sorted batches have micro-batches of about equal numbers of tokens.

    counts_batches: a batch has the number of targets 1, and its true number as "own_targets", so that the training loop
    divides by the number of micro-batches.
    """

    def __init__(self, chats: ChatDataset, counts_batches: bool) -> None:
        self.tokens, self.pad_id, self.folder, self.max_width = (
            chats.tokens,
            chats.pad_id,
            chats.folder,
            chats.max_width,
        )
        self.counts_batches = counts_batches

    def batch_sampler(self, global_batch_size: int, seed: int) -> BatchSampler:
        return BatchSampler(len(self), None, global_batch_size, seed)

    def batch(self, row_ids: np.ndarray) -> Batch:
        batch = super().batch(row_ids)
        return batch | {"own_targets": batch["num_targets"], "num_targets": 1} if self.counts_batches else batch


def mean_loss(model: nn.Module, batch: Batch, compute_loss: ComputeLoss) -> LossAndMetrics:
    """Return the mean loss of a micro-batch; of a validation batch, which has no "own_targets", the sum."""
    loss, metrics = compute_loss(model, batch)
    return loss / max(batch.get("own_targets", 1), 1), metrics


def unsort(stage: Stage) -> None:
    assert isinstance(stage.data, ChatDataset)
    stage.data = UnsortedChats(stage.data, counts_batches=False)


def accumulate_means(stage: Stage) -> None:
    assert isinstance(stage.data, ChatDataset)
    stage.data = UnsortedChats(stage.data, counts_batches=True)
    stage.compute_loss = partial(mean_loss, compute_loss=stage.compute_loss)


def distance(arm: Arm, other: Arm, parent: Weights) -> float:
    """Return |weights - weights of the other| / |weights of the other - parent|."""
    mine, theirs = arm.model.state_dict(), other.model.state_dict()  # with the output layer, which may be tied
    apart = sum(float((mine[name] - theirs[name]).square().sum()) for name in parent) ** 0.5
    way = sum(float((theirs[name] - parent[name]).square().sum()) for name in parent) ** 0.5
    return apart / max(way, 1e-12)


def weights_of_tokens(space: Workspace, steps: int) -> np.ndarray:
    """Return N / (M n_i) of the micro-batches of the first steps, (micro-batches,): the weight of their tokens."""
    found: list[float] = []

    def measure(stage: Stage) -> None:
        unsort(stage)
        sampler = stage.data.batch_sampler(_ROWS, 0)
        for step in range(steps):
            rows = sampler.row_ids(step).reshape(-1, _MICRO_ROWS)
            counts = np.array([stage.data.batch(part)["num_targets"] for part in rows])
            found.extend(counts.sum() / (len(counts) * np.maximum(counts, 1)))

    space.train("3-full_sft.py", f"--batch_size {_ROWS} --max_steps 1", 0, measure)
    return np.array(found)


def wrong_accumulation(space: Workspace) -> str:
    flags = f"--learning_rate 4e-3 --max_steps 60 --global_batch_size {_ROWS} --batch_size"
    arms = space.train_all("3-full_sft.py", {
        f"one batch of {_ROWS}": (f"{flags} {_ROWS}", unsort),
        "one division": (f"{flags} {_MICRO_ROWS}", unsort),
        "mean of means": (f"{flags} {_MICRO_ROWS}", accumulate_means),
    })  # fmt: skip
    whole, divided, means = arms.values()
    parent = torch.load(space.parent("pretrain"), weights_only=True)["model"]
    apart = {
        name: [distance(arm, other, parent) for arm, other in zip(group, whole, strict=True)]
        for name, group in (("one division", divided), ("mean of means", means))
    }
    losses = {name: [arm.validated() for arm in group] for name, group in arms.items()}
    weights = weights_of_tokens(space, steps=20)
    form = "{:.1e}"
    sentence = (
        f"Accumulated with one division, the weights after {len(whole[0].steps)} steps differ from those of "
        f"whole batches by {span(apart['one division'], form)} of the way they went, by the mean of means by "
        f"{span(apart['mean of means'], form)}: tokens count {weights.min():.1f} to "
        f"{weights.max():.1f} times instead of once. Validation loss {span(losses['one division'], '{:.3f}')} against "
        f"{span(losses['mean of means'], '{:.3f}')} nats per token."
    )
    figure, (left, right) = new_picture()
    left.hist(weights, bins=30, color="C1", alpha=0.6, label="mean of means")
    left.axvline(1, color="C0", label="one division")
    label_axes(left, "weight of a token", "micro-batches")
    left.legend()
    for color, (name, values) in enumerate(apart.items()):
        right.bar([name], [sum(values) / len(values)], color=f"C{color}", alpha=0.5, width=0.6)
        right.plot([color] * len(values), values, "o", color=f"C{color}", markersize=4)
    right.set_yscale("log")
    label_axes(right, "", "distance to whole batches / way from the parent")
    save_figure(figure, space.out / "wrong_accumulation.png", f"{_ROWS} chats per step as {_ROWS // _MICRO_ROWS} "
                f"micro-batches of {_MICRO_ROWS}")  # fmt: skip
    return sentence
