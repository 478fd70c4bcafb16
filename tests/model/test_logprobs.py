"""sum_log_probs: a padded batch gives the values of each row alone, bitwise those of trainer/loss.py.

Promises: the mask selects the tokens; a row without scored tokens gives 0; autocast sets the dtype.
"""

import pytest
import torch

from model.config import ModelConfig
from model.logprobs import sum_log_probs
from model.transformer import Transformer
from trainer.loss import IGNORE_INDEX, token_log_probs

ROWS = [([5, 6, 7, 8, 9], [1, 0, 1, 1, 0]), ([10, 11], [0, 1]), ([12], [1]), ([5, 6, 7], [0, 0, 0])]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_sums_equal_the_training_loss_and_each_row_alone(dtype):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(64, 32, 2, 4, 2, max_seq_len=16)).eval()
    ids = torch.tensor([row + [0] * (5 - len(row)) for row, _ in ROWS])
    mask = torch.tensor([mask + [0] * (5 - len(mask)) for _, mask in ROWS]) > 0
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        sums = sum_log_probs(model, ROWS, pad_id=0)
        labels = torch.where(mask, ids, IGNORE_INDEX)[:, 1:]
        expected = token_log_probs(model(ids[:, :-1])[0], model.lm_head.weight, labels)
        alone = [sum_log_probs(model, [row], 0)[0] for row in ROWS if len(row[0]) > 1]
    assert sums == expected.double().sum(1).tolist() and sums[2:] == [0.0, 0.0]
    assert [sums[i] for i in (0, 1, 3)] == pytest.approx(alone, rel=1e-5 if dtype is None else 1e-2)
