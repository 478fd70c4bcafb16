"""Converts a mixture of experts to and from GraniteMoeShared, a stock architecture that computes the same.

    here                                             GraniteMoeShared, in the folder's safetensors
    mlp.gate.weight                    (E, dim)      block_sparse_moe.router.layer.weight      (E, dim)
    mlp.experts.{i}.gate_proj, up_proj (ff, dim)     block_sparse_moe.input_linear.weight      (E, 2 ff, dim)
    mlp.experts.{i}.down_proj          (dim, ff)     block_sparse_moe.output_linear.weight     (E, dim, ff)
    mlp.shared_experts.{i}.gate, up                  shared_mlp.input_linear.weight            (2 S ff, dim)
    mlp.shared_experts.{i}.down                      shared_mlp.output_linear.weight           (dim, S ff)

The sum of S shared feed-forwards equals one feed-forward S times as wide, so their matrices are concatenated. Softmax
over the top k logits equals softmax over all logits divided by the sum of its top k: the weights of ../model/moe.py.
Granite's four multipliers are set to values that have no effect.
Source: transformers, models/granitemoeshared and conversion_mapping.py.
Read next: ../model/moe.py, hf_folder.py (reads such a folder), hf_export.py (writes one).
"""

from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig

MODEL_TYPE = "granitemoeshared"
_StateDict = dict[str, Tensor]
_ROUTER, _IN, _OUT, _SHARED_IN, _SHARED_OUT = (
    "block_sparse_moe.router.layer.weight",
    "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.output_linear.weight",
    "shared_mlp.input_linear.weight",
    "shared_mlp.output_linear.weight",
)


def granite_settings(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that only GraniteMoeShared has."""
    return {
        "num_local_experts": config.n_routed_experts,
        "num_experts_per_tok": config.n_active_experts,
        "shared_intermediate_size": config.n_shared_experts * config.hidden_dim,
        "router_aux_loss_coef": config.balance_loss_coef,
        **granite_multipliers(config.head_dim),
    }


def granite_multipliers(head_dim: int) -> dict[str, float]:
    """Granite's multipliers, with the values that make it a plain decoder."""
    return {
        "attention_multiplier": head_dim**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }


def expert_matrices(state: _StateDict, prefix: str, number: int) -> list[Tensor]:
    """The gate, up (number, ff, dim) and down (number, dim, ff) matrices of the experts `prefix`.0, 1, ..."""
    names = [[f"{prefix}.{i}.{part}_proj.weight" for i in range(number)] for part in ("gate", "up", "down")]
    return [torch.stack([state[name] for name in part]) for part in names]


def to_granite(state: _StateDict, config: ModelConfig) -> _StateDict:
    """Convert a state dict to Granite's names and shapes. Attention, norms and embeddings have equal names."""
    theirs = {name: tensor for name, tensor in state.items() if ".mlp." not in name}
    for layer in range(config.n_layers):
        prefix = f"model.layers.{layer}."
        theirs[prefix + _ROUTER] = state[prefix + "mlp.gate.weight"]
        gate, up, down = expert_matrices(state, f"{prefix}mlp.experts", config.n_routed_experts)
        theirs[prefix + _IN] = torch.cat([gate, up], dim=1)
        theirs[prefix + _OUT] = down
        if config.n_shared_experts:
            gate, up, down = expert_matrices(state, f"{prefix}mlp.shared_experts", config.n_shared_experts)
            theirs[prefix + _SHARED_IN] = torch.cat([*gate, *up])
            theirs[prefix + _SHARED_OUT] = torch.cat([*down], dim=1)
    return theirs


def from_granite(state: _StateDict, config: ModelConfig) -> _StateDict:
    """Convert a state dict from Granite's names. A tensor with another shape is left for load_state to report."""
    ours = dict(state)
    width, shared = config.hidden_dim, config.n_shared_experts
    shapes = {
        _ROUTER: (config.n_routed_experts, config.dim),
        _IN: (config.n_routed_experts, 2 * width, config.dim),
        _OUT: (config.n_routed_experts, config.dim, width),
        _SHARED_IN: (2 * shared * width, config.dim),
        _SHARED_OUT: (config.dim, shared * width),
    }
    for layer in range(config.n_layers):
        prefix = f"model.layers.{layer}."
        for name, shape in shapes.items():
            tensor = ours.get(prefix + name)
            if tensor is not None and tuple(tensor.shape) == shape:
                del ours[prefix + name]
                for part, matrix in _split_granite_tensor(name, tensor, shared).items():
                    ours[f"{prefix}mlp.{part}.weight"] = matrix.contiguous()
    return ours


def _split_granite_tensor(name: str, tensor: Tensor, shared: int) -> _StateDict:
    """Split one of Granite's tensors into {our name inside .mlp.: matrix}."""
    if name == _ROUTER:
        return {"gate": tensor}
    if name == _IN:
        gate, up = tensor.chunk(2, dim=1)
        parts = {"gate": [*gate], "up": [*up]}
    elif name == _SHARED_IN:
        matrices = tensor.chunk(2 * shared)
        parts = {"gate": [*matrices[:shared]], "up": [*matrices[shared:]]}
    else:
        parts = {"down": [*tensor] if name == _OUT else [*tensor.chunk(shared, dim=1)]}
    kind = "experts" if name in (_IN, _OUT) else "shared_experts"
    return {f"{kind}.{i}.{part}_proj": matrix for part, found in parts.items() for i, matrix in enumerate(found)}
