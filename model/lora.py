"""LoRA: low-rank adaptation of linear layers. The base weights are frozen; only the matrices A and B train.

    h = W x + (alpha / r) B A dropout(x)        W (out, in) frozen;  A (r, in), B (out, r) trainable;  r << in, out

A is initialised uniformly and B with zeros, so the model initially equals its parent. Merged, W + (alpha / r) B A is
one matrix without additional cost. Hu et al. 2021, arXiv:2106.09685, section 4.1. Names and initialisation are those
of peft: `q_proj.weight`, `q_proj.lora_A.weight`, `q_proj.lora_B.weight`.
Read next: ../4-lora_sft.py (training), checkpoint.py (adapter checkpoints), ../export/peft_adapter.py (peft's format).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import require
from model.transformer import Transformer


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA settings. `targets`: names of matrices or groups (see `target_names`). Raises UserError if out of range."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all",)

    def __post_init__(self) -> None:
        if isinstance(self.targets, tuple):  # a list, so that a config read from a file is equal
            object.__setattr__(self, "targets", list(self.targets))
        got, numbers = f"(got {str(self.to_dict())[:200]})", (int, float)
        is_rank = type(self.rank) is int and 1 <= self.rank <= 65536
        require(is_rank, f"LoRA: rank must be a whole number from 1 to 65536 {got}")
        require(type(self.alpha) in numbers and 0 < self.alpha <= 1e6, f"LoRA: alpha must be in (0, 1e6] {got}")
        require(type(self.dropout) in numbers and 0 <= self.dropout < 1, f"LoRA: dropout must be in [0, 1) {got}")
        are_names = type(self.targets) is list and self.targets and all(type(name) is str for name in self.targets)
        require(are_names, f"LoRA: targets must be names {got}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class LoRALinear(nn.Linear):
    """A linear layer with the frozen weight and bias of `linear` and trainable matrices A and B."""

    def __init__(self, linear: nn.Linear, config: LoRAConfig, rng: torch.Generator) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = config.alpha / config.rank
        self.lora_dropout = nn.Dropout(config.dropout)
        options: dict[str, Any] = {"bias": False, "device": linear.weight.device}
        self.lora_A = nn.Linear(linear.in_features, config.rank, **options)
        self.lora_B = nn.Linear(config.rank, linear.out_features, **options)
        with torch.no_grad():  # sampled on the CPU: the same A on every device and in every process
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
        """An nn.Linear with weight W + (alpha / r) B A, computed in fp32 and stored in W's dtype."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        delta = self.scale * (self.lora_B.weight.float() @ self.lora_A.weight.float())
        linear.weight = nn.Parameter((self.weight.float() + delta).to(self.weight.dtype))
        linear.bias = self.bias
        return linear


def target_names(name: str) -> set[str]:
    """The target names that match a matrix: all, all-linear, mlp, experts, up_proj for layers.0.mlp.experts.3.up_proj.

    all-linear is peft's name for all. As in peft, it excludes the output layer.
    """
    parts = name.replace("self_attn", "attention").split(".")[2:]
    return {"all", "all-linear", *(part for part in parts if not part.isdigit())}


def attach(model: Transformer, config: LoRAConfig, seed: int = 0) -> None:
    """Replace every target by a LoRALinear and freeze all other parameters. The output stays bitwise equal.

    Targets: attention (q_proj k_proj v_proj o_proj) and mlp (gate_proj up_proj down_proj); in an MoE also experts and
    shared_experts. The router is never a target.
    Raises UserError if a target does not exist or the model already has an adapter.
    """
    require(not model.adapter, "the model already has an adapter: merge it before attaching another one")
    layer_modules = ((name, module) for name, module in model.named_modules() if ".layers." in name)
    matrices = {name: m for name, m in layer_modules if isinstance(m, nn.Linear) and not name.endswith(".mlp.gate")}
    available, requested = set().union(*map(target_names, matrices)), set(config.targets)
    unknown, choices = ", ".join(sorted(requested - available)), ", ".join(sorted(available))
    require(not unknown, f"unknown LoRA targets {unknown}: choose from {choices}")
    model.requires_grad_(False)
    rng = torch.Generator().manual_seed(seed)
    for name, linear in matrices.items():
        if requested & target_names(name):
            model.set_submodule(name, LoRALinear(linear, config, rng).train(linear.training))
    model.adapter = config.to_dict()


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapter_state(model: Transformer) -> dict[str, Tensor]:
    """The tensors of the adapter: `…lora_A.weight` (rank, in) and `…lora_B.weight` (out, rank)."""
    return {name: tensor for name, tensor in model.state_dict().items() if ".lora_A." in name or ".lora_B." in name}


def merge(model: Transformer) -> None:
    """Merge the adapter into the base weights and make all parameters trainable again.

    Raises UserError if the model has no adapter.
    """
    require(model.adapter, "the model has no adapter to merge: it was merged already or never attached")
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.merged_linear().train(layer.training))
    model.adapter = {}
    model.requires_grad_(True)


def adapter_summary(model: Transformer) -> str:
    """One line: the settings of the adapter and the number of trainable parameters."""
    settings, matrices = model.adapter, len(lora_layers(model))
    num_trainable = sum(tensor.numel() for tensor in adapter_state(model).values())
    num_frozen = sum(p.numel() for p in model.parameters()) - num_trainable
    return (
        f"LoRA rank {settings['rank']}, alpha {settings['alpha']:g}, on {' '.join(settings['targets'])} "
        f"({matrices} matrices): {num_trainable:,} parameters train, "
        f"{num_trainable / num_frozen:.2%} of the parent's {num_frozen:,}"
    )
