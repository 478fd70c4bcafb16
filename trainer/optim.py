"""Optimizers (Muon and AdamW), their parameter groups, and the learning-rate schedule.

    Muon    matrices of the layers. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; the update is
            replaced by (approximately) the nearest semi-orthogonal matrix, scaled as in arXiv:2502.16982, section 2.2
    AdamW   embeddings and norms (no weight decay), untied output layer. Loshchilov & Hutter 2017, arXiv:1711.05101

With Muon the learning rate of the embeddings is multiplied by min(4, 768 / dim): an AdamW step changes the logits by
about rate x dim, so narrow models need a higher rate.
Read next: loop.py.
"""

import functools
import math
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from common.device import has_fast_bf16
from model.transformer import Transformer
from trainer.config import TrainConfig

# (a, b, c) of each Newton-Schulz iteration.
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5


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
    """Return [AdamW], or [Muon, AdamW] with Muon for the layers' matrices (kind "muon")."""
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
    return [Muon(matrices, learning_rate, weight_decay), *optimizers]


class Muon(torch.optim.Optimizer):
    """Muon, on stacks of equally shaped matrices: a GPU then runs few, large products.

        M = lerp(M, G, 1 - momentum);   U = orthogonalize(lerp(G, M, momentum))                 G: gradient of W
        W = (1 - lr weight_decay) W - 0.2 lr sqrt(max(rows, columns)) U

    The last factor gives the update the RMS of AdamW's (arXiv:2502.16982, eq. 4): both use learning rates of the same
    size. In bf16 equal to torch.optim.Muon(adjust_lr_fn="match_rms_adamw") to the bit.
    With FSDP2 the momentum is sharded, and each process orthogonalizes its share of the whole matrices.
    `found_inf`: scalar tensor, as in torch's fused AdamW. With 1 a step changes nothing; the host does not read it.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then sets found_inf instead of reading it
    found_inf: Tensor | None = None

    def __init__(
        self, params: list[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype | None = None
    ) -> None:
        """dtype: of the orthogonalization; None: bf16 where it is faster, else fp32."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        self.dtype = dtype or (torch.bfloat16 if has_fast_bf16(params[0].device) else torch.float32)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes.setdefault(matrix.shape, []).append(matrix)
            for matrices in shapes.values():
                size = max(1, stack_elements(matrices[0]) // matrices[0].numel())
                for start in range(0, len(matrices), size):
                    self.step_stack(matrices[start : start + size], group)

    def step_stack(self, matrices: list[nn.Parameter], options: dict[str, Any]) -> None:
        """Update matrices of one shape. options: their parameter group."""
        for matrix in matrices:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        weights = local_tensors(matrices)
        buffers = local_tensors([self.state[matrix]["momentum_buffer"] for matrix in matrices])
        gradient, momentum = torch.stack(local_tensors([matrix.grad for matrix in matrices])), torch.stack(buffers)
        decay: Any = 1 - options["lr"] * options["weight_decay"]
        skip = None if self.found_inf is None else self.found_inf.bool()
        if skip is not None:  # the momentum is then a fixed point of lerp
            gradient, decay = torch.where(skip, momentum, gradient), torch.where(skip, 1.0, decay)
        momentum.lerp_(gradient, 1 - options["momentum"])
        torch._foreach_copy_(buffers, list(momentum.unbind()))
        update = gradient.lerp_(momentum, options["momentum"]).to(self.dtype)
        update = orthogonalize_shards(update, matrices[0]) if is_sharded(matrices[0]) else orthogonalize(update)
        update = update.to(momentum.dtype, memory_format=torch.contiguous_format)
        if skip is not None:
            update = torch.where(skip, 0.0, update)
        torch._foreach_mul_(weights, decay)
        scale = 0.2 * math.sqrt(max(matrices[0].shape))
        torch._foreach_add_(weights, list(update.unbind()), alpha=-options["lr"] * scale)


def stack_elements(matrix: Tensor) -> int:
    """Return the elements of a stack, at most. On a CPU a stack fits into the second-level cache."""
    return 2**18 if matrix.device.type == "cpu" and not is_sharded(matrix) else 2**26


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def local_tensors(tensors: list[Any]) -> list[Tensor]:
    """Return this process's shards of DTensors, and other tensors as they are."""
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]


def orthogonalize(stack: Tensor) -> Tensor:
    """Return (approximately) the nearest semi-orthogonal matrix of each: (count, rows, columns), same shape and dtype.

    Newton-Schulz iteration: X = P X with P = a I + b G + c G^2 and G = X X^T, from X of Frobenius norm 1. Where X is
    wide, the product of all P is computed first, from G alone. That needs fp32: bf16 loses small singular values.
    """
    x = stack.mT if stack.shape[1] > stack.shape[2] else stack
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if x.dtype == torch.float32 and 2 * x.shape[1] <= x.shape[2]:
        x = product_of_polynomials(x @ x.mT) @ x
    else:
        for a, b, c in NEWTON_SCHULZ:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if stack.shape[1] > stack.shape[2] else x


def product_of_polynomials(gram: Tensor) -> Tensor:
    """Return the product of all P of the iteration in `orthogonalize`, from G = X X^T (count, rows, rows): same shape.

    P and G commute, so the next G is P G P.
    """
    polynomials: list[Tensor] = []
    for a, b, c in NEWTON_SCHULZ:
        if polynomials:
            gram = polynomials[-1] @ gram @ polynomials[-1]
        polynomials.append(torch.baddbmm(gram, gram, gram, beta=b, alpha=c))
        polynomials[-1].diagonal(dim1=1, dim2=2).add_(a)
    return functools.reduce(torch.matmul, polynomials)


def orthogonalize_shards(shards: Tensor, matrix: Any) -> Tensor:
    """As `orthogonalize`, for shards (count, this process's rows, columns) of matrices that are sharded as `matrix`.

    Two all-to-alls: the first brings each process its share of the whole matrices, the second returns the rows. Shards
    and shares are padded with zeros to equal sizes.
    """
    group, world_size = matrix.device_mesh.get_group(), matrix.device_mesh.size()
    count, rows, columns = shards.shape
    most, share = -(-matrix.shape[0] // world_size), -(-count // world_size)  # rows and matrices of a process, at most
    sent = F.pad(shards, (0, 0, 0, most - rows, 0, share * world_size - count))
    received = torch.empty_like(sent)
    torch.distributed.all_to_all_single(received, sent, group=group)
    # (source of the rows, matrix, row, column) -> (matrix, all rows, column)
    whole = received.view(world_size, share, most, columns).transpose(0, 1).flatten(1, 2)
    whole = F.pad(orthogonalize(whole[:, : matrix.shape[0]]), (0, 0, 0, most * world_size - matrix.shape[0]))
    sent = whole.view(share, world_size, most, columns).transpose(0, 1).contiguous()
    torch.distributed.all_to_all_single(received.view_as(sent), sent, group=group)
    return received[:count, :rows]


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
