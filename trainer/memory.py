"""Estimates of parameters, tokens, FLOPs, memory, time and cost of a training run (--plan). Trains nothing.

    FLOPs per token      6 N + 12 layers heads head_dim seq           (PaLM, arXiv:2204.02311, appendix B)
    bytes per parameter  4 weights + 4 gradients + 8 AdamW (or 4 Muon, for the matrices of the layers)
    activations          tensors that autograd saves per layer and token: see `saved_bytes`
    time                 FLOPs / (GPUs x peak FLOP/s x utilisation)
    inference            weights + KV cache of `batch` sequences at full context + CUDA context (0.8 GB)
    int8                 GGUF's q8_0: 34 bytes for 32 weights; the KV cache is fp16, as in llama.cpp

    python 1-pretrain.py --plan --preset xiangxin-3b --tokens_per_param 20
    python 1-pretrain.py --plan --presets mindllm-1.3b,xiangxin-3b --optimizer adamw --batch_size 2

N is the number of parameters that take part in the matrix products of a token. The second command prints a table as in
MindLLM's technical report (arXiv:2310.15777): sizes, memory and GPUs of training and inference, in full and half
precision.
Read next: ../model/config.py (the sizes), ../benchmarks/machines.py (the bottleneck of each machine).
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from common import flag_types
from common.errors import UserError
from model.config import PRESETS, ModelConfig
from model.parameters import count_parameters
from model.tokenizer import load_tokenizer
from trainer.config import PARALLEL_MODES, make_model_config

CUDA_CONTEXT = 0.8e9  # bytes of the CUDA context: MindLLM's two inference figures minus the weights
LOSS_CHUNK = 1024  # positions per chunk of logits (trainer/loss.py)
CPU_BLOCK = 128  # queries per block of the attention on a CPU (model/transformer.py)
USABLE_MEMORY = 0.92  # usable fraction of a GPU's memory; the allocator loses the other part to fragmentation
INFERENCE_FORMATS = {  # bytes per weight, bytes per element of the KV cache
    "fp32": (4, 4),
    "bf16": (2, 2),
    "int8 (GGUF)": (34 / 32, 2),
}
INFERENCE_BATCHES = (1, 8)


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


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("plan (trains nothing)").add_argument
    add("--plan", action="store_true", help="print parameters, tokens, memory, time and cost, and stop")
    add(
        "--presets",
        type=flag_types.non_empty_text,
        metavar="A,B",
        help="with --plan: print a table of these presets with their memory and GPUs instead",
    )
    add("--tokens_per_param", type=flag_types.non_negative_float, default=0.0,
        help="training tokens per parameter; Xiangxin used 20 (0: given by --epochs; with --plan: 20)")  # fmt: skip
    add("--gpu", choices=GPUS, default="h100", help="the GPU of the plan's launch line")
    add("--gpus", type=flag_types.positive_int, default=8, help="number of GPUs")
    add("--utilisation", type=flag_types.positive_fraction, default=0.4,
        help="assumed model FLOPs utilisation (MFU), a fraction of the GPUs' peak")  # fmt: skip
    add("--price_per_hour", type=flag_types.non_negative_float, default=0.0,
        help="price per GPU and hour in US dollars (0: the price in the plan's table)")  # fmt: skip


def steps_for_tokens(tokens_per_param: float, config: ModelConfig, rows_per_step: int) -> int:
    """Return the optimizer steps for `tokens_per_param` training tokens per parameter."""
    return max(1, math.ceil(tokens_per_param * count_parameters(config).total / (rows_per_step * config.max_seq_len)))


def flops_per_token(config: ModelConfig, seq: int) -> float:
    """Return the FLOPs of forward and backward per token in rows of `seq` tokens, without causal savings, as PaLM."""
    return 6 * count_parameters(config).matmul + 12 * config.n_layers * config.n_heads * config.head_dim * seq


def saved_bytes(config: ModelConfig, seq: int, compute_bytes: int, device: str = "cuda") -> float:
    """Return the bytes that autograd saves per token and layer, counted by tensor (tests/trainer/test_memory.py).

    compute_bytes: 4 in fp32, 2 under autocast, where the residual stream and the norms stay in fp32.
    On CUDA, flash attention saves queries, keys, values and output. On a CPU, the project's blockwise attention saves
    for every block of queries the softmax and a copy of its keys and values.
    """
    dim, hidden, b = config.dim, config.hidden_dim, compute_bytes
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    # Two norms save input and output in fp32, under autocast also the low-precision inputs of matrix products; then
    # the queries and the input of o_proj, and with qk_norm queries and keys before and after the norm.
    stream = (24 if b == 4 else 26) * dim + 2 * b * q_dim + (8 * (q_dim + kv_dim) if config.qk_norm else 0)
    if device == "cpu":
        ends = [min(seq, start + CPU_BLOCK) for start in range(0, seq, CPU_BLOCK)]
        scores = sum((end - start) * end for start, end in zip(range(0, seq, CPU_BLOCK), ends, strict=True)) / seq
        attention = b * (scores * config.n_heads + 2 * kv_dim * sum(ends) / seq)
    else:
        attention = b * (q_dim + 2 * kv_dim) + 4 * config.n_heads
    if not config.use_moe:
        return stream + attention + 4 * b * hidden
    active_experts = config.n_shared_experts + config.n_active_experts
    routed = config.n_active_experts * (12 * dim + 32)  # input rows of an expert, its output, the weighted sum
    copies = 4 * dim * config.n_shared_experts if b == 2 else 0  # low-precision inputs of a shared expert's products
    return stream + attention + 4 * b * hidden * active_experts + routed + copies + 8 * config.n_routed_experts


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float  # logits of one chunk, their gradient, and the gradient of the output layer
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
    chunk = min(LOSS_CHUNK, tokens)
    loss = 8 * chunk * config.vocab_size + 4 * config.vocab_size * config.dim
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


def training_seconds(flops: float, gpu: GPU, gpus: int, utilisation: float) -> float:
    return flops / (gpus * gpu.tflops * 1e12 * utilisation)


def implied_utilisation(flops: float, gpu: GPU, gpus: int, days: float) -> float:
    """Return the utilisation, a fraction of the peak, that a published training time implies."""
    return flops / (gpus * gpu.tflops * 1e12 * days * 86_400)


# ---- output of --plan ------------------------------------------------------------------------------------------------
def print_plan(args: argparse.Namespace) -> None:
    """Print the estimates for the run that the flags describe. Raises UserError for flags out of range."""
    if not 0 < args.utilisation <= 1:
        raise UserError(f"--utilisation {args.utilisation}: is above 0 and at most 1")
    if args.gpus < 1 or args.tokens_per_param < 0:
        raise UserError("--gpus is at least 1, --tokens_per_param at least 0")
    console = Console()
    if args.presets:
        configs = {name: preset_config(args, name) for name in parse_preset_names(args.presets)}
        return console.print(sizes_table(args, configs))
    config = preset_config(args, args.preset or "small")
    sizes, per_param = count_parameters(config), args.tokens_per_param or 20.0
    tokens = per_param * sizes.total
    flops = tokens * flops_per_token(config, config.max_seq_len)
    active = f", {sizes.active / 1e6:,.1f} M active" if sizes.active != sizes.total else ""
    console.rule(f"plan: {args.preset or 'small'}")
    for line in (
        f"model        {sizes.total / 1e6:,.1f} M parameters{active}; vocabulary {config.vocab_size:,}, rows of "
        f"{config.max_seq_len:,} tokens",
        f"tokens       {tokens / 1e9:,.3g} G = {per_param:g} x {sizes.total / 1e6:,.1f} M"
        f"{_passes_over_data(args, tokens)}",
        f"FLOPs        {flops:.3g} = tokens x {flops / tokens:.3g} (6 N + 12 layers heads head_dim seq)",
    ):
        console.print(line, highlight=False)
    console.print(_memory_table(args, config))
    console.print(inference_table(config))
    console.print(_time_table(args, flops))
    for line in _launch_lines(args, config, tokens):
        console.print(line, highlight=False, soft_wrap=True)


def preset_config(args: argparse.Namespace, preset: str) -> ModelConfig:
    """Return the preset's config with the flags applied; vocab_size is the preset's, else that of --tokenizer."""
    vocab_size = PRESETS[preset].get("vocab_size", ModelConfig.vocab_size)
    if "vocab_size" not in PRESETS[preset] and Path(args.tokenizer).exists():
        vocab_size = load_tokenizer(args.tokenizer).vocab_size
    return make_model_config(argparse.Namespace(**{**vars(args), "preset": preset}), vocab_size)


def _passes_over_data(args: argparse.Namespace, tokens: float) -> str:
    """Return the number of passes over --data_path that these tokens make, as text."""
    try:
        splits = json.loads((Path(args.data_path) / "meta.json").read_text(encoding="utf-8"))["splits"]
        available = splits["train"]["tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"; no data in {args.data_path} yet"
    return f"; {args.data_path} has {available / 1e9:,.3g} G: {tokens / available:,.1f} passes"


def _memory_table(args: argparse.Namespace, config: ModelConfig) -> Table:
    table = Table(
        "--parallel", "weights", "gradients", "optimizer", "activations", "other", "total",
        "recomp.", title=f"GB per GPU: {args.gpus} GPUs, --batch_size {args.batch_size}, --optimizer "
        f"{args.optimizer}, bf16 products, fp32 states. recomp.: total with --checkpoint_activations",
        box=SIMPLE_HEAD,
    )  # fmt: skip
    for parallel in PARALLEL_MODES:
        needs, recomputed = (
            training_memory(config, args.batch_size, config.max_seq_len, optimizer=args.optimizer, parallel=parallel,
                processes=args.gpus, recompute=recompute)
            for recompute in (False, True)
        )  # fmt: skip
        parts = (needs.weights, needs.gradients, needs.optimizer, needs.activations, needs.loss + needs.other)
        table.add_row(parallel, *(f"{part / 1e9:.2f}" for part in (*parts, needs.total, recomputed.total)))
    return align_numbers_right(table)


def _time_table(args: argparse.Namespace, flops: float) -> Table:
    title = f"{args.gpus} GPUs at {args.utilisation:.0%} of their peak"
    table = Table("GPU", "memory, GB", "peak, TFLOP/s", "GPU hours", "days", "US dollars", title=title, box=SIMPLE_HEAD)
    for gpu in GPUS.values():
        needed = training_seconds(flops, gpu, args.gpus, args.utilisation)
        price = args.price_per_hour or gpu.per_hour
        cost = f"{needed / 3600 * args.gpus * price:,.0f}" if price else "?"
        days = f"{needed / 86_400:,.2f}" if needed < 1000 * 86_400 else f"{needed / 86_400:,.0f}"
        table.add_row(gpu.name, f"{gpu.memory:g}", f"{gpu.tflops:g}", f"{needed / 3600 * args.gpus:,.1f}", days, cost)
    return align_numbers_right(table)


def _launch_lines(args: argparse.Namespace, config: ModelConfig, tokens: float) -> list[str]:
    """Return the command for --gpus x --gpu, with the simplest --parallel that fits into memory."""
    gpu = GPUS[args.gpu]
    for recompute in (False, True):
        for parallel in ("ddp", "fsdp") if args.optimizer == "muon" else PARALLEL_MODES:
            needs = training_memory(
                config, args.batch_size, config.max_seq_len, optimizer=args.optimizer, parallel=parallel,
                processes=args.gpus, recompute=recompute,
            )  # fmt: skip
            if needs.total <= gpu.memory * 1e9 * USABLE_MEMORY:
                flags = f" --preset {args.preset}" if args.preset else ""
                flags += f" --batch_size {args.batch_size} --accumulation_steps {args.accumulation_steps}"
                flags += f" --tokens_per_param {args.tokens_per_param or 20:g}"
                flags += f" --parallel {parallel}" if args.gpus > 1 and parallel != "ddp" else ""
                flags += " --checkpoint_activations" if recompute else ""
                step = args.batch_size * args.accumulation_steps * args.gpus * config.max_seq_len
                start = f"torchrun --nproc_per_node {min(args.gpus, 8)}" if args.gpus > 1 else "python"
                nodes = f" --nnodes {math.ceil(args.gpus / 8)}" if args.gpus > 8 else ""
                return [
                    f"{step:,} tokens per step, {tokens / step:,.0f} steps; on {args.gpus} x {gpu.name}:",
                    f"    {start}{nodes} 1-pretrain.py{flags}",
                ]
    return [
        f"does not fit on {args.gpus} x {gpu.name} with --batch_size {args.batch_size}: use a smaller --batch_size, "
        "more --gpus, or another --gpu"
    ]


def inference_table(config: ModelConfig) -> Table:
    """Return a table of the memory of inference at full context, by number format and batch size."""
    heads = [f"{part},\nbatch {batch}" for batch in INFERENCE_BATCHES for part in ("KV cache", "total")]
    table = Table(
        "inference", "weights", *heads, title=f"GB for inference, {config.max_seq_len:,} tokens each", box=SIMPLE_HEAD
    )
    for name, (weight_bytes, cache_bytes) in INFERENCE_FORMATS.items():
        cells = [count_parameters(config).total * weight_bytes]
        for batch in INFERENCE_BATCHES:
            total = inference_memory(config, weight_bytes, batch * config.max_seq_len, cache_bytes=cache_bytes)
            cells += [total - cells[0] - CUDA_CONTEXT, total]
        table.add_row(name, *(f"{cell / 1e9:.2f}" for cell in cells))
    return align_numbers_right(table)


def sizes_table(args: argparse.Namespace, configs: dict[str, ModelConfig]) -> Table:
    """Return a table of the configs: memory of training and inference on one GPU, and the smallest GPU that fits."""
    table = Table(
        *("model", "size, M", "context", "train\nfp32", "train\nbf16", "GPU", "fp32", "bf16", "int8", "GPU"),
        title=f"GB on one GPU. Training: --batch_size {args.batch_size}, --optimizer {args.optimizer}, fp32 states; "
        "GPU: the smallest for bf16. Inference: one sequence at full context; GPU: the smallest for bf16.",
        box=SIMPLE_HEAD,
    )
    for name, config in configs.items():
        seq = config.max_seq_len
        training = [
            training_memory(config, args.batch_size, seq, optimizer=args.optimizer, compute_bytes=each).total
            for each in (4, 2)
        ]
        answering = [
            inference_memory(config, weight, seq, cache_bytes=cache) for weight, cache in INFERENCE_FORMATS.values()
        ]
        trains, answers = ([f"{need / 1e9:.2f}" for need in needs] for needs in (training, answering))
        size = f"{count_parameters(config).total / 1e6:,.1f}"
        table.add_row(name, size, f"{seq:,}", *trains, smallest_gpu(training[1]), *answers, smallest_gpu(answering[1]))
    return align_numbers_right(table)


def smallest_gpu(needs: float) -> str:
    """Return the name of the GPU with the least memory that fits `needs` bytes, or "none"."""
    by_memory = sorted(GPUS.values(), key=lambda gpu: gpu.memory)
    return next((gpu.name for gpu in by_memory if needs <= gpu.memory * 1e9 * USABLE_MEMORY), "none")


def parse_preset_names(names: str) -> list[str]:
    """Parse a comma-separated list of presets. Raises UserError for an unknown name or an empty list."""
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in PRESETS:
            raise UserError(f"--presets: there is no {name}; choose from {', '.join(PRESETS)}")
    if not found:
        raise UserError(f"--presets is empty: choose from {', '.join(PRESETS)}")
    return found


def align_numbers_right(table: Table) -> Table:
    """Right-align numbers with narrow padding: in a table wider than 80 columns rich would truncate them."""
    table.padding, table.show_edge = (0, 0, 0, 1), False
    for i, column in enumerate(table.columns):
        column.no_wrap = True
        column.justify = "right" if i else "left"
    return table
