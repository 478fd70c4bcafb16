"""The one loss of pretraining and SFT: cross-entropy of the next token, without ever holding all logits.

    loss = sum over trained positions of  logsumexp(h W^T) - (h W^T)[label]
    d loss / d logits = softmax(logits) - onehot(label)

and for DPO the same log-probabilities one by one.

The logits of one batch (tokens x vocabulary, fp32) are the largest tensor of a small model's training step. They are
made a chunk at a time, and the gradient is taken on the spot, so nothing of that size waits for the backward pass.
Read next: loop.py (who divides the sum).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.checkpoint import unwrap_model

IGNORE_INDEX = -100  # the label of a position that is not trained
LOGITS_CHUNK = 1024  # positions whose logits exist at one time
# Positions are filled up to a multiple of this: a CPU keeps memory for every shape of product that it has met.
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
            log_probs = F.log_softmax((h @ low_weight.T).float(), dim=-1)
            loss += F.nll_loss(log_probs, y, reduction="sum", ignore_index=IGNORE_INDEX)
            if not (need_hidden or need_weight):
                continue
            grad_logits = log_probs.exp_()
            grad_logits[torch.arange(len(y), device=y.device), y.clamp(min=0)] -= 1
            grad_logits = grad_logits.to(dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + LOGITS_CHUNK] = grad_logits @ low_weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ h
        ctx.grads = (grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = (None if g is None else g * grad_outputs[0].to(g.dtype) for g in ctx.grads)
        return grad_hidden, grad_weight, None, None


def output_weight(model: nn.Module) -> Tensor:
    """The matrix (vocab, dim) that turns hidden states into logits, also of a model wrapped by DDP or torch.compile."""
    return unwrap_model(model).lm_head.weight


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Summed -log p(label) over the trained positions, and how many they are.

    hidden: (batch, seq, dim), the output of the model. weight: (vocab, dim), the output layer.
    labels: (batch, seq), IGNORE_INDEX where nothing is trained. Logits are made at trained positions only.
    A batch without any trained position gives 0 with zero gradients.
    """
    rows, targets, count = trained_positions(hidden, labels)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return _ChunkedCrossEntropy.apply(rows, weight, targets, dtype), count


def trained_positions(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """Hidden states (n, dim) and labels (n,) of the trained positions, and how many they are.

    n is that number filled up to a multiple of COUNT_MULTIPLE with zeros and IGNORE_INDEX. Zeros give the weight no
    gradient.
    """
    trained = labels != IGNORE_INDEX
    hidden, labels = hidden[trained], labels[trained]
    count, missing = len(labels), -len(labels) % COUNT_MULTIPLE
    return F.pad(hidden, (0, 0, 0, missing)), F.pad(labels, (0, missing), value=IGNORE_INDEX), count


def token_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """log p(label) at every trained position, 0 elsewhere: (batch, seq), fp32. Arguments as above.

    What a position weighs is not known before the backward pass, so a chunk's logits are made once more there.
    """
    rows, targets, count = trained_positions(hidden, labels)

    def chunk(h: Tensor, y: Tensor) -> Tensor:
        return (h @ weight.T).float().log_softmax(-1).gather(-1, y.clamp(min=0)[:, None])[:, 0]

    starts = range(0, max(len(targets), 1), LOGITS_CHUNK)  # an empty chunk still gives everything a gradient: zero
    pieces = [(rows[start : start + LOGITS_CHUNK], targets[start : start + LOGITS_CHUNK]) for start in starts]
    chunk_log_probs = [checkpoint(chunk, h, y, use_reentrant=False, preserve_rng_state=False) for h, y in pieces]
    log_probs = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    log_probs[labels != IGNORE_INDEX] = torch.cat(chunk_log_probs)[:count]
    return log_probs
