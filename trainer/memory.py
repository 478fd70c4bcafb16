"""What a training run will need, on paper: parameters, tokens, FLOPs, memory, time, money. Nothing is trained.

    FLOPs per token      6 N + 12 layers heads head_dim seq           (PaLM, arXiv:2204.02311, appendix B)
    states per parameter 4 weights + 4 gradients + 8 AdamW (or 4 Muon, for the layers' matrices)           bytes
    activations          what autograd keeps per layer and token:  see `saved_bytes`
    time                 FLOPs / (GPUs x peak x utilisation)

    python 1-pretrain.py --plan --preset xiangxin-3b --tokens_per_param 20
    python -m trainer.memory                                   the README's table of what bounds which machine

N: the parameters that a token is multiplied with. Every formula is on this page: any number can be redone by hand.
Read next: plan_report.py (the tables), ../model/config.py (the sizes).
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

from common import cli
from model.config import ModelConfig
from model.parameters import count

CUDA_CONTEXT = 0.8e9  # bytes that CUDA itself takes: what MindLLM's two inference figures leave beside the weights
LOSS_CHUNK = 1024  # positions whose logits exist at one time (trainer/loss.py)
CPU_BLOCK = 128  # queries per block of the attention on a CPU (model/transformer.py)


@dataclass(frozen=True)
class GPU:
    """Peak dense matrix throughput in bf16 (fp16 where there is no bf16) and memory, from NVIDIA's data sheets."""

    name: str
    tflops: float
    memory: float  # GB
    link: float  # GB/s to another GPU of the machine, one way: NVLink, else PCIe
    per_hour: float = 0.0  # US dollars, 0 where nobody we quote names a price


# Prices: H100 from nanochat's README (8 for 24 dollars an hour, 2025); 3090 from minimind's (1.3 yuan an hour, 2024).
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("3090", 71, 24, 16, 0.18),
        GPU("4090", 165, 24, 16),
        GPU("v100", 125, 32, 150),
        GPU("a100", 312, 80, 300),
        GPU("a800", 312, 80, 200),
        GPU("l40s", 362, 48, 32),
        GPU("h100", 989, 80, 450, 3.0),
        GPU("h200", 989, 141, 450),
    )
}


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("plan (trains nothing)").add_argument
    add("--plan", action="store_true", help="print parameters, tokens, memory, time and cost, and stop")
    add(
        "--presets",
        type=cli.some_text,
        metavar="A,B",
        help="with --plan: a table of these presets against memory and hardware instead",
    )
    add("--tokens_per_param", type=cli.non_negative_float, default=0.0,
        help="train on so many tokens per parameter, as Xiangxin: 20 (0: --epochs decide; --plan: 20)")  # fmt: skip
    add("--gpu", choices=GPUS, default="h100", help="the GPU of the plan's launch line")
    add("--gpus", type=cli.positive_int, default=8, help="number of GPUs")
    add("--utilisation", type=cli.positive_fraction, default=0.4,
        help="assumed share of the GPUs' peak FLOPs")  # fmt: skip
    add("--price_per_hour", type=cli.non_negative_float, default=0.0,
        help="of one GPU, in US dollars (0: the price in the plan's table)")  # fmt: skip


def steps_for(tokens_per_param: float, config: ModelConfig, rows_per_step: int) -> int:
    """Optimizer steps that see so many tokens per parameter."""
    return max(1, math.ceil(tokens_per_param * count(config).total / (rows_per_step * config.max_seq_len)))


def flops_per_token(config: ModelConfig, seq: int) -> float:
    """Forward and backward of one token in a row of `seq`. As in PaLM, nothing is taken off for the causal mask."""
    return 6 * count(config).multiplied + 12 * config.n_layers * config.n_heads * config.head_dim * seq


def saved_bytes(config: ModelConfig, seq: int, compute_bytes: int, device: str = "cuda") -> float:
    """What autograd keeps for one token in one layer, in bytes, counted by tensor (tests/trainer/test_memory.py).

    compute_bytes: 4 in fp32, 2 under autocast, where the residual stream and the norms stay in fp32.
    On CUDA flash attention keeps queries, keys, values and the output; on a CPU our own keeps the softmax, block by
    block of queries, with its copy of the keys and values for each block.
    """
    dim, hidden, b = config.dim, config.hidden_dim, compute_bytes
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    # Two norms keep the stream before and after them in fp32, under autocast also the copies that products read; then
    # the queries and what o_proj reads, and with qk_norm queries and keys before and after it.
    stream = (24 if b == 4 else 26) * dim + 2 * b * q_dim + (8 * (q_dim + kv_dim) if config.qk_norm else 0)
    if device == "cpu":
        ends = [min(seq, start + CPU_BLOCK) for start in range(0, seq, CPU_BLOCK)]
        scores = sum((end - start) * end for start, end in zip(range(0, seq, CPU_BLOCK), ends, strict=True)) / seq
        attention = b * (scores * config.n_heads + 2 * kv_dim * sum(ends) / seq)
    else:
        attention = b * (q_dim + 2 * kv_dim) + 4 * config.n_heads
    if not config.use_moe:
        return stream + attention + 4 * b * hidden
    visited = config.n_shared_experts + config.n_active_experts
    routed = config.n_active_experts * (12 * dim + 32)  # rows picked for an expert, its result, the weighted sum
    copies = 4 * dim * config.n_shared_experts if b == 2 else 0  # what a shared expert's two products read
    return stream + attention + 4 * b * hidden * visited + routed + copies + 8 * config.n_routed_experts


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float  # logits of one chunk, their gradient, and the output layer's gradient
    other: float  # low-precision copies of the matrices, communication buffers, what the device itself takes

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
    trained: int | None = None,
) -> Memory:
    """Of one process that trains `rows` rows of `seq` tokens at a time.

    state_bytes: of a weight and of its gradient; ours are fp32 whatever --dtype says. trained: how many parameters move
    (LoRA), None for all. `parallel` and `processes` share the states: zero1 the optimizer's, zero2 also the gradients,
    zero3 and fsdp also the weights, of which two layers are whole at a time.
    """
    sizes = count(config)
    moving = sizes.total if trained is None else trained
    per_state = 8.0
    if optimizer == "muon" and sizes.total:
        per_state = 8.0 - 4.0 * sizes.layer_matrices / sizes.total
    weights, gradients = float(sizes.total * state_bytes[0]), float(moving * state_bytes[1])
    states = moving * per_state
    other = CUDA_CONTEXT if device == "cuda" else 0.0
    if compute_bytes < state_bytes[0]:  # autocast keeps its copies of the matrices until the step ends
        other += compute_bytes * (sizes.layer_matrices / processes if parallel in ("zero3", "fsdp") else sizes.total)
    if processes > 1:
        a_layer = sizes.layer_matrices / config.n_layers
        if parallel == "ddp":
            other += moving * 4  # its buckets: gradients are copied there to be summed
        else:
            states /= processes
        if parallel in ("zero2", "zero3", "fsdp"):
            gradients /= processes
        if parallel in ("zero3", "fsdp"):
            weights = weights / processes + 2 * a_layer * state_bytes[0]
    tokens = rows * seq
    per_layer = saved_bytes(config, seq, compute_bytes, device)
    kept = per_layer * config.n_layers
    if recompute:  # one layer at a time, and the stream between the layers
        kept = per_layer + 4 * config.dim * config.n_layers
    chunk = min(LOSS_CHUNK, tokens)
    loss = 8 * chunk * config.vocab_size + 4 * config.vocab_size * config.dim
    return Memory(weights, gradients, states, tokens * kept, loss, other)


def inference_memory(
    config: ModelConfig, weight_bytes: float, tokens: int, device: str = "cuda", cache_bytes: float = 0
) -> float:
    """Bytes to answer with `tokens` tokens in the KV cache. cache_bytes: of a cached number, 0: as of a weight."""
    kv_dim = config.n_kv_heads * config.head_dim
    cache = 2 * config.n_layers * kv_dim * tokens * (cache_bytes or weight_bytes)
    return count(config).total * weight_bytes + cache + (CUDA_CONTEXT if device == "cuda" else 0.0)


def seconds(flops: float, gpu: GPU, gpus: int, utilisation: float) -> float:
    return flops / (gpus * gpu.tflops * 1e12 * utilisation)


def utilisation_of(flops: float, gpu: GPU, gpus: int, days: float) -> float:
    """The share of the peak that somebody's days imply."""
    return flops / (gpus * gpu.tflops * 1e12 * days * 86_400)


@dataclass(frozen=True)
class Machine:
    name: str
    gpu: GPU
    per_node: int
    nodes: int
    between_nodes: float = 0.0  # GB/s one way for each GPU

    @property
    def gpus(self) -> int:
        return self.per_node * self.nodes

    @property
    def slowest_link(self) -> float:
        return self.between_nodes if self.nodes > 1 else self.gpu.link


MACHINES = (
    Machine("2 x 3090", GPUS["3090"], 2, 1),
    Machine("8 x H100", GPUS["h100"], 8, 1),
    Machine("8 nodes of 8 x H100", GPUS["h100"], 8, 8, 50),  # one 400 Gb/s card for each GPU
)


@dataclass(frozen=True)
class Bound:
    """How a step on a machine spends its time."""

    parallel: str
    rows: int  # per process and forward pass
    memory: float  # bytes
    compute: float  # seconds
    traffic: float  # seconds, if nothing overlapped
    fits: bool

    @property
    def bound_by(self) -> str:
        if not self.fits:
            return "memory"
        return "computing" if self.compute >= self.traffic else "the network"


def traffic_bytes(config: ModelConfig, parallel: str, processes: int) -> float:
    """Bytes that each process sends in one optimizer step. Ring algorithms (ZeRO, arXiv:1910.02054, section 7).

    ddp and zero1, zero2: gradients once reduced, once spread. zero3, fsdp: weights gathered in forward and in backward,
    gradients reduced. All of it in fp32, 4 bytes each.
    """
    each = 8 if parallel in ("ddp", "zero1", "zero2") else 12
    return each * count(config).total * (processes - 1) / processes


def bounds(config: ModelConfig, machine: Machine, step_tokens: float, utilisation: float) -> Bound:
    """The simplest --parallel whose states fit, with as many rows at a time as its memory takes."""
    seq, n = config.max_seq_len, machine.gpus
    room = machine.gpu.memory * 1e9 * 0.92  # the allocator leaves holes
    share = max(1, round(step_tokens / seq / n))  # rows per process and step
    for parallel, recompute in _choices():
        for rows in (row for row in (64, 32, 16, 8, 4, 2, 1) if row <= share):
            memory = training_memory(config, rows, seq, parallel=parallel, processes=n, recompute=recompute).total
            if memory <= room and (rows >= min(4, share) or (parallel, recompute) == ("fsdp", True)):
                compute = share * seq * flops_per_token(config, seq) * (4 / 3 if recompute else 1)
                compute /= machine.gpu.tflops * 1e12 * utilisation
                traffic = traffic_bytes(config, parallel, n) / (machine.slowest_link * 1e9)
                name = parallel + (" + recompute" if recompute else "")
                return Bound(name, rows, memory, compute, traffic, True)
    memory = training_memory(config, 1, seq, parallel="fsdp", processes=n, recompute=True).total
    return Bound("none", 0, memory, 0.0, 0.0, False)


def _choices() -> Iterator[tuple[str, bool]]:
    """From the simplest on."""
    for recompute in (False, True):
        for parallel in ("ddp", "fsdp"):  # those that Muon works with
            yield parallel, recompute


if __name__ == "__main__":
    from trainer.plan_report import machines_table

    machines_table()
