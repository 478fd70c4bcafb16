"""Muon against torch.optim.Muon, steps that are skipped on the device, and the number of launches of a step."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import PRESETS, ModelConfig
from model.transformer import Transformer
from trainer import optim
from trainer.engine import init_optimizer_state
from trainer.optim import NEWTON_SCHULZ, Muon, make_optimizers, orthogonalize, orthogonalize_shards, stack_elements

SHAPES = [(64, 64), (32, 64), (64, 32), (40, 120), (120, 40), (1, 7), (96, 96)]
OPTIONS = {"lr": 0.02, "weight_decay": 0.1}


def make_matrices(shapes=tuple(SHAPES), copies=3):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes for _ in range(copies)]


def set_gradients(matrices, step):
    generator = torch.Generator().manual_seed(100 + step)
    for matrix in matrices:
        matrix.grad = torch.randn(matrix.shape, generator=generator) * 10 ** torch.randn((), generator=generator)


def train(optimizer, matrices, steps=4, skipped=()):
    """Make the steps. A skipped one has gradients that are not finite, and found_inf."""
    for step in range(steps):
        for bad in [True, False] if step in skipped else [False]:
            set_gradients(matrices, step)
            if bad:
                matrices[0].grad[0, 0] = math.nan
                matrices[-1].grad.fill_(math.inf)
            optimizer.found_inf = torch.tensor(float(bad)) if skipped else None
            optimizer.param_groups[0]["momentum"] = 0.7 + 0.05 * step
            optimizer.step()
    return [matrix.detach() for matrix in matrices], [optimizer.state[p]["momentum_buffer"] for p in matrices]


def torch_muon(matrices):
    return torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **OPTIONS)


@pytest.fixture
def torch_coefficients(monkeypatch):
    """The coefficients of torch.optim.Muon: the same in each of five iterations."""
    monkeypatch.setattr(optim, "NEWTON_SCHULZ", ((3.4445, -4.7750, 2.0315),) * 5)


def test_bf16_equals_torch_to_the_bit(torch_coefficients):
    """Matrices are stacked in threes and, where the stack has a limit, in ones and twos."""
    ours, theirs = make_matrices(), make_matrices()
    weights, momentum = train(Muon(ours, dtype=torch.bfloat16, **OPTIONS), ours)
    wanted_weights, wanted_momentum = train(torch_muon(theirs), theirs)
    for got, wanted in zip(weights + momentum, wanted_weights + wanted_momentum, strict=True):
        assert torch.equal(got, wanted), got.shape


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_equals_the_plain_iteration_in_float64(shape):
    stack = torch.stack([matrix.detach() for matrix in make_matrices([shape])])
    for got, matrix in zip(orthogonalize(stack), stack.double(), strict=True):
        wanted = matrix / matrix.norm()
        for a, b, c in NEWTON_SCHULZ:
            gram = wanted @ wanted.T if shape[0] <= shape[1] else wanted.T @ wanted
            polynomial = a * torch.eye(len(gram)) + b * gram + c * gram @ gram
            wanted = polynomial @ wanted if shape[0] <= shape[1] else wanted @ polynomial
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skipped_steps_change_nothing(dtype):
    """Step 0, before which there is no momentum, and step 2 are first tried with gradients that are not finite."""
    ours, theirs = make_matrices(), make_matrices()
    weights, momentum = train(Muon(ours, dtype=dtype, **OPTIONS), ours, skipped=(0, 2))
    wanted_weights, wanted_momentum = train(Muon(theirs, dtype=dtype, **OPTIONS), theirs)
    for got, wanted in zip(weights + momentum, wanted_weights + wanted_momentum, strict=True):
        assert torch.equal(got, wanted), got.shape


@pytest.mark.parametrize("is_finite", [True, False])
def test_gradient_scaler_skips_without_a_read(is_finite, monkeypatch):
    ours, theirs = make_matrices(), make_matrices()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer, plain = Muon(ours, dtype=torch.float32, **OPTIONS), Muon(theirs, dtype=torch.float32, **OPTIONS)
    set_gradients(ours, 0)
    set_gradients(theirs, 0)
    scaler.scale(torch.ones(()))
    for matrix in ours:
        matrix.grad *= 64 if is_finite else math.nan
    before = [matrix.detach().clone() for matrix in ours]
    scaler.unscale_(optimizer)
    monkeypatch.setattr(torch.Tensor, "item", None)
    scaler.step(optimizer)
    monkeypatch.undo()
    scaler.update()
    plain.step()
    for got, kept, trained in zip(ours, before, theirs, strict=True):
        assert torch.equal(got.detach(), trained.detach() if is_finite else kept)
    assert scaler.get_scale() == (64 if is_finite else 32)


def test_matrices_without_gradient_keep_weights_and_momentum(torch_coefficients):
    """As in torch's: an unused matrix does not decay. Its shape's other matrices are stacked without it."""
    ours, theirs = make_matrices([(16, 32)]), make_matrices([(16, 32)])
    for matrices, optimizer in ((ours, Muon(ours, dtype=torch.bfloat16, **OPTIONS)), (theirs, torch_muon(theirs))):
        for step, unused in ((0, 1), (1, 2), (2, 0)):
            set_gradients(matrices, step)
            matrices[unused].grad = None
            optimizer.param_groups[0]["momentum"] = 0.9
            optimizer.step()
    assert all(torch.equal(got, wanted) for got, wanted in zip(ours, theirs, strict=True))


def test_stacks_on_a_cpu_are_small():
    small, large = torch.empty(64, 64), torch.empty(2048, 512, device="meta")
    assert stack_elements(small) // small.numel() == 64 and stack_elements(large) // large.numel() == 64


def all_to_all_of_threads(world_size):
    """Return torch.distributed.all_to_all_single for processes that are threads; `group` is the rank."""
    barrier, inputs = threading.Barrier(world_size), {}

    def all_to_all_single(output, sent, group):
        inputs[group] = sent
        barrier.wait()
        output.copy_(torch.cat([inputs[rank].chunk(world_size)[group] for rank in range(world_size)]))
        barrier.wait()

    return all_to_all_single


@pytest.mark.parametrize(("count", "shape"), [(4, (12, 20)), (7, (13, 20)), (2, (2, 5)), (1, (20, 12))])
def test_shards_equal_whole_matrices(monkeypatch, count, shape):
    """On 3 processes: shares and shards of different sizes, and empty ones."""
    stack = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(torch.distributed, "all_to_all_single", all_to_all_of_threads(3))
    pieces = [*stack.chunk(3, dim=1)]
    pieces += [stack[:, :0]] * (3 - len(pieces))

    def work(rank):
        mesh = SimpleNamespace(get_group=lambda: rank, size=lambda: 3)
        return orthogonalize_shards(pieces[rank], SimpleNamespace(device_mesh=mesh, shape=shape))

    with ThreadPoolExecutor(3) as pool:
        results = [*pool.map(work, range(3))]
    assert [len(result[0]) for result in results] == [len(piece[0]) for piece in pieces]
    torch.testing.assert_close(torch.cat(results, dim=1), orthogonalize(stack))


class CountLaunches(TorchDispatchMode):
    """Counts operators that are not views."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += not operator.is_view
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("found_inf", [False, True])
def test_a_step_of_the_small_preset_needs_few_launches(found_inf):
    """In bf16, as on a GPU. torch.optim.Muon needs 1,848. AdamW, fused, adds 2 for each of its groups."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(**PRESETS["small"]))
        optimizer = make_optimizers(model, "muon", 1e-3, 0.1, fused=False)[0]
        optimizer.dtype = torch.bfloat16
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # allocates the momentum
        optimizer.found_inf = torch.zeros(()) if found_inf else None
        with CountLaunches() as launches:
            optimizer.step()
    assert 50 < launches.count <= 190


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_state_allocated_in_advance_changes_no_step(kind):
    results = []
    for in_advance in (False, True):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(50, 32, 2, 4, 2))
        optimizers = make_optimizers(model, kind, 1e-3, 0.1)
        if in_advance:
            init_optimizer_state(optimizers)
            states = [state for optimizer in optimizers for state in optimizer.state.values()]
            assert len(states) == len(list(model.parameters()))
            assert not any(tensor.any() for state in states for tensor in state.values())
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            for optimizer in optimizers:
                optimizer.step()
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
