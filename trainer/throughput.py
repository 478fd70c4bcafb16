"""FLOPs of training, the peaks of GPUs, and model FLOPs utilisation (MFU).

    FLOPs per token    6 N + 12 layers heads head_dim seq              (PaLM, arXiv:2204.02311, appendix B)
    MFU                tokens per second x FLOPs per token / (processes x peak FLOP/s of a GPU)

N is the number of parameters in the matrix products of a token: of an MoE the selected experts. A product takes 2 FLOPs
per parameter and token forward, 2 for the gradient of its input and 2 for that of its weight; LoRA leaves out the last,
but for its own matrices. Causal attention skips half of its products; as in PaLM that is not counted. Tokens are
those that are not padding.
Read next: plan.py (estimates before a run), metrics.py (the log).
"""

from dataclasses import dataclass

import torch

from model.config import ModelConfig
from model.parameters import count_parameters
from trainer.distributed import DistContext
from trainer.metrics import format_flops
from trainer.stage import Stage


@dataclass(frozen=True)
class GPU:
    """Peak dense throughput in bf16 (fp16 on GPUs without bf16), memory and links, from NVIDIA's data sheets."""

    name: str
    tflops: float  # TFLOP/s
    memory: float  # GB
    link: float  # GB/s to another GPU of the machine, one way: NVLink, else PCIe
    per_hour: float = 0.0  # US dollars; 0: no price known


# Prices: H100 from nanochat's README (8 for 24 dollars/h, 2025); 3090 from minimind's README (1.3 yuan/h, 2024).
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


def flops_per_token(config: ModelConfig, seq: float, trainable: float = float("inf")) -> float:
    """Return the FLOPs of forward and backward per token in rows of `seq` tokens; `trainable`: number of parameters."""
    matmul = count_parameters(config).matmul
    return 4 * matmul + 2 * min(matmul, trainable) + 12 * config.n_layers * config.n_heads * config.head_dim * seq


def stage_flops_per_token(stage: Stage) -> tuple[float, float]:
    """Return the FLOPs per token of a stage, and the mean number of tokens of its rows."""
    config, lengths = stage.model.config, stage.data.lengths()
    seq = config.max_seq_len if lengths is None else float(lengths.mean())
    per_sequence = seq / 2 if stage.loss_unit == "pair" else seq  # a row of pairs is two sequences
    trainable = sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
    return flops_per_token(config, per_sequence, trainable), seq


def peak_flops(dist: DistContext) -> float | None:
    """Return the peak FLOP/s of all processes' GPUs in the dtype of the run, None if it is not known.

    The table has 16-bit peaks of GPUs by name. fp32 runs and CPUs have none: TF32 peaks differ by card, and a CPU's
    speed depends on clocks and other processes, so a peak measured at start would not be one.
    """
    if dist.device.type != "cuda" or dist.dtype == torch.float32:
        return None
    words = torch.cuda.get_device_name(dist.device).lower().replace("-", " ").split()
    found = next((gpu for gpu in GPUS.values() if gpu.name in words), None)
    is_variant = {"pcie", "nvl", "ti", "d", "laptop"} & {*words}  # with other clocks than the card of the table
    return found.tflops * 1e12 * dist.world_size if found and not is_variant else None


class Throughput:
    """Speed of the steps of this process's session: tokens per second of all processes, FLOP/s and MFU."""

    def __init__(self, stage: Stage, dist: DistContext) -> None:
        self.flops_per_token, self.peak = stage_flops_per_token(stage)[0], peak_flops(dist)
        self.tokens = self.seconds = 0.0

    def step_metrics(self, tokens: float, seconds: float) -> dict[str, float]:
        """Count a step and return its speed. MFU only where the peak is known."""
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        return self.metrics(tokens, seconds)

    def metrics(self, tokens: float, seconds: float) -> dict[str, float]:
        flops = self.flops_per_token * tokens / max(seconds, 1e-9)
        return {"tflops": flops / 1e12, **({"mfu": flops / self.peak} if self.peak else {})}

    def summary(self, peak_memory: float) -> str:
        """Return the line at the end of a run. peak_memory: MiB."""
        per_second, minutes = self.tokens / max(self.seconds, 1e-9), self.seconds / 60
        return (
            f"{self.tokens:,.0f} tokens in {minutes:,.1f} minutes, {per_second:,.0f} tok/s, "
            f"{format_flops(self.metrics(self.tokens, self.seconds))}, peak memory {peak_memory / 1024:.1f} GiB"
        )
