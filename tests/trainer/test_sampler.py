"""Batch sampler: every row once per epoch, reshuffled in every epoch, split between processes without overlap."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.datasets import WIDTH_MULTIPLE, MicroBatches, TokenDataset, validation_batches
from trainer.loss import IGNORE_INDEX
from trainer.sampler import BatchSampler


class RowIdDataset(TokenDataset):
    """Dataset whose rows are their row ids."""

    def __init__(self, n, lengths=None):
        self.n, self._lengths = n, lengths

    def __len__(self):
        return self.n

    def lengths(self):
        return self._lengths

    def batch(self, rows):
        ids = torch.tensor(rows)[:, None]
        return {
            "input_ids": ids,
            "labels": ids.clone(),
            "token_mask": torch.ones_like(ids, dtype=bool),
            "row_ids": ids[:, 0],
        }


def trained_rows(batches):
    return [row for batch in batches for row in batch["labels"][batch["labels"] != IGNORE_INDEX].tolist()]


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 90),
    batch=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    world=st.integers(1, 4),
    by_length=st.booleans(),
)
def test_every_epoch_holds_every_row_once(n, batch, accumulation, world, by_length):
    lengths = np.random.default_rng(n).integers(1, 99, n) if by_length else None
    data = RowIdDataset(n, lengths)
    sampler = BatchSampler(n, lengths, batch * accumulation * world, seed=1)
    alone = BatchSampler(n, lengths, batch * accumulation * world, seed=1)
    orders = []
    for epoch in range(2):
        seen = []
        for step in range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch):
            shares = [MicroBatches(data, sampler, batch, rank, world)[step] for rank in range(world)]
            assert len({len(share) for share in shares}) == 1, "all processes have equally many micro-batches"
            together = [row for share in shares for row in trained_rows(share)]
            # One process with the global batch has the same rows in this step.
            assert sorted(together) == sorted(trained_rows(MicroBatches(data, alone, batch * world, 0, 1)[step]))
            seen += together
        assert sorted(seen) == list(range(n))
        orders.append(seen)
    if n > 20 and sampler.steps_per_epoch > 5:
        assert orders[0] != orders[1], "reshuffled"


def test_sampler_has_random_access():
    late, early = BatchSampler(50, None, 4, seed=3), BatchSampler(50, None, 4, seed=3)
    for step in range(30):
        early.row_ids(step)
    assert late.row_ids(29).tolist() == early.row_ids(29).tolist()
    assert BatchSampler(50, None, 4, seed=4).row_ids(29).tolist() != late.row_ids(29).tolist()


def chat_lengths(count=3000):
    return np.clip(np.random.default_rng(0).lognormal(5, 0.8, count), 20, 512).astype(int)


def test_length_sorting_keeps_padding_below_10_percent():
    """With log-normal lengths as in real chats (median 150) at least 90 % of the positions are real tokens."""
    lengths = chat_lengths()
    sampler = BatchSampler(len(lengths), lengths, 16, seed=0)
    widths = [
        -(-lengths[sampler.row_ids(step)].max() // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        for step in range(sampler.steps_per_epoch)
    ]
    computed = sum(len(sampler.row_ids(step)) * width for step, width in enumerate(widths))
    assert lengths.sum() / computed >= 0.9


def test_validation_rows_are_split_between_processes():
    data = RowIdDataset(40)
    shares = [trained_rows(validation_batches(data, 4, rank, 3, max_tokens=30)) for rank in range(3)]
    together = sorted(row for share in shares for row in share)
    assert together == sorted(trained_rows(validation_batches(data, 4, 0, 1, max_tokens=30)))
    assert len(set(together)) == len(together)


def test_validation_rows_are_a_fixed_sample_of_the_whole_split():
    """The first rows of packed text may all belong to one document; few tokens sample the split as many do."""
    data = RowIdDataset(4000)
    few = trained_rows(validation_batches(data, 4, 0, 1, max_tokens=200))
    many = trained_rows(validation_batches(data, 4, 0, 1, max_tokens=1000))
    assert few == many[:200]
    assert max(np.diff(np.sort(few))) < 200, "no part of the split is left out"
    assert abs(np.mean(few) / 2000 - 1) < 0.1
