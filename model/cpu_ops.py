"""Autograd functions for training on a CPU: fewer passes over memory and fewer saved tensors than torch's operators.

    function         saves for backward         torch's operators
    rms_norm         x, 1 / rms(x)              also x / rms(x); ten kernels forward and backward more
    rotate           nothing                    the same, with twice the passes
    swiglu_down      gate, up                   also silu(gate) and silu(gate) * up
    attention_cpu    q, k, v                    the softmax of every pair of positions

Plain forms, used on other devices, by torch.compile and without gradients, and the oracles of tests/model/test_cpu_ops:
F.rms_norm, rope.apply_rope, F.linear(F.silu(gate) * up, weight) and F.scaled_dot_product_attention.
Read next: transformer.py (the caller).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERY_BLOCK = 128  # queries per block of `attention_cpu`


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


def _softmax_blocks(q: Tensor, k: Tensor, mask: Tensor | None) -> Any:
    """Yield (start, end, keys seen, scaled queries, attention weights) for every block of queries.

    The query heads of a key head form one matrix product, and a block of queries skips the keys after it.
    """
    batch, heads, seq, head_dim = q.shape
    kv_heads, before = k.shape[1], k.shape[2] - seq  # cached keys, which every query sees
    for start in range(0, seq, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, seq)
        seen = before + end
        rows = (q[:, :, start:end] * head_dim**-0.5).reshape(batch, kv_heads, -1, head_dim)
        scores = rows @ k[:, :, :seen].transpose(-1, -2)
        by_head = scores.view(batch, heads, end - start, seen)
        if mask is not None:
            by_head.masked_fill_(~mask[..., start:end, :seen], -math.inf)
        elif end - start > 1:
            by_head[..., before + start :] += torch.full_like(by_head[0, 0, :, before + start :], -math.inf).triu(1)
        yield start, end, seen, rows, scores.softmax(-1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        out = torch.empty_like(q)
        for start, end, seen, _, weights in _softmax_blocks(q, k, mask):
            out[:, :, start:end] = (weights @ v[:, :, :seen]).view(out[:, :, start:end].shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, mask = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for start, end, seen, rows, weights in _softmax_blocks(q, k, mask):
            grad_rows = grad[:, :, start:end].reshape(rows.shape)
            grad_v[:, :, :seen] += weights.transpose(-1, -2) @ grad_rows
            grad_weights = grad_rows @ v[:, :, :seen].transpose(-1, -2)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_q[:, :, start:end] = (grad_scores @ k[:, :, :seen]).view(grad_q[:, :, start:end].shape)
            grad_k[:, :, :seen] += grad_scores.transpose(-1, -2) @ rows
        return grad_q.mul_(q.shape[-1] ** -0.5), grad_k, grad_v, None


def attention_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim) + mask) v in blocks of queries. No `mask`: causal, the last query sees all keys.

    q (batch, heads, seq, head_dim); k, v (batch, kv_heads, keys >= seq, head_dim); mask as in `Attention.forward`.
    Returns the shape of q. The backward pass computes the softmax again.
    """
    out: Tensor = _Attention.apply(q, k, v, mask)  # type: ignore[no-untyped-call]
    return out
