"""--explain: what a training script would do in its first step. Prints it and trains nothing.

    the first batch     its rows as text, the trained tokens marked
    shapes              the output of every module, recorded by forward hooks during one forward pass
    parameters          by part of the model, and how many of them train
    one step            FLOPs, memory and seconds, measured by training steps of a copy of the model

Writes no file and leaves the model as it is.
Read next: loop.py (`train_step`, which is measured), throughput.py and memory.py (the formulas).
"""

import copy
import dataclasses
import re
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from corpus.preview import print_document
from model.transformer import Transformer
from trainer.config import TrainConfig
from trainer.datasets import Batch, MicroBatches, to_device
from trainer.distributed import DistContext, PendingSums
from trainer.engine import Engine
from trainer.loss import IGNORE_INDEX, token_log_probs
from trainer.memory import training_memory
from trainer.metrics import peak_memory_mb
from trainer.run import start_step
from trainer.stage import Stage
from trainer.startup import make_engine
from trainer.throughput import stage_flops_per_token
from trainer.timer import TrainingTimer
from trainer.train_state import micro_batch_size, resolve_global_batch_size

MakeBatches = Callable[[Engine, np.ndarray], list[Batch]]
TrainStep = Callable[[Engine, list[Batch]], PendingSums]  # that of loop.py
ROWS_SHOWN, TOKENS_SHOWN = 2, 160
TIMED_STEPS = 3  # after one that is not measured: it allocates memory
PARTS = {  # name of a part -> pattern of its parameters; the first one that matches
    "LoRA matrices": r"lora_[AB]",
    "norms": r"norm\.",
    "embeddings": r"embed_tokens",
    "output layer": r"lm_head",
    "attention": r"self_attn",
    "router": r"mlp\.gate\.",
    "shared experts": r"shared_experts",
    "routed experts": r"experts",
    "feed-forward": r"mlp",
}


def explain(
    config: TrainConfig, stage: Stage, dist: DistContext, train_step: TrainStep, make_batches: MakeBatches | None = None
) -> None:  # fmt: skip
    """Print what the first step of this run would do, and what it costs. Several processes must all call it.

    make_batches: makes the micro-batches of the first step from its row ids; None: those of stage.data.
    """
    rows = resolve_global_batch_size(config, stage.checkpoint_path(config.out_dir), dist)
    sampler = stage.data.batch_sampler(rows, config.seed)
    total_steps = sampler.num_steps(config.max_steps, config.epochs)
    if make_batches:
        batches = make_batches(Engine(config, stage, dist, stage.model), sampler.row_ids(0))
    else:
        size = micro_batch_size(config, rows, dist.world_size)
        batches = MicroBatches(stage.data, sampler, size, dist.rank, dist.world_size).micro_batches(0)
    model = copy.deepcopy(stage.model).to(dist.device)
    if "reference" in batches[0] and stage.loss_unit == "pair":
        add_reference(model, batches, dist)
    if dist.is_rank0:
        print_batch(stage, batches)
        print_shapes(stage, model, batches[0], dist)
        print_parameters(model)
    del model
    for line in measure_cost(config, stage, dist, train_step, batches, total_steps):
        dist.print0(line)


# ---- the batch -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def add_reference(model: Transformer, batches: list[Batch], dist: DistContext) -> None:
    """Set the reference of pairs: at the first step of DPO the policy is its own reference."""
    for batch in batches:
        on_device = to_device(batch, dist.device)
        with dist.autocast():
            hidden, _ = model.eval()(on_device["input_ids"], token_mask=on_device["token_mask"])
            batch["reference"] = token_log_probs(hidden, model.lm_head.weight, on_device["labels"]).cpu()


def print_batch(stage: Stage, batches: list[Batch]) -> None:
    """Print the size of the batch and the text of its first rows."""
    first, shape = batches[0], tuple(batches[0]["input_ids"].shape)
    trained = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    tokens = sum(batch["num_tokens"] for batch in batches)
    many = f"{len(batches)} forward passes of up to" if len(batches) > 1 else "one forward pass of"
    print(
        f"\nThe first batch: {many} {shape[0]} rows x {shape[1]} tokens; {tokens:,} tokens that are not padding, "
        f"{trained:,} of them trained ({trained / max(tokens, 1):.0%})"
    )
    is_pair = stage.loss_unit == "pair"
    rows = {"chosen answer": 0, "rejected answer": shape[0] // 2} if is_pair else {
        f"row {row}": row for row in range(min(ROWS_SHOWN, shape[0]))
    }  # fmt: skip
    for title, row in rows.items():
        ids, mask = tokens_and_mask(first, row)
        cut = f", the first {TOKENS_SHOWN} of {len(ids):,}" if len(ids) > TOKENS_SHOWN else ""
        print_document(stage.tokenizer, title + cut, ids[:TOKENS_SHOWN], mask[:TOKENS_SHOWN])


def tokens_and_mask(batch: Batch, row: int) -> tuple[list[int], list[int]]:
    """Return the token ids of a row without padding, and 1 for each that is trained: labels are shifted by one."""
    length = int(batch["token_mask"][row].sum())
    ids, labels = batch["input_ids"][row, :length].tolist(), batch["labels"][row, :length].tolist()
    mask = [0, *(int(label != IGNORE_INDEX) for label in labels)]
    return (ids + labels[-1:], mask) if mask[-1] else (ids, mask[:-1])


# ---- the model -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def output_shapes(stage: Stage, model: Transformer, batch: Batch, dist: DistContext) -> dict[str, tuple[int, ...]]:
    """Return the shape of the output of every module that a forward pass calls, by name."""
    found: dict[str, tuple[int, ...]] = {}

    def record(name: str, output: Tensor | tuple[Tensor, ...]) -> None:
        found[name] = tuple((output[0] if isinstance(output, tuple) else output).shape)

    hooks = [
        module.register_forward_hook(lambda _module, _input, output, name=name: record(name, output))
        for name, module in model.named_modules()
        if any(True for _ in module.parameters())
    ]
    try:
        with dist.autocast():
            stage.compute_loss(model.eval(), to_device(batch, dist.device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found[name] for name, _ in model.named_modules() if name in found}


def print_shapes(stage: Stage, model: Transformer, batch: Batch, dist: DistContext) -> None:
    """Print the shapes; modules that differ only in the number of a layer or an expert share a line."""
    groups: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in output_shapes(stage, model, batch, dist).items():
        groups.setdefault(re.sub(r"\.\d+", ".*", name).removeprefix("model."), []).append(shape)
    print("\nShapes through the model (recorded by forward hooks)")
    print(f"  {'input_ids':<44} {format_shape([tuple(batch['input_ids'].shape)])}")
    for name, shapes in groups.items():
        if name:
            print(f"  {name:<44} {format_shape(shapes)}" + (f"   x {len(shapes)}" if len(shapes) > 1 else ""))
    trained = int((batch["labels"] != IGNORE_INDEX).sum())
    logits = format_shape([(trained, model.lm_head.weight.shape[0])])
    print(f"  {'logits of the trained tokens, by the loss':<44} {logits}")


def format_shape(shapes: list[tuple[int, ...]]) -> str:
    """Return (batch, seq, dim); for modules of different shapes the range of each size."""
    sizes = [sorted(set(column)) for column in zip(*shapes, strict=True)]
    return "(" + ", ".join(f"{size[0]:,}" if len(size) == 1 else f"{size[0]:,}…{size[-1]:,}" for size in sizes) + ")"


def parameters_by_part(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (parameters, trainable parameters) of each part of the model that has any."""
    counts = dict.fromkeys(PARTS, (0, 0))
    for name, parameter in model.named_parameters():
        part = next(part for part, pattern in PARTS.items() if re.search(pattern, name))
        total, trainable = counts[part]
        counts[part] = (total + parameter.numel(), trainable + parameter.numel() * parameter.requires_grad)
    return {part: count for part, count in counts.items() if count[0]}


def print_parameters(model: Transformer) -> None:
    counts = parameters_by_part(model)
    total, active = model.count_parameters()
    trainable = sum(count for _, count in counts.values())
    print("\nParameters")
    for part, (count, training) in counts.items():
        note = "" if training == count else "   frozen" if not training else f"   {training:,} of them train"
        tied = "   also the output layer" if part == "embeddings" and model.config.tie_embeddings else ""
        print(f"  {part:<16} {count:>15,}  {count / total:>6.1%}{tied}{note}")
    more = f", {active:,} of them used by a token" if active != total else ""
    print(f"  {'all':<16} {total:>15,}   {trainable:,} train{more}")


# ---- the cost of a step ----------------------------------------------------------------------------------------------
def measure_cost(
    config: TrainConfig, stage: Stage, dist: DistContext, train_step: TrainStep, batches: list[Batch], total_steps: int
) -> Iterator[str]:  # fmt: skip
    """Train a copy of the model for a few steps. Yields the lines about FLOPs, memory and seconds."""
    config = dataclasses.replace(config, compile="off") if config.compile == "auto" else config
    copied = dataclasses.replace(stage, model=copy.deepcopy(stage.model))
    copied.model.activation_checkpointing = config.checkpoint_activations
    seconds = []
    with make_engine(config, copied, dist) as engine:
        timer = TrainingTimer(0, 0, 0, dist)
        for step in range(1 + TIMED_STEPS):
            start_step(engine, timer, step, max(total_steps, 1 + TIMED_STEPS))
            started, counter = time.perf_counter(), FlopCounterMode(display=False)
            if step:
                train_step(engine, batches).read()
                seconds.append(time.perf_counter() - started)
            else:
                with counter:
                    train_step(engine, batches).read()
                flops = counter.get_total_flops()
    lengths = [batch["input_ids"].shape for batch in batches]
    estimate = training_memory(
        stage.model.config, max(rows for rows, _ in lengths), max(width for _, width in lengths),
        optimizer=config.optimizer, compute_bytes=dist.dtype.itemsize, parallel=config.parallel,
        processes=dist.world_size, recompute=config.checkpoint_activations, device=dist.device.type,
        num_trainable=sum(p.numel() for p in stage.model.parameters() if p.requires_grad),
    )  # fmt: skip
    tokens = sum(batch["num_tokens"] for batch in batches)
    each = sorted(seconds)[len(seconds) // 2]
    formula = stage_flops_per_token(stage)[0] * tokens
    weights = sum(p.numel() * p.element_size() for p in stage.model.parameters()) / 2**30
    copies = f", {weights:.2f} GiB of it a copy of the weights" if dist.device.type == "cpu" else ""
    dtype, sampling = str(dist.dtype).removeprefix("torch."), "sampling, " if stage.loss_unit == "answer" else ""
    parts = ", ".join(
        f"{name} {getattr(estimate, name) / 2**30:.2f}" for name in ("weights", "gradients", "optimizer", "activations")
    )
    peak, run = peak_memory_mb(dist.device.type) / 1024, format_minutes(each * total_steps)
    yield f"\nOne step of process 0 (of {dist.world_size}), {config.optimizer}, {dtype}"
    yield f"  FLOPs     {flops / 1e9:,.1f} GFLOP counted by torch (with the optimizer), {formula / 1e9:,.1f} by formula"
    yield f"  memory    {peak:.2f} GiB peak of this process{copies}"
    yield f"            {estimate.total / 2**30:.2f} GiB of tensors by the formula ({parts})"
    yield f"  seconds   {each:.3f} (median of {TIMED_STEPS}), {tokens / each:,.0f} tokens per second"
    yield f"  the run   {total_steps:,} steps: about {run} without {sampling}validations and saves"
    yield "\nNothing was trained and no file was written: leave out --explain to train."


def format_minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:,.0f} minutes"
