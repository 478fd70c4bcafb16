"""The autograd functions of a CPU equal their plain forms: values and gradients, in fp64, fp32 and under autocast."""

import pytest
import torch
import torch.nn.functional as F

from model import cpu_ops
from model.config import ModelConfig
from model.rope import apply_rope, rope_table
from model.transformer import Transformer
from trainer.loss import cross_entropy_sum


def plain_rope(x, cos, sin):
    with torch.no_grad():
        matrix = apply_rope(torch.eye(x.shape[-1], dtype=x.dtype)[:, None].expand(-1, len(cos), -1), cos, sin)
    return torch.einsum("bhsi,isj->bhsj", x, matrix)  # a rotation is linear


def numbers(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def cases(dtype=torch.float64):
    """name -> (function, plain form, inputs)."""
    torch.manual_seed(0)
    cos, sin = (table[:5].to(dtype) for table in rope_table(ModelConfig(dim=16, n_heads=2, n_kv_heads=2)))
    x, weight = numbers(2, 3, 8, dtype=dtype), numbers(8, dtype=dtype)
    heads = numbers(2, 4, 5, 8, dtype=dtype)
    gate, up, down = numbers(2, 3, 6, dtype=dtype), numbers(2, 3, 6, dtype=dtype), numbers(4, 6, dtype=dtype)
    return {
        "rms_norm": (lambda *t: cpu_ops.rms_norm(*t, 1e-5), lambda a, b: F.rms_norm(a, (8,), b, 1e-5), (x, weight)),
        "rotate": (lambda a: cpu_ops.rotate(a, cos, sin), lambda a: plain_rope(a, cos, sin), (heads,)),
        "swiglu_down": (cpu_ops.swiglu_down, lambda a, b, w: F.linear(F.silu(a) * b, w), (gate, up, down)),
    }


@pytest.mark.parametrize("name", cases())
def test_functions_equal_their_plain_forms(name):
    function, plain, inputs = cases()[name]
    ours, theirs = function(*inputs), plain(*inputs)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(theirs)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_weights_get_no_gradient(frozen):
    _, _, (gate, up, down) = cases()["swiglu_down"]
    cpu_ops.swiglu_down(gate, up, down.requires_grad_(not frozen)).sum().backward()
    assert (down.grad is None) == frozen and gate.grad is not None


@pytest.mark.parametrize("change", [{}, {"use_moe": True}, {"qk_norm": True, "qkv_bias": True}, {"dropout": 0.2}])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_model_trains_as_with_plain_operators(change, bf16, monkeypatch):
    """Loss and gradients of a model are those without the functions, up to rounding."""
    if bf16 and "dropout" in change:
        pytest.skip("in 16 bits the blockwise attention draws other dropout masks")
    results = []
    for plain in (False, True):
        if plain:  # as under torch.compile
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        torch.manual_seed(0)
        model = Transformer(ModelConfig(50, 32, 2, 4, 2, max_seq_len=150, **change)).train()
        ids = torch.randint(0, 50, (2, 150))
        torch.manual_seed(1)  # the same dropout
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden, aux_loss = model(ids)
            loss = cross_entropy_sum(hidden, model.lm_head.weight, ids) / ids.numel() + aux_loss
        loss.backward()
        results.append([loss.detach(), *(weight.grad for weight in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        tolerance = 0.05 if bf16 else 1e-5
        assert ours.dtype == theirs.dtype and (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-7
