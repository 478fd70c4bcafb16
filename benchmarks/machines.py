"""Estimate the bottleneck of a training step on several machines: compute, network or memory. Trains nothing.

    python -m benchmarks.machines                              print the table of docs/planning.md

Read next: ../trainer/memory.py (the formulas).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from model.config import PRESETS, ModelConfig
from model.parameters import count_parameters
from trainer.memory import training_memory
from trainer.throughput import GPU, GPUS, flops_per_token


@dataclass(frozen=True)
class Cluster:
    """One node or several identical nodes, and the bandwidth of their links."""

    name: str
    gpu: GPU
    gpus_per_node: int
    nodes: int
    node_link: float = 0.0  # between nodes, GB/s per GPU in one direction

    @property
    def gpus(self) -> int:
        return self.gpus_per_node * self.nodes

    @property
    def slowest_link(self) -> float:
        return self.node_link if self.nodes > 1 else self.gpu.link


CLUSTERS = (
    Cluster("2 x 3090", GPUS["3090"], 2, 1),
    Cluster("8 x H100", GPUS["h100"], 8, 1),
    Cluster("8 nodes of 8 x H100", GPUS["h100"], 8, 8, 50),  # one 400 Gb/s network card per GPU
)


@dataclass(frozen=True)
class ThroughputBound:
    """Estimated memory and times of one optimizer step."""

    parallel: str
    rows: int  # rows per micro-batch of one process
    memory: float  # bytes per GPU
    compute: float  # seconds
    traffic: float  # seconds of communication, which overlaps with compute
    fits: bool

    @property
    def bound_by(self) -> str:
        if not self.fits:
            return "memory"
        return "compute" if self.compute >= self.traffic else "network"


def traffic_bytes(config: ModelConfig, parallel: str, processes: int) -> float:
    """Return the bytes that each process sends in one optimizer step with ring collectives, in fp32.

    ddp, zero1, zero2: one reduce-scatter of gradients and one all-gather. zero3, fsdp: one all-gather of weights in
    forward, one in backward, one reduce-scatter of gradients. Source: ZeRO, arXiv:1910.02054, section 7.
    """
    bytes_per_parameter = 8 if parallel in ("ddp", "zero1", "zero2") else 12
    return bytes_per_parameter * count_parameters(config).total * (processes - 1) / processes


def throughput_bound(config: ModelConfig, cluster: Cluster, step_tokens: float, utilisation: float) -> ThroughputBound:
    """Return the estimate for the first of _parallel_choices() that fits, with the largest micro-batch that fits.

    Micro-batches smaller than min(4, rows_per_process) are tried with the last choice only.
    """
    seq, n = config.max_seq_len, cluster.gpus
    usable_memory = cluster.gpu.memory * 1e9 * 0.92  # the allocator loses 8 % to fragmentation
    rows_per_process = max(1, round(step_tokens / seq / n))  # per step
    for parallel, recompute in _parallel_choices():
        for rows in (row for row in (64, 32, 16, 8, 4, 2, 1) if row <= rows_per_process):
            memory = training_memory(config, rows, seq, parallel=parallel, processes=n, recompute=recompute).total
            if memory <= usable_memory and (
                rows >= min(4, rows_per_process) or (parallel, recompute) == ("fsdp", True)
            ):
                compute = rows_per_process * seq * flops_per_token(config, seq) * (4 / 3 if recompute else 1)
                compute /= cluster.gpu.tflops * 1e12 * utilisation
                traffic = traffic_bytes(config, parallel, n) / (cluster.slowest_link * 1e9)
                name = parallel + (" + recompute" if recompute else "")
                return ThroughputBound(name, rows, memory, compute, traffic, True)
    memory = training_memory(config, 1, seq, parallel="fsdp", processes=n, recompute=True).total
    return ThroughputBound("none", 0, memory, 0.0, 0.0, False)


def _parallel_choices() -> Iterator[tuple[str, bool]]:
    """Yield (--parallel, recompute), in order of preference. recompute: activation checkpointing."""
    for recompute in (False, True):
        for parallel in ("ddp", "fsdp"):  # the modes that support Muon
            yield parallel, recompute


def print_cluster_table(utilisation: float = 0.4, step_tokens: float = 2**19) -> None:
    """Print the table of presets and machines as markdown. `utilisation`: fraction of peak FLOP/s in compute."""
    print(f"{step_tokens:,.0f} tokens per step, {utilisation:.0%} of peak FLOP/s, bf16 matmuls, Muon.\n")
    print(
        "| model | machine | --parallel | micro-batch | memory, GB | compute | network | bound by | 20 tokens/param |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in ("small", "base", "mindllm-1.3b", "mindllm-3b", "xiangxin-3b"):
        config = ModelConfig(**PRESETS[name])
        parameters = count_parameters(config).total
        for cluster in CLUSTERS:
            bound = throughput_bound(config, cluster, step_tokens, utilisation)
            hours = 20 * parameters / step_tokens * max(bound.compute, bound.traffic) / 3600
            if bound.fits:
                setup = f"{bound.parallel} | {bound.rows} | {bound.memory / 1e9:.1f}"
                duration = f"{hours:,.0f} h" if hours >= 1 else f"{60 * hours:.0f} min"
                times = f"{bound.compute:.3f} s | {bound.traffic:.3f} s | {bound.bound_by} | {duration}"
            else:
                setup, times = f"nothing fits | 1 | {bound.memory / 1e9:.1f}", "| | memory |"
            print(f"| {name}, {parameters / 1e6:,.0f} M | {cluster.name} | {setup} | {times} |")


if __name__ == "__main__":
    print_cluster_table()
