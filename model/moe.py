"""The other feed-forward: many experts, of which each token visits a few.

    p       = softmax(router(x))                        over the routed experts
    out     = sum of the shared experts(x) + sum over the top k of  p_i / (p's of the top k summed) * expert_i(x)
    balance = E * sum_i f_i * P_i                       f_i: share of the visits that went to expert i, P_i: mean of p_i

Shared experts as in DeepSeekMoE (Dai et al. 2024, eq. 9), balance loss as in the Switch Transformer (Fedus et al. 2021,
eq. 4): it is 1 when the visits are spread evenly, and its gradient reaches the router through P. Without it a router
sends everything to a few experts.
Read next: transformer.py (who calls it).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig


class MoEFeedForward(nn.Module):
    """Shared experts that see every token, and a router that sends each token to `n_active_experts` of the others."""

    def __init__(self, config: ModelConfig, make_expert: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.n_active = config.n_active_experts
        self.gate = nn.Linear(config.dim, config.n_routed_experts, bias=False)  # the router
        self.experts = nn.ModuleList(make_expert() for _ in range(config.n_routed_experts))
        self.shared_experts = nn.ModuleList(make_expert() for _ in range(config.n_shared_experts))

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (batch, seq, dim) -> the same shape, and the balance loss (scalar, fp32).

        token_mask: (batch, seq) bool; tokens marked False are computed like the others but do not count in the balance.
        """
        tokens = x.reshape(-1, x.shape[-1])  # (n, dim)
        # The router in fp32: rounding it changes which expert a token visits (Switch Transformer, section 2.4).
        with torch.autocast(x.device.type, enabled=False):
            probabilities = F.linear(tokens.float(), self.gate.weight.float()).softmax(-1)  # (n, experts)
        weights, chosen = probabilities.topk(self.n_active, dim=-1)  # (n, k) each
        weights = weights / weights.sum(-1, keepdim=True)

        out = torch.zeros_like(tokens, dtype=torch.float32)
        for expert_index, expert in enumerate(self.experts):
            rows, slot = (chosen == expert_index).nonzero(as_tuple=True)
            # An expert without tokens runs on zero rows: skipped, its gradient would be missing on this process only.
            result = expert(tokens[rows]).float() * weights[rows, slot, None]
            out = out.index_add(0, rows, result)
        for shared in self.shared_experts:
            out = out + shared(tokens)
        return out.to(x.dtype).view_as(x), self.compute_aux_loss(probabilities, chosen, token_mask)

    def compute_aux_loss(self, probabilities: Tensor, chosen: Tensor, token_mask: Tensor | None) -> Tensor:
        """E * sum_i f_i P_i. probabilities (n, experts), chosen (n, k), token_mask (batch, seq) or None -> scalar."""
        n_experts = probabilities.shape[-1]
        weights_of_tokens = (
            torch.ones_like(probabilities[:, 0])
            if token_mask is None
            else token_mask.reshape(-1).to(probabilities.dtype)
        )
        n = weights_of_tokens.sum().clamp(min=1)
        assignments = F.one_hot(chosen, n_experts).sum(1).to(probabilities.dtype)  # (n, experts)
        assignment_fraction = (assignments * weights_of_tokens[:, None]).sum(0) / (n * self.n_active)
        mean_probability = (probabilities * weights_of_tokens[:, None]).sum(0) / n
        return n_experts * (assignment_fraction * mean_probability).sum()
