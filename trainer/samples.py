"""Samples during training: the answers of the model to three held-out prompts, always the same ones.

    --sample_interval N    every N steps, and before the first and after the last one (0: none)
    if omitted             about ten times a run, in at most MAX_FRACTION of its time; none in runs below MIN_STEPS

    log row    {"step", "samples": [{"language", "prompt", "answer", "reference"}]}, of an MoE also
               "expert_load": [[fraction of the assignments of each expert] of each layer]

A pretrained model continues the beginning of a document, a chat model answers a question. Answers are greedy: sampling
draws no random numbers of torch, so the weights are the same with and without samples. Process 0 samples while the
others wait. Sharded weights (fsdp, ZeRO) are not gathered for it: such runs have no samples.
Read next: run.py (the caller), report_page.py (shows them), ../model/generate.py.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.moe import MoEFeedForward
from model.tokenizer import ChatTokenizer
from trainer.config import TrainConfig
from trainer.datasets import Batch, ChatDataset, PackedDataset, PreferenceDataset, TokenDataset, to_device
from trainer.distributed import DistContext
from trainer.metrics import MetricLogger, MetricRow, one_line
from trainer.stage import Stage

NUM_PROMPTS = 3
MAX_NEW_TOKENS = 40
OPENING_TOKENS = 12  # of a document that a pretrained model continues
TIMES, MAX_FRACTION, MIN_STEPS = 10, 1 / 30, 20  # without --sample_interval


class Samples:
    """Takes the samples of a run. `seconds`: the time that they took."""

    def __init__(self, config: TrainConfig, stage: Stage, dist: DistContext, total_steps: int) -> None:
        self.stage, self.dist, self.is_automatic = stage, dist, config.sample_interval is None
        self.interval, self.seconds = config.sample_interval or 0, 0.0
        if self.is_automatic and total_steps >= MIN_STEPS:
            self.interval = -(-total_steps // TIMES)
        if stage.loss_unit == "answer" or not stage.validation:  # rollouts are logged by grpo.py
            self.interval = 0
        if self.interval and dist.world_size > 1 and config.parallel != "ddp":
            dist.print0(f"no samples during training: the weights of --parallel {config.parallel} are sharded")
            self.interval = 0
        self.prompts: list[dict[str, Any]] = []
        self.batch: Batch | None = None

    def is_due(self, step: int) -> bool:
        return bool(self.interval) and step % self.interval == 0

    def take(self, logger: MetricLogger, step: int, training_seconds: float) -> None:
        """Answer the prompts and log the answers after `step` steps, unless that exceeds the limit of the time.

        training_seconds: of this session, for the limit. An error ends the samples, not the training.
        """
        is_late = self.is_automatic and self.seconds > MAX_FRACTION * training_seconds
        if not self.interval or not self.dist.is_rank0 or is_late:
            return
        if any(row["step"] == step and "samples" in row for row in logger.rows):  # a resumed run ends again
            return
        started = time.perf_counter()
        try:
            logger.log_samples({"step": step} | self.row())
        except Exception as error:
            logger.warn(f"no samples ({one_line(error)}); training continues without them")
            self.interval = 0
        self.seconds += time.perf_counter() - started

    def row(self) -> MetricRow:
        """Return the samples, and the expert load of an MoE on held-out rows."""
        from model.generate import generate  # the lessons do not need it
        from model.sampling import SamplingParams

        model, tokenizer = self.stage.model, self.stage.tokenizer
        self.prompts = self.prompts or held_out_prompts(self.stage)
        is_chat = not isinstance(next(iter(self.stage.validation.values())), PackedDataset)
        stop = tokenizer.stop_strings if is_chat else ()
        settings = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, stop=stop)
        with self.dist.autocast():
            answers = generate(model, [prompt["ids"] for prompt in self.prompts], settings, tokenizer)
        shown = [
            {name: prompt[name] for name in ("language", "prompt")}
            | {"answer": answer.text.strip(), "reference": prompt["reference"]}
            for prompt, answer in zip(self.prompts, answers, strict=True)
        ]
        load = self.expert_load() if model.config.use_moe else None
        return {"samples": shown, **({"expert_load": load} if load else {})}

    def expert_load(self) -> list[list[float]]:
        """Return the fraction of the assignments of each routed expert by layer, (layers, experts)."""
        if self.batch is None:
            data = next(iter(self.stage.validation.values()))
            self.batch = to_device(data.batch(np.arange(min(len(data), 8))), self.dist.device)
        with self.dist.autocast():
            return [load.tolist() for load in expert_loads(self.stage.model, self.batch)]


def held_out_prompts(stage: Stage) -> list[dict[str, Any]]:
    """Return the prompts {"language", "prompt", "reference", "ids"}: of the languages in turn, a fixed choice."""
    limit = stage.model.config.max_seq_len // 2
    rows = [prompt_rows(stage.validation[split], limit) for split in sorted(stage.validation)]
    prompts = []
    for i in range(NUM_PROMPTS):
        language = sorted(stage.validation)[i % len(rows)]
        if found := next(rows[i % len(rows)], None):
            ids, reference = found
            answer = stage.tokenizer.decode([token for token in reference if token not in stage.tokenizer.special_ids])
            prompt = {"language": language, "prompt": question_text(stage.tokenizer, ids), "reference": answer.strip()}
            prompts.append(prompt | {"ids": ids})
    if not prompts:
        raise ValueError("the held-out split has no prompt that is short enough")
    return prompts


def question_text(tokenizer: ChatTokenizer, ids: list[int]) -> str:
    """Return the text of a prompt, without the markers of the chat format around a single question."""
    text = tokenizer.decode(ids)
    if tokenizer.format:
        frame = tokenizer.decode(tokenizer.render([{"role": "user", "content": "Q1Q"}], True)[0])
        before, _, after = frame.partition("Q1Q")
        text = text.removeprefix(before).removesuffix(after)
    return text.strip()


def prompt_rows(data: TokenDataset, limit: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (prompt, reference) of rows of a held-out split in a fixed order. A prompt has at most `limit` tokens."""
    is_pairs = isinstance(data, PreferenceDataset)
    source: Any = data.answers if isinstance(data, PreferenceDataset) else data
    if not isinstance(source, (PackedDataset, ChatDataset)):
        return
    documents = source.tokens.documents // (2 if is_pairs else 1)
    for row in np.random.default_rng(0).choice(documents, min(documents, 32), replace=False).tolist():
        ids, mask = source.tokens.read_document(2 * row if is_pairs else row)
        start = min(OPENING_TOKENS, len(ids) // 2) if mask is None else int(mask.argmax())
        if not 0 < start <= limit:
            continue
        trained = np.ones(len(ids), dtype=bool) if mask is None else mask.astype(bool)
        end = start + int(np.argmin(np.append(trained[start:], False)))
        yield ids[:start].tolist(), ids[start : min(end, start + MAX_NEW_TOKENS)].tolist()


@torch.no_grad()
def expert_loads(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Return for every MoE layer the fraction of the assignments of each routed expert, (experts,): 1 in sum."""
    found: list[Tensor] = []

    def count(module: Any, inputs: tuple[Tensor, ...]) -> None:
        tokens = inputs[0][batch["token_mask"]].float()  # (n, dim)
        with torch.autocast(tokens.device.type, enabled=False):
            scores = F.linear(tokens, module.gate.weight.float())
        chosen = scores.topk(module.n_active, dim=-1).indices.flatten()
        found.append(torch.bincount(chosen, minlength=len(module.experts)) / max(len(chosen), 1))

    layers = [module for module in model.modules() if isinstance(module, MoEFeedForward)]
    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    was_training = model.training
    try:
        model.eval()(batch["input_ids"], token_mask=batch["token_mask"])
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return found
