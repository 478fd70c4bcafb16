"""Estimates of the memory of a training process and of inference. Trains nothing.

    bytes per parameter  4 weights + 4 gradients + 8 AdamW (or 4 Muon, for the matrices of the layers)
    activations          tensors that autograd saves per layer and token: see `saved_bytes`
    inference            weights + KV cache + CUDA context (0.8 GB)

Read next: plan.py (tokens, time and cost), ../model/config.py (the sizes).
"""

import math
import os
from dataclasses import dataclass

from common.errors import UserError
from model.config import ModelConfig
from model.parameters import count_parameters

CUDA_CONTEXT = 0.8e9  # bytes of the CUDA context: MindLLM's two inference figures minus the weights
# Positions per chunk of logits on a CPU; on a GPU, above this number of logits of a micro-batch (trainer/loss.py).
LOSS_CHUNK, GPU_LOSS_CHUNK, GPU_FULL_LOGITS = 1024, 4096, 2**29
CPU_BLOCK = 128  # queries per block of the attention on a CPU (model/transformer.py)


def saved_bytes(config: ModelConfig, seq: int, compute_bytes: int, device: str = "cuda") -> float:
    """Return the bytes that autograd saves per token and layer, counted by tensor (tests/trainer/test_memory.py).

    compute_bytes: 4 in fp32, 2 under autocast, where the residual stream and the norms stay in fp32.
    Flash attention saves queries, keys, values and output. On a CPU in 16 bits, the project's blockwise attention saves
    for every block of queries the softmax and a copy of its keys and values. model/cpu_ops.py lists what is recomputed.
    """
    dim, hidden, b = config.dim, config.hidden_dim, compute_bytes
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    if device == "cpu":  # two norms save their inputs and 1 / rms in fp32; then the products' inputs and the queries
        stream = (8 + 2 * b) * dim + 8 + 2 * b * q_dim
        per_head = (1 if b == 4 else 2) * config.head_dim + 1  # in 16 bits torch's norm saves inputs and outputs
        stream += 4 * (config.n_heads + config.n_kv_heads) * per_head if config.qk_norm else 0
        feed_forward = 2 * b * hidden
    else:
        # Two norms save input and output in fp32, under autocast also the low-precision inputs of matrix products; then
        # the queries and the input of o_proj, and with qk_norm queries and keys before and after the norm.
        stream = (24 if b == 4 else 26) * dim + 2 * b * q_dim + (8 * (q_dim + kv_dim) if config.qk_norm else 0)
        feed_forward = 4 * b * hidden
    if device == "cpu" and b == 2:
        ends = [min(seq, start + CPU_BLOCK) for start in range(0, seq, CPU_BLOCK)]
        scores = sum((end - start) * end for start, end in zip(range(0, seq, CPU_BLOCK), ends, strict=True)) / seq
        attention = b * (scores * config.n_heads + 2 * kv_dim * sum(ends) / seq)
    else:
        attention = b * 2 * kv_dim + 4 * config.n_heads + (b * q_dim if device != "cpu" else 0)
    if not config.use_moe:
        return stream + attention + feed_forward
    active_experts = config.n_shared_experts + config.n_active_experts
    routed = config.n_active_experts * (2 * b * dim + 28)  # input rows of an expert, its output, indices and weights
    copies = (4 if config.n_shared_experts else 2) * dim if b == 2 else 0  # the router's input in fp32
    return stream + attention + feed_forward * active_experts + routed + copies + 8 * config.n_routed_experts


def logits_memory(tokens: int, vocab_size: int, compute_bytes: int, device: str) -> float:
    """Return the bytes of logits and their gradient that exist at once, in a micro-batch of `tokens`.

    A CPU overwrites them in place, in 16 bits with a copy of either. A GPU keeps the logits in the compute dtype and in
    fp32 and their log-softmax.
    """
    low_bytes = compute_bytes if compute_bytes < 4 else 0
    if device == "cpu":
        return min(tokens, LOSS_CHUNK) * vocab_size * (4 + 2 * low_bytes)
    positions = tokens if tokens * vocab_size <= GPU_FULL_LOGITS else min(tokens, GPU_LOSS_CHUNK)
    return positions * vocab_size * (8 + low_bytes)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float  # logits that exist at once, their gradient, and the gradient of the output layer
    other: float  # low-precision copies of the matrices, communication buffers, CUDA context

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss + self.other


def training_memory(
    config: ModelConfig,
    rows: int,
    seq: int,
    *,
    optimizer: str = "muon",
    compute_bytes: int = 2,
    state_bytes: tuple[int, int] = (4, 4),
    parallel: str = "ddp",
    processes: int = 1,
    recompute: bool = False,
    device: str = "cuda",
    num_trainable: int | None = None,
) -> MemoryEstimate:
    """Return the memory of one process that trains micro-batches of (rows, seq).

    state_bytes: bytes per weight and per gradient; this project always uses fp32. num_trainable: number of trainable
    parameters (LoRA), None for all. With several processes zero1 shards the optimizer state, zero2 also the gradients,
    zero3 and fsdp also the weights, of which two layers are gathered at a time.
    """
    sizes = count_parameters(config)
    trainable = sizes.total if num_trainable is None else num_trainable
    per_state = 8.0
    if optimizer == "muon" and sizes.total:
        per_state = 8.0 - 4.0 * sizes.layer_matrices / sizes.total
    weights, gradients = float(sizes.total * state_bytes[0]), float(trainable * state_bytes[1])
    states = trainable * per_state
    other = CUDA_CONTEXT if device == "cuda" else 0.0
    if compute_bytes < state_bytes[0]:  # autocast caches low-precision copies of the matrices until the step ends
        other += compute_bytes * (sizes.layer_matrices / processes if parallel in ("zero3", "fsdp") else sizes.total)
    if processes > 1:
        a_layer = sizes.layer_matrices / config.n_layers
        if parallel == "ddp":
            other += trainable * 4  # DDP's buckets for the all-reduce of gradients
        else:
            states /= processes
        if parallel in ("zero2", "zero3", "fsdp"):
            gradients /= processes
        if parallel in ("zero3", "fsdp"):
            weights = weights / processes + 2 * a_layer * state_bytes[0]
    tokens = rows * seq
    per_layer = saved_bytes(config, seq, compute_bytes, device)
    kept = per_layer * config.n_layers
    if recompute:  # the activations of one layer, and the residual stream between all layers
        kept = per_layer + 4 * config.dim * config.n_layers
    loss = logits_memory(tokens, config.vocab_size, compute_bytes, device) + 4 * config.vocab_size * config.dim
    return MemoryEstimate(weights, gradients, states, tokens * kept, loss, other)


def inference_memory(
    config: ModelConfig, weight_bytes: float, tokens: int, device: str = "cuda", cache_bytes: float = 0
) -> float:
    """Return the bytes for inference with `tokens` tokens in the KV cache.

    cache_bytes: bytes per element of the cache (0: weight_bytes).
    """
    kv_dim = config.n_kv_heads * config.head_dim
    cache = 2 * config.n_layers * kv_dim * tokens * (cache_bytes or weight_bytes)
    return count_parameters(config).total * weight_bytes + cache + (CUDA_CONTEXT if device == "cuda" else 0.0)


def check_memory(config: ModelConfig) -> None:
    """Raise UserError if the weights alone need more than the machine's memory. Called before they are allocated."""
    needed, available = 4 * count_parameters(config).total, machine_memory()
    if needed > available:
        raise UserError(
            f"the weights take {needed / 1e9:,.1f} GB in fp32, this machine has {available / 1e9:,.1f} GB of memory: "
            "choose a smaller --preset, --dim or --n_layers (--plan prints the memory of a run)"
        )


def machine_memory() -> float:
    """Return the bytes of main memory, or infinity where the system does not report them (Windows)."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return math.inf
