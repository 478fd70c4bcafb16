"""1-pretrain.py --plan: parameters, tokens, FLOPs, memory, time and cost of a training run. Trains nothing.

    FLOPs per token      6 N + 12 layers heads head_dim seq           (throughput.py)
    time                 FLOPs / (GPUs x peak FLOP/s x utilisation)
    inference            weights + KV cache of `batch` sequences at full context + CUDA context (0.8 GB)
    int8                 GGUF's q8_0: 34 bytes for 32 weights; the KV cache is fp16, as in llama.cpp

    python 1-pretrain.py --plan --preset xiangxin-3b --tokens_per_param 20
    python 1-pretrain.py --plan --minutes 180 --gpu 3090 --gpus 1     the size and tokens that suit three hours of a GPU
    python 1-pretrain.py --plan --presets mindllm-1.3b,xiangxin-3b --optimizer adamw --batch_size 2

N is the number of parameters that take part in the matrix products of a token. The last command prints a table as in
MindLLM's technical report (arXiv:2310.15777): sizes, memory and GPUs of training and inference, in full and half
precision.
Read next: memory.py and throughput.py (the estimates), ../benchmarks/machines.py (the bottleneck of each machine).
"""

import dataclasses
import json
import math
import shlex
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from common.errors import UserError, choose_from
from model.config import PRESETS, ModelConfig
from model.parameters import count_parameters
from model.tokenizer import load_tokenizer
from trainer.config import PARALLEL_MODES, PlanConfig
from trainer.dial import Budget, batch_size_for, candidate_sizes, choice_text, choose, law_text
from trainer.memory import CUDA_CONTEXT, inference_memory, training_memory
from trainer.scaling_law import read_law
from trainer.throughput import GPU, GPUS, flops_per_token

USABLE_MEMORY = 0.92  # usable fraction of a GPU's memory; the allocator loses the other part to fragmentation
INFERENCE_FORMATS = {  # bytes per weight, bytes per element of the KV cache
    "fp32": (4, 4),
    "bf16": (2, 2),
    "int8 (GGUF)": (34 / 32, 2),
}
INFERENCE_BATCHES = (1, 8)


def training_seconds(flops: float, gpu: GPU, gpus: int, utilisation: float) -> float:
    return flops / (gpus * gpu.tflops * 1e12 * utilisation)


def implied_utilisation(flops: float, gpu: GPU, gpus: int, days: float) -> float:
    """Return the utilisation, a fraction of the peak, that a published training time implies."""
    return flops / (gpus * gpu.tflops * 1e12 * days * 86_400)


def print_plan(run: PlanConfig) -> None:
    """Print the estimates for the run that the flags describe. Raises UserError for an unknown GPU or preset."""
    if run.gpu not in GPUS:
        raise UserError(f"--gpu {run.gpu}: {choose_from(run.gpu, GPUS)}")
    console = Console()
    if run.presets:
        configs = {name: preset_config(run, name) for name in parse_preset_names(run.presets)}
        return console.print(sizes_table(run, configs))
    if run.minutes:
        return console.print(dial_text(run), highlight=False, soft_wrap=True)
    config = preset_config(run, run.preset or "small")
    sizes, per_param = count_parameters(config), run.tokens_per_param or 20.0
    tokens = per_param * sizes.total
    flops = tokens * flops_per_token(config, config.max_seq_len)
    active = f", {sizes.active / 1e6:,.1f} M active" if sizes.active != sizes.total else ""
    console.rule(f"plan: {run.preset or 'small'}")
    for line in (
        f"model        {sizes.total / 1e6:,.1f} M parameters{active}; vocabulary {config.vocab_size:,}, rows of "
        f"{config.max_seq_len:,} tokens",
        f"tokens       {tokens / 1e9:,.3g} G = {per_param:g} x {sizes.total / 1e6:,.1f} M"
        f"{_passes_over_data(run, tokens)}",
        f"FLOPs        {flops:.3g} = tokens x {flops / tokens:.3g} (6 N + 12 layers heads head_dim seq)",
    ):
        console.print(line, highlight=False)
    console.print(_memory_table(run, config))
    console.print(inference_table(config))
    console.print(_time_table(run, flops))
    for line in _launch_lines(run, config, tokens):
        console.print(line, highlight=False, soft_wrap=True)


def dial_text(run: PlanConfig) -> str:
    """Return the choice of --minutes for the GPUs of the flags at --utilisation. Data is assumed to be plenty."""
    gpu, law = GPUS[run.gpu], read_law()
    budget = Budget(60 * run.minutes, {"data": (1.0, 10**15)}, 1, run, run.gpus)

    def step_seconds(size: ModelConfig) -> float:
        flops = budget.step_tokens(size) * flops_per_token(size, size.max_seq_len)
        return training_seconds(flops, gpu, run.gpus, run.utilisation)

    def memory(size: ModelConfig) -> float:
        rows, seq = batch_size_for(run, size), size.max_seq_len
        return training_memory(size, rows, seq, optimizer=run.optimizer, processes=run.gpus).total

    sizes = candidate_sizes(run, ModelConfig.vocab_size)
    fitting = [size for size in sizes if memory(size) <= gpu.memory * 1e9 * USABLE_MEMORY]
    choice = choose(fitting or sizes[:1], step_seconds, budget, law)
    where = f"{run.gpus} x {gpu.name} at {run.utilisation:.0%} of the peak"
    return f"{run.minutes:g} minutes on {where}: {choice_text(choice)}\n{law_text(choice, law)}"


def preset_config(run: PlanConfig, preset: str) -> ModelConfig:
    """Return the preset's config with the flags applied; vocab_size is the preset's, else that of --tokenizer."""
    vocab_size = PRESETS[preset].get("vocab_size", ModelConfig.vocab_size)
    if "vocab_size" not in PRESETS[preset] and Path(run.tokenizer).exists():
        vocab_size = load_tokenizer(run.tokenizer).vocab_size
    return run.model_config(vocab_size, preset)


def _passes_over_data(run: PlanConfig, tokens: float) -> str:
    """Return the number of passes over --data_path that these tokens make, as text."""
    try:
        splits = json.loads((Path(run.data_path) / "meta.json").read_text(encoding="utf-8"))["splits"]
        available = splits["train"]["tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"; no data in {run.data_path} yet"
    return f"; {run.data_path} has {available / 1e9:,.3g} G: {tokens / available:,.1f} passes"


def parallel_modes(run: PlanConfig) -> tuple[str, ...]:
    """Return the values of --parallel that a training with these flags accepts (TrainConfig.check)."""
    if run.gpus == 1:
        return ("ddp",)
    has_zero = run.optimizer != "muon" and run.compile != "on" and run.dtype != "float16"
    return PARALLEL_MODES if has_zero else ("ddp", "fsdp")


def _memory_table(run: PlanConfig, config: ModelConfig) -> Table:
    table = Table(
        "--parallel", "weights", "gradients", "optimizer", "activations", "other", "total",
        "recomp.", title=f"GB per GPU: {run.gpus} GPUs, --batch_size {run.batch_size}, --optimizer "
        f"{run.optimizer}, bf16 products, fp32 states. recomp.: total with --checkpoint_activations",
        box=SIMPLE_HEAD,
    )  # fmt: skip
    for parallel in parallel_modes(run):
        needs, recomputed = (
            training_memory(config, run.batch_size, config.max_seq_len, optimizer=run.optimizer, parallel=parallel,
                processes=run.gpus, recompute=recompute)
            for recompute in (False, True)
        )  # fmt: skip
        parts = (needs.weights, needs.gradients, needs.optimizer, needs.activations, needs.loss + needs.other)
        table.add_row(parallel, *(f"{part / 1e9:.2f}" for part in (*parts, needs.total, recomputed.total)))
    return align_numbers_right(table)


def _time_table(run: PlanConfig, flops: float) -> Table:
    title = f"{run.gpus} GPUs at {run.utilisation:.0%} of their peak"
    caption = None if run.price_per_hour else "–: no price is known, --price_per_hour sets one"
    table = Table("GPU", "memory, GB", "peak, TFLOP/s", "GPU hours", "days", "US dollars", title=title, caption=caption,
                  box=SIMPLE_HEAD)  # fmt: skip
    for gpu in GPUS.values():
        needed = training_seconds(flops, gpu, run.gpus, run.utilisation)
        price = run.price_per_hour or gpu.per_hour
        hours = needed / 3600 * run.gpus
        cost = _short(hours * price) if price else "–"
        table.add_row(gpu.name, f"{gpu.memory:g}", f"{gpu.tflops:g}", _short(hours), _short(needed / 86_400), cost)
    return align_numbers_right(table)


def _short(number: float) -> str:
    """Two digits of a number below 10, the whole ones of a larger: 0.0024, 3.1, 12,345."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _launch_lines(run: PlanConfig, config: ModelConfig, tokens: float) -> list[str]:
    """Return the command for --gpus x --gpu, with the simplest --parallel that fits into memory."""
    gpu = GPUS[run.gpu]
    rows = run.global_batch_size or run.batch_size * run.accumulation_steps * run.gpus
    for recompute in (False, True):
        for parallel in parallel_modes(run):
            needs = training_memory(
                config, run.batch_size, config.max_seq_len, optimizer=run.optimizer, parallel=parallel,
                processes=run.gpus, recompute=recompute,
            )  # fmt: skip
            if needs.total <= gpu.memory * 1e9 * USABLE_MEMORY:
                flags = f" --preset {run.preset}" if run.preset else ""
                flags += f" --batch_size {run.batch_size} --global_batch_size {rows}"
                flags += f" --tokens_per_param {run.tokens_per_param or 20:g}"
                flags += f" --parallel {parallel}" if run.gpus > 1 and parallel != "ddp" else ""
                flags += " --checkpoint_activations" if recompute else ""
                flags += _given_flags(run)
                step = rows * config.max_seq_len
                start = f"torchrun --nproc_per_node {min(run.gpus, 8)}" if run.gpus > 1 else "python"
                nodes = f" --nnodes {math.ceil(run.gpus / 8)}" if run.gpus > 8 else ""
                return [
                    f"{step:,} tokens per step, {tokens / step:,.0f} steps; on {run.gpus} x {gpu.name}:",
                    f"    {start}{nodes} 1-pretrain.py{flags}",
                ]
    return [
        f"does not fit on {run.gpus} x {gpu.name} with --batch_size {run.batch_size}: use a smaller --batch_size, "
        "more --gpus, or another --gpu"
    ]


def _given_flags(run: PlanConfig) -> str:
    """Return the flags of the model, its data and its optimizer that differ from their defaults."""
    fields = {field.name: field.default for field in dataclasses.fields(run)}
    given = {name: getattr(run, name) for name in ("tokenizer", "data_path", "optimizer")}
    given = {name: value for name, value in given.items() if value != fields[name]} | run.model
    return "".join(f" --{name} {shlex.quote(str(value))}" for name, value in given.items())


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


def sizes_table(run: PlanConfig, configs: dict[str, ModelConfig]) -> Table:
    """Return a table of the configs: memory of training and inference on one GPU, and the smallest GPU that fits."""
    table = Table(
        *("model", "size, M", "context", "train\nfp32", "train\nbf16", "GPU", "fp32", "bf16", "int8", "GPU"),
        title=f"GB on one GPU. Training: --batch_size {run.batch_size}, --optimizer {run.optimizer}, fp32 states; "
        "GPU: the smallest for bf16. Inference: one sequence at full context; GPU: the smallest for bf16.",
        box=SIMPLE_HEAD,
    )
    for name, config in configs.items():
        seq = config.max_seq_len
        training = [
            training_memory(config, run.batch_size, seq, optimizer=run.optimizer, compute_bytes=each).total
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
            raise UserError(f"--presets: there is no {name}; {choose_from(name, PRESETS)}")
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
