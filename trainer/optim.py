"""Optimizers (Muon and AdamW), their parameter groups, and the learning-rate schedule.

    Muon    matrices of the layers. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; the update is
            replaced by (approximately) the nearest semi-orthogonal matrix, scaled as in arXiv:2502.16982, section 2.2
    AdamW   embeddings and norms (no weight decay), untied output layer. Loshchilov & Hutter 2017, arXiv:1711.05101

With Muon the learning rate of the embeddings is multiplied by min(4, 768 / dim): an AdamW step changes the logits by
about rate x dim, so narrow models need a higher rate.
Read next: loop.py.
"""

import math
from typing import Any

import torch
from torch import nn

from common.errors import UserError
from model.transformer import Transformer
from trainer.config import TrainConfig


def embedding_lr_multiplier(dim: int) -> float:
    """Return the embeddings' multiple of the learning rate next to Muon.

    Measured (LOG.md): 4 was best at dim 192; at dim 512 4 diverged, and 1 and 2 were equal.
    """
    return min(4.0, 768 / dim)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Return (matrices of the layers, other matrices with weight decay, norms and embeddings: no weight decay)."""
    layer_matrices, other_matrices, no_decay = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2 or "embed_tokens" in name:
            no_decay.append(parameter)
        elif ".layers." in name and parameter.dim() == 2 and ".mlp.gate.weight" not in name:
            layer_matrices.append(parameter)
        else:
            other_matrices.append(parameter)
    return layer_matrices, other_matrices, no_decay


def make_optimizers(
    model: Transformer, kind: str, learning_rate: float, weight_decay: float, fused: bool = True
) -> list[torch.optim.Optimizer]:
    """Return [AdamW], or [Muon, AdamW] with Muon for the layers' matrices (kind "muon").

    Raises UserError if this torch has no Muon.
    """
    matrices, other_matrices, no_decay = split_parameters(model)
    if kind == "adamw":
        other_matrices = matrices + other_matrices
    embeddings, norms = [p for p in no_decay if p.dim() > 1], [p for p in no_decay if p.dim() < 2]
    has_muon = kind == "muon" and bool(matrices)
    groups = [
        {"params": other_matrices, "weight_decay": weight_decay},
        {
            "params": embeddings,
            "weight_decay": 0.0,
            "lr_multiplier": embedding_lr_multiplier(model.config.dim) if has_muon else 1.0,
        },
        {"params": norms, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (0.8 if has_muon else 0.9, 0.95)
    optimizers: list[torch.optim.Optimizer] = []
    if groups:  # empty for a LoRA adapter under Muon
        optimizers.append(torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused))
    if not has_muon:
        return optimizers
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"torch {torch.__version__} has no Muon: pip install -U 'torch>=2.9', or --optimizer adamw")
    if hasattr(matrices[0], "full_tensor"):
        return [ShardedMuon(matrices, learning_rate, weight_decay), *optimizers]
    # match_rms_adamw scales the update to the RMS of AdamW's, so that both use learning rates of the same size.
    muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, *optimizers]


class ShardedMuon(torch.optim.Optimizer):
    """Muon for sharded matrices (FSDP2's DTensors). Equals torch.optim.Muon up to floating-point rounding.

    The momentum stays sharded. The update is gathered, one matrix at a time, in bf16, the dtype in which torch's Muon
    orthogonalises. torch's Muon then runs on a zero matrix with this update as its gradient, without momentum and
    decay: the result is the orthogonalised update, of which every process adds its shard.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        from torch.distributed.tensor import distribute_tensor

        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                momentum, state = group["momentum"], self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                average = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
                whole = nn.Parameter(torch.zeros(matrix.shape, device=matrix.device))
                whole.grad = matrix.grad.lerp(average, momentum).bfloat16().full_tensor().float()
                options: dict[str, Any] = {"lr": group["lr"], "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
                torch.optim.Muon([whole], adjust_lr_fn="match_rms_adamw", **options).step()
                local_update = distribute_tensor(
                    whole.detach(), matrix.device_mesh, matrix.placements, src_data_rank=None
                )
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(local_update)


def muon_momentum(step: int) -> float:
    """Return Muon's momentum: linear from 0.7 at step 0 to 0.95 at step 1,000, then constant.

    Gradients of early steps are outdated quickly: in runs of 122 steps 0.7 was best (LOG.md).
    """
    return 0.7 + 0.25 * min(step / 1000, 1.0)


def lr_multiplier(config: TrainConfig, step: int, fraction_done: float) -> float:
    """Return the multiplier of the peak learning rate at `step` (from 0), after `fraction_done` in [0, 1] of the run.

    Linear warm-up over --warmup_iters steps, then cosine or linear decay to --min_lr_ratio. With --warmup_ratio the
    warm-up takes that fraction of the run instead and the decay the remaining one, as in transformers: the rate of
    step 0 is 0.
    """
    steps, ratio = config.warmup
    if fraction_done < ratio:
        return fraction_done / ratio
    if step < steps:
        return (step + 1) / (steps + 1)
    fraction_done = min(max((fraction_done - ratio) / (1 - ratio), 0.0), 1.0)
    decay = 0.5 * (1 + math.cos(math.pi * fraction_done)) if config.schedule == "cosine" else 1 - fraction_done
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * decay


def set_learning_rate(
    config: TrainConfig, optimizers: list[torch.optim.Optimizer], step: int, fraction_done: float
) -> float:
    """Set the learning rate of every parameter group, and Muon's momentum, for this step. Returns the learning rate.

    `fraction_done`: fraction of the run that is done, in [0, 1].
    """
    learning_rate = config.learning_rate * lr_multiplier(config, step, fraction_done)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_multiplier", 1.0)
            if "momentum" in group:
                group["momentum"] = muon_momentum(step)
    return learning_rate
