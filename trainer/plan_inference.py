"""Memory for inference, on paper: weights and KV cache; and several model sizes in one table.

    total = weights + KV cache of `batch` answers at full context + what CUDA itself takes (0.8 GB)
    int8  = GGUF's q8_0: 34 bytes for 32 weights; its KV cache is fp16, as llama.cpp keeps it

    python 1-pretrain.py --plan --presets mindllm-1.3b,xiangxin-3b --optimizer adamw --batch_size 2

The second command prints sizes against memory and hardware as MindLLM's technical report (arXiv:2310.15777) publishes
them: training and inference in full and in half precision.
Called by plan_report.py. Read next: memory.py (the formulas).
"""

import argparse

from rich.box import SIMPLE_HEAD
from rich.table import Table

from common.errors import UserError
from model.config import PRESETS, ModelConfig
from trainer.memory import CUDA_CONTEXT, GPUS, count, inference_memory, training_memory

FITS = 0.92  # share of a GPU's memory that can be used: the allocator leaves holes
FORMATS = {"fp32": (4, 4), "bf16": (2, 2), "int8 (GGUF)": (34 / 32, 2)}  # bytes of a weight, of a cached number
BATCHES = (1, 8)


def inference_table(config: ModelConfig) -> Table:
    """GB to answer at full context, by number format and batch size."""
    heads = [f"{part},\nbatch {batch}" for batch in BATCHES for part in ("KV cache", "total")]
    table = Table(
        "inference", "weights", *heads, title=f"GB to answer, {config.max_seq_len:,} tokens each", box=SIMPLE_HEAD
    )
    for name, (weight_bytes, cache_bytes) in FORMATS.items():
        cells = [count(config).total * weight_bytes]
        for batch in BATCHES:
            total = inference_memory(config, weight_bytes, batch * config.max_seq_len, cache_bytes=cache_bytes)
            cells += [total - cells[0] - CUDA_CONTEXT, total]
        table.add_row(name, *(f"{cell / 1e9:.2f}" for cell in cells))
    return numbers_right(table)


def sizes_table(args: argparse.Namespace, configs: dict[str, ModelConfig]) -> Table:
    """Model sizes against the memory of one GPU that trains or answers, and the smallest GPU that has so much."""
    table = Table(
        *("model", "size, M", "context", "train\nfp32", "train\nbf16", "GPU", "fp32", "bf16", "int8", "GPU"),
        title=f"GB on one GPU. Training: --batch_size {args.batch_size}, --optimizer {args.optimizer}, fp32 states; "
        "GPU: the smallest for bf16. Then inference: one answer at full context; GPU: the smallest for bf16.",
        box=SIMPLE_HEAD,
    )
    for name, config in configs.items():
        seq = config.max_seq_len
        training = [
            training_memory(config, args.batch_size, seq, optimizer=args.optimizer, compute_bytes=each).total
            for each in (4, 2)
        ]
        answering = [inference_memory(config, weight, seq, cache_bytes=cache) for weight, cache in FORMATS.values()]
        trains, answers = ([f"{need / 1e9:.2f}" for need in needs] for needs in (training, answering))
        size = f"{count(config).total / 1e6:,.1f}"
        table.add_row(name, size, f"{seq:,}", *trains, smallest_gpu(training[1]), *answers, smallest_gpu(answering[1]))
    return numbers_right(table)


def smallest_gpu(needs: float) -> str:
    """The GPU of the plan's table with the least memory that has so many bytes; "none" where none has."""
    by_memory = sorted(GPUS.values(), key=lambda gpu: gpu.memory)
    return next((gpu.name for gpu in by_memory if needs <= gpu.memory * 1e9 * FITS), "none")


def named_presets(names: str) -> list[str]:
    """The presets of a list with commas. Raises UserError for a name that is none."""
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in PRESETS:
            raise UserError(f"--presets: there is no {name}; choose from {', '.join(PRESETS)}")
    if not found:
        raise UserError(f"--presets is empty: choose from {', '.join(PRESETS)}")
    return found


def numbers_right(table: Table) -> Table:
    """Numbers stand on the right and close together: rich would cut those of a table wider than 80 columns."""
    table.padding, table.show_edge = (0, 0, 0, 1), False
    for i, column in enumerate(table.columns):
        column.no_wrap = True
        column.justify = "right" if i else "left"
    return table
