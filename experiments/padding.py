"""What if every document had a row of its own? Documents padded to the full length against packed rows.

    packed     the documents form one stream of tokens, which is cut into rows; no padding
    padded     one document per row, padded to max_seq_len
    sorted     one document per row; rows of similar length form a batch, which is padded to its longest row

A step of every arm has about the same number of tokens that are not padding.
Read next: ../trainer/datasets.py (PackedDataset), ../trainer/sampler.py (batches of similar length, used for chats).
"""

import numpy as np

from experiments.pictures import compared, draw_arm_losses, draw_points, new_picture, span
from experiments.training import SMALL_MODEL, Workspace
from trainer.curves import save_figure
from trainer.datasets import Batch, PackedDataset, TokenDataset
from trainer.sampler import BatchSampler
from trainer.stage import Stage


class PaddedDocuments(TokenDataset):
    """One document per row, cut to seq_len; a batch is as wide as seq_len or, `sorted_by_length`, its longest row."""

    def __init__(self, packed: PackedDataset, sorted_by_length: bool) -> None:
        self.tokens, self.seq_len, self.folder = packed.tokens, packed.seq_len, packed.folder
        self.sorted_by_length = sorted_by_length

    def __len__(self) -> int:
        return self.tokens.documents

    def row_lengths(self) -> np.ndarray:
        """Return the trained tokens of every row, (len,)."""
        return np.minimum(self.tokens.lengths() - 1, self.seq_len)

    def batch_sampler(self, global_batch_size: int, seed: int) -> BatchSampler:
        """Take as many rows per step as fill `global_batch_size` packed rows."""
        rows = max(1, round(global_batch_size * self.seq_len / float(self.row_lengths().mean())))
        return BatchSampler(len(self), self.row_lengths() if self.sorted_by_length else None, rows, seed)

    def batch(self, row_ids: np.ndarray) -> Batch:
        windows = [self.tokens.read_document(int(row))[0][: self.seq_len + 1] for row in row_ids]
        width = max(len(window) for window in windows) - 1 if self.sorted_by_length else self.seq_len
        return PackedDataset.collate(windows, width, row_ids)


def pad_documents(stage: Stage) -> None:
    assert isinstance(stage.data, PackedDataset)
    stage.data = PaddedDocuments(stage.data, sorted_by_length=False)


def sort_documents(stage: Stage) -> None:
    assert isinstance(stage.data, PackedDataset)
    stage.data = PaddedDocuments(stage.data, sorted_by_length=True)


def padding(space: Workspace) -> str:
    flags = f"{SMALL_MODEL} --max_steps 150"
    changes = {"packed": None, "padded": pad_documents, "sorted, padded": sort_documents}
    # --batch_size is rows per forward pass, at most: padded rows are more, and still one forward pass.
    arms = space.train_all("1-pretrain.py", {
        name: (flags if change is None else f"{flags} --global_batch_size 8 --batch_size 64", change)
        for name, change in changes.items()
    })  # fmt: skip
    losses = {name: [arm.validated() for arm in group] for name, group in arms.items()}
    used = {name: [float(np.mean([row["token_fraction"] for row in arm.steps])) for arm in group]
            for name, group in arms.items()}  # fmt: skip
    cost = {name: [arm.cpu_seconds / arm.steps[-1]["tokens"] * 1e5 for arm in group] for name, group in arms.items()}
    packed, padded, in_order = (sum(values) / len(values) for values in cost.values())
    sentence = (
        f"{100 - 100 * used['padded'][0]:.0f} % of the padded positions hold no token: training on the same number of "
        f"tokens takes {padded / packed:.1f} times the CPU time of packed rows ({in_order / packed:.1f} times where "
        f"rows of similar length form a batch), and the validation loss is "
        f"{compared(losses['padded'], losses['packed'])} ({span(losses['padded'])} against {span(losses['packed'])})."
    )
    figure, (left, middle, right) = new_picture(3)
    draw_arm_losses(left, arms)
    draw_points(middle, used, "fraction of positions with a token")
    draw_points(right, cost, "CPU seconds per 100,000 tokens", "{:.1f}")
    save_figure(figure, space.out / "padding.png", "Packed rows and padded documents")
    return sentence
