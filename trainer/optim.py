"""How the weights move: which optimizer holds which parameter, and the learning rate of each step.

Muon (Jordan et al. 2024; scaled as in arXiv:2502.16982, section 2.2) turns the update of a matrix into the nearest
orthogonal one, so that every direction learns at the same pace; it holds the matrices of the layers. AdamW (Loshchilov
& Hutter 2017) holds the rest: embeddings and norms, without decay, and an untied output layer. Beside Muon the
embeddings move faster, the more so the narrower they are: a step moves the logits by about rate x dim.
Read next: loop.py.
"""

import argparse
import math
from typing import Any

import torch
from torch import nn

from common.errors import UserError
from model.transformer import Transformer


def embedding_lr_multiplier(dim: int) -> float:
    """Times the learning rate, beside Muon. 4 was best at dim 192; at dim 512 4 diverged and 1 equalled 2 (LOG.md)."""
    return min(4.0, 768 / dim)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """(matrices of the layers, other matrices that decay, parameters without decay: norms and embeddings)."""
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
    """One AdamW, or Muon for the layers' matrices beside an AdamW for the rest."""
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
    if groups:  # Muon on a LoRA adapter leaves nothing to AdamW
        optimizers.append(torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused))
    if not has_muon:
        return optimizers
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"torch {torch.__version__} has no Muon: pip install -U 'torch>=2.9', or --optimizer adamw")
    if hasattr(matrices[0], "full_tensor"):
        return [ShardedMuon(matrices, learning_rate, weight_decay), *optimizers]
    # match_rms_adamw scales the update so that the learning rate means what it means for AdamW.
    muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, *optimizers]


class ShardedMuon(torch.optim.Optimizer):
    """Muon on matrices of which every process holds some rows (FSDP2's DTensors): what torch's does, to rounding.

    Momentum is kept in pieces. To be turned, the update is gathered, one matrix at a time, in bf16, in which torch's
    Muon turns it anyway: given it as the gradient of a matrix of zeros, without momentum and decay, that leaves there
    what is to be added.
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
    """0.7 at first, 0.95 from step 1,000 on. Early gradients age quickly; at 122 steps 0.7 measured best (LOG.md)."""
    return 0.7 + 0.25 * min(step / 1000, 1.0)


def lr_multiplier(
    step: int, fraction_done: float, warmup: int, kind: str, final_multiplier: float, warmup_share: float = 0.0
) -> float:
    """The multiplier of the peak learning rate at `step` (counted from 0), after `fraction_done` of the run.

    Linear warm-up over `warmup` steps, then a half cosine or a straight line down to `final_multiplier`. With
    `warmup_share` the warm-up takes that share of the run instead, and the fall the rest, as in transformers: step 0
    stands still.
    """
    if warmup_share:
        if fraction_done < warmup_share:
            return fraction_done / warmup_share
        fraction_done = (fraction_done - warmup_share) / (1 - warmup_share)
    elif step < warmup:
        return (step + 1) / (warmup + 1)
    fraction_done = min(max(fraction_done, 0.0), 1.0)
    decay = 0.5 * (1 + math.cos(math.pi * fraction_done)) if kind == "cosine" else 1 - fraction_done
    return final_multiplier + (1 - final_multiplier) * decay


def set_learning_rate(
    args: argparse.Namespace, optimizers: list[torch.optim.Optimizer], step: int, fraction_done: float
) -> float:
    """Give every group this step's learning rate, and Muon's groups this step's momentum; returns the rate.

    `fraction_done` in [0, 1] is the share of the run that lies behind.
    """
    warmup_share = vars(args).get("warmup_share", 0.0)
    multiplier = lr_multiplier(step, fraction_done, args.warmup_iters, args.schedule, args.final_lr_share, warmup_share)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * multiplier * group.get("lr_multiplier", 1.0)
            if "momentum" in group:
                group["momentum"] = muon_momentum(step)
    return args.learning_rate * multiplier
