"""Mixture-of-experts feed-forward: shared experts process every token, a router selects top-k routed experts per token.

    p        = softmax(router(x))                        over the E routed experts
    out      = sum of shared_i(x) + sum over top-k i of  p_i / (sum of the top-k p) * expert_i(x)
    aux_loss = E * sum_i f_i * P_i                       f_i: fraction of assignments to expert i, P_i: mean of p_i

Shared experts as in DeepSeekMoE (Dai et al. 2024, eq. 9). Load-balancing loss as in Switch Transformer (Fedus et al.
2021, eq. 4): 1 for uniform routing, with a gradient to the router through P. Without it the router collapses to a few
experts.
The rows are sorted by expert, so that each expert computes one slice of them, and sorted back.
Read next: transformer.py (DecoderLayer).
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.device import compute_dtype
from model.config import ModelConfig


class MoEFeedForward(nn.Module):
    """Shared experts, and routed experts of which each token uses `n_active_experts`."""

    def __init__(self, config: ModelConfig, make_expert: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.n_active = config.n_active_experts
        self.gate = nn.Linear(config.dim, config.n_routed_experts, bias=False)  # the router
        self.experts = nn.ModuleList(make_expert() for _ in range(config.n_routed_experts))
        self.shared_experts = nn.ModuleList(make_expert() for _ in range(config.n_shared_experts))
        self.has_sharded_weights = False  # set by the engines of FSDP and ZeRO-3

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (batch, seq, dim) -> (batch, seq, dim), and the balance loss (scalar, fp32).

        token_mask: (batch, seq) bool; False excludes a token from the balance loss, not from the output.
        """
        tokens = x.reshape(-1, x.shape[-1])  # (n, dim)
        # The router runs in fp32: rounding changes the selected experts (Switch Transformer, section 2.4).
        with torch.autocast(x.device.type, enabled=False):
            probabilities = F.linear(tokens.float(), self.gate.weight.float()).softmax(-1)  # (n, experts)
        weights, chosen = probabilities.topk(self.n_active, dim=-1)  # (n, k) each
        weights = weights / weights.sum(-1, keepdim=True)

        tokens = tokens.to(compute_dtype(tokens))  # once, for all experts
        out = (self.run_experts(tokens, chosen) * weights[..., None]).sum(1)  # fp32, as the weights
        for shared in self.shared_experts:
            out = out + shared(tokens)
        return out.to(x.dtype).view_as(x), self.compute_aux_loss(probabilities, chosen, token_mask)

    def run_experts(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """Outputs of the selected experts: tokens (n, dim), chosen (n, k) -> (n, k, dim)."""
        n, k = chosen.shape
        sorted_experts, order = chosen.flatten().sort(stable=True)  # (n k,) each
        numbers = torch.arange(len(self.experts), device=chosen.device)
        ends = torch.searchsorted(sorted_experts, numbers, right=True, out_int32=True)  # (experts,): cumulative counts
        rows = tokens.index_select(0, order // k)
        if self.uses_grouped_mm(rows):
            results = self.grouped_feed_forward(rows, ends)
        else:
            limits = [0, *ends.tolist()]  # the host reads these numbers from the device, and no others
            parts = torch.split(rows, [end - start for start, end in itertools.pairwise(limits)])
            # An expert without tokens runs on zero rows: otherwise its gradient would be missing on this process only.
            results = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(n * k, device=order.device))
        return results.index_select(0, inverse).view(n, k, -1)

    def uses_grouped_mm(self, rows: Tensor) -> bool:
        """Whether `grouped_feed_forward` works for these rows and saves a host read: in bf16, with plain matrices.

        Not on a CPU, where grouped_mm is a loop too, unless torch.compile would break its graph at the host read. Not
        with sharded weights, whose stacked copies would stay in memory until backward.
        """
        has_kernel = torch.compiler.is_compiling() if rows.device.type == "cpu" else rows.device.type != "mps"
        if not (has_kernel and hasattr(F, "grouped_mm") and rows.dtype == torch.bfloat16) or self.has_sharded_weights:
            return False
        matrices = [module for module in self.experts.modules() if isinstance(module, nn.Linear)]  # or LoRALinear
        return all(type(m) is nn.Linear and m.in_features % 8 == m.out_features % 8 == 0 for m in matrices)

    def grouped_feed_forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """The experts on rows (n k, dim) sorted by expert. ends (experts,): int32, the end of each expert's rows."""
        # On sm100 the gradient of an expert without rows may be undefined (pytorch issue 172439); `where` makes it 0.
        has_rows = ends.diff(prepend=ends.new_zeros(1)) > 0

        def product(x: Tensor, name: str) -> Tensor:
            weights = torch.stack([expert.get_parameter(name) for expert in self.experts])  # (experts, out, in)
            weights = weights.to(x.dtype).where(has_rows[:, None, None], 0.0)
            return F.grouped_mm(x, weights.mT, offs=ends)

        hidden = F.silu(product(rows, "gate_proj.weight")) * product(rows, "up_proj.weight")
        return product(hidden, "down_proj.weight")

    def compute_aux_loss(self, probabilities: Tensor, chosen: Tensor, token_mask: Tensor | None) -> Tensor:
        """E * sum_i f_i P_i. probabilities (n, experts), chosen (n, k), token_mask (batch, seq) or None -> scalar."""
        n_experts = probabilities.shape[-1]
        counted = torch.ones_like(probabilities[:, :1])  # (n, 1)
        if token_mask is not None:
            counted = token_mask.reshape(-1, 1).to(probabilities.dtype)
        n = counted.sum().clamp(min=1)
        assignments = torch.zeros_like(probabilities).scatter(1, chosen, 1.0)  # (n, experts)
        assignment_fraction = (assignments * counted).sum(0) / (n * self.n_active)
        mean_probability = (probabilities * counted).sum(0) / n
        return n_experts * (assignment_fraction * mean_probability).sum()
