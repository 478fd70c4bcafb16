"""What `1-pretrain.py --plan` prints: the formulas of memory.py for the model, the data and the machines asked about.

Read next: memory.py (the formulas).
"""

import argparse
import json
import math
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from common.errors import UserError
from model.config import PRESETS, ModelConfig
from model.tokenizer import load_tokenizer
from trainer.config import PARALLEL, model_config
from trainer.memory import (
    GPUS,
    MACHINES,
    bounds,
    count,
    flops_per_token,
    seconds,
    training_memory,
)
from trainer.plan_inference import FITS, inference_table, named_presets, numbers_right, sizes_table


def print_plan(args: argparse.Namespace) -> None:
    """Everything about the run that 1-pretrain.py's flags describe. Raises UserError for numbers that make no sense."""
    if not 0 < args.utilisation <= 1:
        raise UserError(f"--utilisation {args.utilisation}: is above 0 and at most 1")
    if args.gpus < 1 or args.tokens_per_param < 0:
        raise UserError("--gpus is at least 1, --tokens_per_param at least 0")
    console = Console()
    if args.presets:
        configs = {name: preset_config(args, name) for name in named_presets(args.presets)}
        return console.print(sizes_table(args, configs))
    config = preset_config(args, args.preset or "small")
    sizes, per_param = count(config), args.tokens_per_param or 20.0
    tokens = per_param * sizes.total
    flops = tokens * flops_per_token(config, config.max_seq_len)
    active = f", {sizes.active / 1e6:,.1f} M active" if sizes.active != sizes.total else ""
    console.rule(f"plan: {args.preset or 'small'}")
    for line in (
        f"model        {sizes.total / 1e6:,.1f} M parameters{active}; vocabulary {config.vocab_size:,}, rows of "
        f"{config.max_seq_len:,} tokens",
        f"tokens       {tokens / 1e9:,.3g} G = {per_param:g} x {sizes.total / 1e6:,.1f} M{_on_disk(args, tokens)}",
        f"FLOPs        {flops:.3g} = tokens x {flops / tokens:.3g} (6 N + 12 layers heads head_dim seq)",
    ):
        console.print(line, highlight=False)
    console.print(_memory_table(args, config))
    console.print(inference_table(config))
    console.print(_time_table(args, flops))
    for line in _launch(args, config, tokens):
        console.print(line, highlight=False, soft_wrap=True)


def preset_config(args: argparse.Namespace, preset: str) -> ModelConfig:
    """The preset with the flags that were given; the vocabulary is the tokenizer's unless the preset has its own."""
    vocab_size = PRESETS[preset].get("vocab_size", ModelConfig.vocab_size)
    if "vocab_size" not in PRESETS[preset] and Path(args.tokenizer).exists():
        vocab_size = load_tokenizer(args.tokenizer).vocab_size
    return model_config(argparse.Namespace(**{**vars(args), "preset": preset}), vocab_size)


def _on_disk(args: argparse.Namespace, tokens: float) -> str:
    """How that compares with the data that is there."""
    try:
        splits = json.loads((Path(args.data_path) / "meta.json").read_text(encoding="utf-8"))["splits"]
        there = splits["train"]["tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"; no data in {args.data_path} yet"
    return f"; {args.data_path} has {there / 1e9:,.3g} G: {tokens / there:,.1f} passes"


def _memory_table(args: argparse.Namespace, config: ModelConfig) -> Table:
    table = Table(
        "--parallel", "weights", "gradients", "optimizer", "activations", "other", "total",
        "recomp.", title=f"GB per GPU: {args.gpus} GPUs, --batch_size {args.batch_size}, --optimizer "
        f"{args.optimizer}, bf16 products, fp32 states. recomp.: total with --checkpoint_activations",
        box=SIMPLE_HEAD,
    )  # fmt: skip
    for parallel in PARALLEL:
        needs, recomputed = (
            training_memory(config, args.batch_size, config.max_seq_len, optimizer=args.optimizer, parallel=parallel,
                processes=args.gpus, recompute=recompute)
            for recompute in (False, True)
        )  # fmt: skip
        parts = (needs.weights, needs.gradients, needs.optimizer, needs.activations, needs.loss + needs.other)
        table.add_row(parallel, *(f"{part / 1e9:.2f}" for part in (*parts, needs.total, recomputed.total)))
    return numbers_right(table)


def _time_table(args: argparse.Namespace, flops: float) -> Table:
    title = f"{args.gpus} GPUs at {args.utilisation:.0%} of their peak"
    table = Table("GPU", "memory, GB", "peak, TFLOP/s", "GPU hours", "days", "US dollars", title=title, box=SIMPLE_HEAD)
    for gpu in GPUS.values():
        taken = seconds(flops, gpu, args.gpus, args.utilisation)
        price = args.price_per_hour or gpu.per_hour
        cost = f"{taken / 3600 * args.gpus * price:,.0f}" if price else "?"
        days = f"{taken / 86_400:,.2f}" if taken < 1000 * 86_400 else f"{taken / 86_400:,.0f}"
        table.add_row(gpu.name, f"{gpu.memory:g}", f"{gpu.tflops:g}", f"{taken / 3600 * args.gpus:,.1f}", days, cost)
    return numbers_right(table)


def _launch(args: argparse.Namespace, config: ModelConfig, tokens: float) -> list[str]:
    """The line to type on the machine that was asked about, with the simplest --parallel that fits."""
    gpu = GPUS[args.gpu]
    for recompute in (False, True):
        for parallel in ("ddp", "fsdp") if args.optimizer == "muon" else PARALLEL:
            needs = training_memory(
                config, args.batch_size, config.max_seq_len, optimizer=args.optimizer, parallel=parallel,
                processes=args.gpus, recompute=recompute,
            )  # fmt: skip
            if needs.total <= gpu.memory * 1e9 * FITS:
                flags = f" --preset {args.preset}" if args.preset else ""
                flags += f" --batch_size {args.batch_size} --accumulation_steps {args.accumulation_steps}"
                flags += f" --tokens_per_param {args.tokens_per_param or 20:g}"
                flags += f" --parallel {parallel}" if args.gpus > 1 and parallel != "ddp" else ""
                flags += " --checkpoint_activations" if recompute else ""
                step = args.batch_size * args.accumulation_steps * args.gpus * config.max_seq_len
                start = f"torchrun --nproc_per_node {min(args.gpus, 8)}" if args.gpus > 1 else "python"
                nodes = f" --nnodes {math.ceil(args.gpus / 8)}" if args.gpus > 8 else ""
                return [
                    f"{step:,} tokens a step, {tokens / step:,.0f} steps; on {args.gpus} x {gpu.name}:",
                    f"    {start}{nodes} 1-pretrain.py{flags}",
                ]
    return [
        f"does not fit on {args.gpus} x {gpu.name} with --batch_size {args.batch_size}: a smaller --batch_size, "
        "more --gpus, or another --gpu"
    ]


def machines_table(utilisation: float = 0.4, step_tokens: float = 2**19) -> None:
    """What bounds which machine, for the presets, as markdown."""
    print(f"{step_tokens:,.0f} tokens a step, {utilisation:.0%} of the peak while computing, bf16 products, Muon.\n")
    print("| model | machine | take | rows at a time | memory, GB | computing | network | bound by | 20 tokens/param |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in ("small", "base", "mindllm-1.3b", "mindllm-3b", "xiangxin-3b"):
        config = ModelConfig(**PRESETS[name])
        sizes = count(config)
        for machine in MACHINES:
            found = bounds(config, machine, step_tokens, utilisation)
            hours = 20 * sizes.total / step_tokens * max(found.compute, found.traffic) / 3600
            if found.fits:
                how = f"{found.parallel} | {found.rows} | {found.memory / 1e9:.1f}"
                whole = f"{hours:,.0f} h" if hours >= 1 else f"{60 * hours:.0f} min"
                spent = f"{found.compute:.3f} s | {found.traffic:.3f} s | {found.bound_by} | {whole}"
            else:
                how, spent = f"nothing fits | 1 | {found.memory / 1e9:.1f}", "| | memory |"
            print(f"| {name}, {sizes.total / 1e6:,.0f} M | {machine.name} | {how} | {spent} |")
