"""Autograd functions for training on a CPU: fewer passes over memory and fewer saved tensors than torch's operators.

    function       saves for backward    torch's operators
    rms_norm       x, 1 / rms(x)         save also x / rms(x), and run twice as many kernels
    rotate         nothing               run three times as many kernels
    swiglu_down    gate, up              save also silu(gate) and silu(gate) * up

Plain forms, used on other devices, by torch.compile and without gradients, and the oracles of tests/model/test_cpu_ops:
F.rms_norm, rope.apply_rope, F.linear(F.silu(gate) * up, weight).
Read next: transformer.py (the caller).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def trains_on_cpu(x: Tensor) -> bool:
    """Whether the functions of this module apply to x: on a CPU, with gradients, outside torch.compile."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square_sum = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        inverse_rms = square_sum.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        out: Tensor = (x * inverse_rms).mul_(weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """With r = 1 / rms(x): dx = r grad w - x r^3 mean(grad w x), dw = sum of grad x r."""
        x, weight, inverse_rms = ctx.saved_tensors
        product = grad * x
        grad_weight = (inverse_rms.flatten() @ product.flatten(0, -2)).to(weight.dtype)
        along_x = (product @ weight).unsqueeze(-1).mul_(inverse_rms**3).div_(-x.shape[-1])
        grad_x = torch.mul(grad, weight, out=product).mul_(inverse_rms).addcmul_(x, along_x)
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """F.rms_norm over the last dimension of x (..., dim), fp32. arXiv:1910.07467, eq. 4."""
    out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    out = x * cos
    (first, second), (out_first, out_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    half_sin = sin.chunk(2, dim=-1)[0]  # both halves of the table are equal
    out_first.addcmul_(second, half_sin, value=-direction)
    out_second.addcmul_(first, half_sin, value=direction)
    return out.to(x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """rope.apply_rope in the dtype of x, with the inverse rotation as its gradient. Arguments as there."""
    out: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return out


class _SwiGLUDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight.to(gate.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, weight = ctx.saved_tensors
        grad_product, silu, grad_weight = grad @ weight.to(grad.dtype), F.silu(gate), None
        if ctx.needs_input_grad[2]:
            product = (silu * up).flatten(0, -2)
            grad_weight = (grad.flatten(0, -2).T @ product).to(weight.dtype)
        grad_up = silu.mul_(grad_product)
        return torch.ops.aten.silu_backward(grad_product.mul_(up), gate), grad_up, grad_weight


def swiglu_down(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """F.linear(F.silu(gate) * up, weight): gate, up (..., hidden), weight (dim, hidden) -> (..., dim)."""
    out: Tensor = _SwiGLUDown.apply(gate, up, weight)  # type: ignore[no-untyped-call]
    return out
