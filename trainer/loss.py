"""Cross-entropy for pretraining and SFT, and per-token log-probabilities for DPO.

    logits            = h W^T                       h: (n, dim) hidden states, W: (vocab, dim)
    loss              = sum over trained positions of  logsumexp(logits) - logits[label]
    d loss / d logits = softmax(logits) - onehot(label)

The logits of a batch (tokens x vocab, fp32) are the largest tensor of a small model's training step. On a CPU they are
computed in chunks of LOGITS_CHUNK trained positions, and the gradient of each chunk in the forward pass, so that the
logits of the whole batch never exist at once. On other devices, and under torch.compile, all positions are computed by
plain operators of fixed shapes, which never wait for the device; batches above FULL_LOGITS are computed in chunks.
Read next: loop.py (divides the sum by the number of tokens).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common.device import compute_dtype

IGNORE_INDEX = -100  # the label of a position that is not trained
LOGITS_CHUNK = 1024  # positions per chunk on a CPU
DEVICE_CHUNK = 4096  # positions per chunk on other devices,
FULL_LOGITS = 2**29  # for batches with more logits than this (2 GB in fp32)
# Positions are padded to a multiple of this: on a CPU every new matmul shape allocates a new buffer.
COUNT_MULTIPLE = 128


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        low_weight = weight.to(dtype)
        for start in range(0, len(labels), LOGITS_CHUNK):
            h, y = hidden[start : start + LOGITS_CHUNK].to(dtype), labels[start : start + LOGITS_CHUNK]
            log_probs = F.linear(h, low_weight).float()
            torch.log_softmax(log_probs, dim=-1, out=log_probs)
            loss += F.nll_loss(log_probs, y, reduction="sum", ignore_index=IGNORE_INDEX)
            if not (need_hidden or need_weight):
                continue
            grad_logits = log_probs.exp_()
            minus_one = grad_logits.new_full((1, 1), -1.0).expand(len(y), 1)
            grad_logits = grad_logits.scatter_add_(1, y.clamp(min=0)[:, None], minus_one).to(dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + LOGITS_CHUNK] = grad_logits @ low_weight
            if grad_weight is not None and dtype == torch.float32:
                grad_weight.addmm_(grad_logits.T, h)
            elif grad_weight is not None:
                grad_weight += grad_logits.T @ h
        ctx.grads = (grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = (None if g is None else g * grad_outputs[0].to(g.dtype) for g in ctx.grads)
        return grad_hidden, grad_weight, None, None


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of -log p(label) over the trained positions: a scalar, fp32.

    hidden: (batch, seq, dim), the output of the model. weight: (vocab, dim), the output layer.
    labels: (batch, seq), IGNORE_INDEX where nothing is trained; logits are computed only at the other positions.
    A batch without trained positions gives 0 with zero gradients.
    """
    if not _is_chunked(hidden):
        return _device_nll(hidden, weight, labels).sum()
    rows, targets, _ = trained_positions(hidden, labels)
    loss: Tensor = _ChunkedCrossEntropy.apply(rows, weight, targets, compute_dtype(hidden))
    return loss


def _is_chunked(hidden: Tensor) -> bool:
    """Whether only trained positions are computed, in chunks: on a CPU, outside torch.compile."""
    return hidden.device.type == "cpu" and not torch.compiler.is_compiling()


def _nll(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) of every position, 0 where nothing is trained: hidden (n, dim), labels (n,) -> (n,), fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=IGNORE_INDEX, reduction="none")


def _device_nll(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`_nll` of (batch, seq, dim) and (batch, seq), by checkpointed chunks above FULL_LOGITS logits."""
    h, y = hidden.flatten(0, 1), labels.flatten()
    if len(y) * len(weight) <= FULL_LOGITS:
        return _nll(h, weight, y).view(labels.shape)
    pieces = zip(h.split(DEVICE_CHUNK), y.split(DEVICE_CHUNK), strict=True)
    nll = [checkpoint(_nll, each, weight, part, use_reentrant=False, preserve_rng_state=False) for each, part in pieces]
    return torch.cat(nll).view(labels.shape)


def trained_positions(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return hidden states (n, dim) and labels (n,) of the trained positions, and their number.

    n is that number rounded up to a multiple of COUNT_MULTIPLE; the padding is zeros and IGNORE_INDEX, which add
    nothing to the gradient of the weight.
    """
    trained = labels != IGNORE_INDEX
    hidden, labels = hidden[trained], labels[trained]
    count, missing = len(labels), -len(labels) % COUNT_MULTIPLE
    return F.pad(hidden, (0, 0, 0, missing)), F.pad(labels, (0, missing), value=IGNORE_INDEX), count


def token_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return log p(label) at every trained position, 0 elsewhere: (batch, seq), fp32. Arguments as `cross_entropy_sum`.

    The gradient of each position is known only in the backward pass, which therefore recomputes the logits by chunks.
    """
    if not _is_chunked(hidden):
        return -_device_nll(hidden, weight, labels)
    rows, targets, count = trained_positions(hidden, labels)

    def chunk(h: Tensor, y: Tensor) -> Tensor:
        return (h @ weight.T).float().log_softmax(-1).gather(-1, y.clamp(min=0)[:, None])[:, 0]

    starts = range(0, max(len(targets), 1), LOGITS_CHUNK)  # at least one chunk, so that the weights get zero gradients
    pieces = [(rows[start : start + LOGITS_CHUNK], targets[start : start + LOGITS_CHUNK]) for start in starts]
    chunk_log_probs = [checkpoint(chunk, h, y, use_reentrant=False, preserve_rng_state=False) for h, y in pieces]
    log_probs = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    log_probs[labels != IGNORE_INDEX] = torch.cat(chunk_log_probs)[:count]
    return log_probs
