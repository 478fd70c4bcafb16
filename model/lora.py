"""LoRA: teach a finished model something new by a small change of some of its matrices. The matrices themselves rest.

    h = W x + (alpha / r) B A x        W (out, in) rests;  A (r, in) and B (out, r) are trained, r is small

A starts random and B at zero, so the first step begins with exactly the parent. Dropout, if any, acts on the x that A
sees. Merged, W + (alpha / r) B A is an ordinary matrix again and costs nothing. Hu et al. 2021, arXiv:2106.09685,
section 4.1. Names and initialisation are peft's: `q_proj.weight`, `q_proj.lora_A.weight`, `q_proj.lora_B.weight`.
Read next: ../4-lora_sft.py (how it is trained), checkpoint.py (how it is kept), ../export/peft_adapter.py (how it is
exchanged).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from model.transformer import Transformer


@dataclass(frozen=True)
class LoRAConfig:
    """`targets` are names of matrices or of groups of them: see `target_names`. Raises UserError for nonsense."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all",)

    def __post_init__(self) -> None:
        if isinstance(self.targets, tuple):  # a list, so that what is read from a file equals what was written
            object.__setattr__(self, "targets", list(self.targets))
        for problem, right in {
            "rank must be a whole number from 1 to 65536": type(self.rank) is int and 1 <= self.rank <= 65536,
            "alpha must be in (0, 1e6]": type(self.alpha) in (int, float) and 0 < self.alpha <= 1e6,
            "dropout must be in [0, 1)": type(self.dropout) in (int, float) and 0 <= self.dropout < 1,
            "targets must be names": type(self.targets) in (tuple, list)
            and bool(self.targets)
            and all(type(name) is str for name in self.targets),
        }.items():
            if not right:
                raise UserError(f"LoRA: {problem} (got {str(self.to_dict())[:200]})")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class LoRALinear(nn.Linear):
    """A linear layer that shares the parent's weight and bias, and the two matrices that are trained beside it."""

    def __init__(self, linear: nn.Linear, config: LoRAConfig, rng: torch.Generator) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = config.alpha / config.rank
        self.lora_dropout = nn.Dropout(config.dropout)
        options: dict[str, Any] = {"bias": False, "device": linear.weight.device}
        self.lora_A = nn.Linear(linear.in_features, config.rank, **options)
        self.lora_B = nn.Linear(config.rank, linear.out_features, **options)
        with torch.no_grad():  # drawn on the CPU: the same A on every device and in every process
            bound = linear.in_features**-0.5
            a = torch.empty(config.rank, linear.in_features).uniform_(-bound, bound, generator=rng)
            self.lora_A.weight.copy_(a)
            self.lora_B.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        base = super().forward(x)
        delta: Tensor = self.lora_B(self.lora_A(self.lora_dropout(x)))
        return base + self.scale * delta

    @torch.no_grad()
    def merged_linear(self) -> nn.Linear:
        """W + (alpha / r) B A as an ordinary layer; summed in fp32, kept in W's dtype."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        delta = self.scale * (self.lora_B.weight.float() @ self.lora_A.weight.float())
        linear.weight = nn.Parameter((self.weight.float() + delta).to(self.weight.dtype))
        linear.bias = self.bias
        return linear


def target_names(name: str) -> set[str]:
    """Target names of a matrix: `model.layers.0.mlp.experts.3.up_proj` has all, all-linear, mlp, experts and up_proj.

    all-linear is peft's name for all. As there, the output layer is not part of it.
    """
    parts = name.replace("self_attn", "attention").split(".")[2:]
    return {"all", "all-linear", *(part for part in parts if not part.isdigit())}


def attach(model: Transformer, config: LoRAConfig, seed: int = 0) -> None:
    """Put A and B beside every target, and let nothing else train. The model computes what it did, to the bit.

    Targets lie in the layers: attention (q_proj k_proj v_proj o_proj) and mlp (gate_proj up_proj down_proj), in an MoE
    also experts or shared_experts alone. The router of an MoE rests.
    Raises UserError for targets that the model does not have, and when it carries an adapter already.
    """
    if model.adapter:
        raise UserError("the model carries an adapter already: merge it before attaching another one")
    layer_modules = ((name, module) for name, module in model.named_modules() if ".layers." in name)
    matrices = {name: m for name, m in layer_modules if isinstance(m, nn.Linear) and not name.endswith(".mlp.gate")}
    available, requested = set().union(*map(target_names, matrices)), set(config.targets)
    if requested - available:
        raise UserError(
            f"no matrix here is called {', '.join(sorted(requested - available))}: "
            f"choose of {', '.join(sorted(available))}"
        )
    model.requires_grad_(False)
    rng = torch.Generator().manual_seed(seed)
    for name, linear in matrices.items():
        if requested & target_names(name):
            model.set_submodule(name, LoRALinear(linear, config, rng).train(linear.training))
    model.adapter = config.to_dict()


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapter_state(model: Transformer) -> dict[str, Tensor]:
    """The tensors of the adapter alone: `…lora_A.weight` (rank, in) and `…lora_B.weight` (out, rank)."""
    return {name: tensor for name, tensor in model.state_dict().items() if ".lora_A." in name or ".lora_B." in name}


def merge(model: Transformer) -> None:
    """Make the change part of the matrices; afterwards the model is an ordinary one, and all of it may train again.

    Raises UserError when there is nothing to merge: a second time would add the change twice.
    """
    if not model.adapter:
        raise UserError("there is no adapter to merge: this model carries none, or it was merged already")
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.merged_linear().train(layer.training))
    model.adapter = {}
    model.requires_grad_(True)


def adapter_summary(model: Transformer) -> str:
    """One line: the numbers of the adapter, and how much of the model trains."""
    settings, matrices = model.adapter, len(lora_layers(model))
    num_trainable = sum(tensor.numel() for tensor in adapter_state(model).values())
    num_frozen = sum(p.numel() for p in model.parameters()) - num_trainable
    return (
        f"LoRA rank {settings['rank']}, alpha {settings['alpha']:g}, on {' '.join(settings['targets'])} "
        f"({matrices} matrices): {num_trainable:,} parameters train, "
        f"{num_trainable / num_frozen:.2%} of the parent's {num_frozen:,}"
    )
