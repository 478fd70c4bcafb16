"""Chunked cross-entropy: loss and gradients equal torch's, and no tensor of (tokens, vocab) is allocated."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import loss as loss_module
from trainer.loss import IGNORE_INDEX, LOGITS_CHUNK, cross_entropy_sum, token_log_probs


def random_problem(tokens, dim=16, vocab=50, ignored=0.3, seed=0):
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, tokens // 2, dim, generator=random, requires_grad=True)
    weight = torch.randn(vocab, dim, generator=random, requires_grad=True)
    labels = torch.randint(0, vocab, (2, tokens // 2), generator=random)
    labels[torch.rand(labels.shape, generator=random) < ignored] = IGNORE_INDEX
    return hidden, weight, labels


@pytest.mark.parametrize("tokens", [2, 64, 2 * LOGITS_CHUNK + 6])
def test_cross_entropy_and_gradients_equal_torch(tokens):
    hidden, weight, labels = random_problem(tokens)
    ours = cross_entropy_sum(hidden, weight, labels)
    (ours * 0.5).backward()
    mine = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    theirs = F.cross_entropy(
        (hidden @ weight.T).flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    (theirs * 0.5).backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(mine[0], hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine[1], weight.grad, rtol=1e-4, atol=1e-4)


def test_cross_entropy_equals_hand_computed_value():
    """Two classes, logits (0, ln 3): p = (1/4, 3/4), so the loss of class 0 is ln 4 and of class 1 ln(4/3)."""
    hidden, weight = torch.tensor([[[1.0], [1.0]]]), torch.tensor([[0.0], [torch.log(torch.tensor(3.0))]])
    loss = cross_entropy_sum(hidden, weight, torch.tensor([[0, 1]]))
    assert loss.item() == pytest.approx(1.386294 + 0.287682, abs=1e-5)


def test_batch_without_targets_gives_zero_and_finite_gradients():
    hidden, weight, labels = random_problem(8, ignored=1.1)
    loss = cross_entropy_sum(hidden, weight, labels)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.abs().sum() == 0 and weight.grad.abs().sum() == 0


def test_ignored_positions_do_not_change_the_loss():
    hidden, weight, labels = random_problem(64)
    before = cross_entropy_sum(hidden, weight, labels)
    changed = hidden.detach().clone()
    changed[labels == IGNORE_INDEX] = 99.0
    after = cross_entropy_sum(changed, weight, labels)
    assert before.item() == after.item()


@pytest.mark.parametrize("full_logits", [10**9, 0], ids=["at once", "in chunks"])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.1])
def test_loss_of_a_device_equals_the_loss_of_a_cpu(monkeypatch, full_logits, ignored):
    """The plain operators of other devices: the same loss, log-probabilities and gradients."""
    monkeypatch.setattr(loss_module, "FULL_LOGITS", full_logits)
    monkeypatch.setattr(loss_module, "DEVICE_CHUNK", 16)
    results = []
    for is_chunked in (True, False):
        monkeypatch.setattr(loss_module, "_is_chunked", lambda _, chunked=is_chunked: chunked)
        hidden, weight, labels = random_problem(64, ignored=ignored)
        loss, log_probs = cross_entropy_sum(hidden, weight, labels), token_log_probs(hidden, weight, labels)
        (loss * 0.5 + (log_probs * torch.arange(32)).sum()).backward()
        results.append((loss.detach(), log_probs.detach(), hidden.grad, weight.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor created inside."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_logits_are_computed_in_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_CHUNK", 16)
    hidden, weight, labels = random_problem(256, dim=4, vocab=300, ignored=0.0)
    with LargestTensor() as watch:
        cross_entropy_sum(hidden, weight, labels).backward()
    assert watch.largest <= 16 * 300 < 256 * 300


class ProductShapes(TorchDispatchMode):
    """Records the shapes of all matrix products inside."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
            self.shapes.add(tuple(tuple(factor.shape) for factor in args[-2:]))
        return function(*args, **(kwargs or {}))


def test_matrix_products_have_few_shapes():
    """1 to 256 trained positions give matrix products with only two numbers of rows."""
    with ProductShapes() as watch:
        for trained in range(1, 257, 15):
            hidden, weight, labels = random_problem(512, ignored=0.0)
            labels.view(-1)[trained:] = IGNORE_INDEX
            cross_entropy_sum(hidden, weight, labels).backward()
    assert len(watch.shapes) == 2 * 3, watch.shapes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_follows_autocast_dtype(dtype):
    hidden, weight, labels = random_problem(64)
    exact = cross_entropy_sum(hidden, weight, labels)
    with torch.autocast("cpu", dtype):
        low = cross_entropy_sum(hidden, weight, labels)
    low.backward()
    assert low.dtype == torch.float32 and hidden.grad.dtype == torch.float32
    assert low.item() == pytest.approx(exact.item(), rel=2e-2)
