"""Mixture-of-experts feed-forward: shared experts process every token, a router selects top-k routed experts per token.

    p        = softmax(router(x))                        over the E routed experts
    out      = sum of shared_i(x) + sum over top-k i of  p_i / (sum of the top-k p) * expert_i(x)
    aux_loss = E * sum_i f_i * P_i                       f_i: fraction of assignments to expert i, P_i: mean of p_i

Shared experts as in DeepSeekMoE (Dai et al. 2024, eq. 9). Load-balancing loss as in Switch Transformer (Fedus et al.
2021, eq. 4): 1 for uniform routing, with a gradient to the router through P. Without it the router collapses to a few
experts.
Read next: transformer.py (DecoderLayer).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig


class MoEFeedForward(nn.Module):
    """Shared experts, and routed experts of which each token uses `n_active_experts`."""

    def __init__(self, config: ModelConfig, make_expert: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.n_active = config.n_active_experts
        self.gate = nn.Linear(config.dim, config.n_routed_experts, bias=False)  # the router
        self.experts = nn.ModuleList(make_expert() for _ in range(config.n_routed_experts))
        self.shared_experts = nn.ModuleList(make_expert() for _ in range(config.n_shared_experts))

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

        out = torch.zeros_like(tokens, dtype=torch.float32)
        for expert_index, expert in enumerate(self.experts):
            rows, slot = (chosen == expert_index).nonzero(as_tuple=True)
            # An expert without tokens runs on zero rows: otherwise its gradient would be missing on this process only.
            result = expert(tokens[rows]).float() * weights[rows, slot, None]
            out = out.index_add(0, rows, result)
        for shared in self.shared_experts:
            out = out + shared(tokens)
        return out.to(x.dtype).view_as(x), self.compute_aux_loss(probabilities, chosen, token_mask)

    def compute_aux_loss(self, probabilities: Tensor, chosen: Tensor, token_mask: Tensor | None) -> Tensor:
        """E * sum_i f_i P_i. probabilities (n, experts), chosen (n, k), token_mask (batch, seq) or None -> scalar."""
        n_experts = probabilities.shape[-1]
        counted = torch.ones_like(probabilities[:, :1])  # (n, 1)
        if token_mask is not None:
            counted = token_mask.reshape(-1, 1).to(probabilities.dtype)
        n = counted.sum().clamp(min=1)
        assignments = F.one_hot(chosen, n_experts).sum(1).to(probabilities.dtype)  # (n, experts)
        assignment_fraction = (assignments * counted).sum(0) / (n * self.n_active)
        mean_probability = (probabilities * counted).sum(0) / n
        return n_experts * (assignment_fraction * mean_probability).sum()
