"""Parameter counts of a config by formula, without building a model or importing torch.

Equal to Transformer.count_parameters (tests/trainer/test_memory.py). Read next: config.py, ../trainer/memory.py.
"""

from dataclasses import dataclass

from model.config import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    total: int
    active: int  # used per token: without the unselected experts of an MoE
    layer_matrices: int  # attention and feed-forward matrices, which Muon optimizes
    matmul: int  # active parameters in matrix products: no norms, the embedding only as a tied output layer


def count_parameters(config: ModelConfig) -> ParameterCount:
    """The parameter counts of a model with this config."""
    dim, hidden, layers = config.dim, config.hidden_dim, config.n_layers
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attention = 2 * dim * q_dim + 2 * dim * kv_dim
    norms = 2 * dim + (2 * config.head_dim if config.qk_norm else 0) + (q_dim + 2 * kv_dim if config.qkv_bias else 0)
    router = dim * config.n_routed_experts if config.use_moe else 0
    expert = 3 * dim * hidden
    experts, active_experts = 1, 1
    if config.use_moe:
        experts = config.n_shared_experts + config.n_routed_experts
        active_experts = config.n_shared_experts + config.n_active_experts
    embeddings = config.vocab_size * dim * (1 if config.tie_embeddings else 2)
    total = layers * (attention + norms + router + experts * expert) + embeddings + dim
    active = total - layers * (experts - active_experts) * expert
    matmul = layers * (attention + router + active_experts * expert) + config.vocab_size * dim
    return ParameterCount(total, active, layers * (attention + experts * expert), matmul)
