"""The parts of DPO other than its loss: reference log-probabilities, metrics, early stop, rate of repetition loops.

    reference    log p(token | tokens before it) of every answer token under the frozen parent. Computed once and saved,
                 so that only one model is in memory:  out/dpo_{size}.reference = {key, log_probs: {split: (tokens,)}}
    early stop   DPO maximises a difference, so log p of chosen and rejected answers can fall together (Pal et al. 2024,
                 arXiv:2402.13228). The stage stops when log p of the chosen answers falls more than --max_chosen_drop.
    loop rate    fraction of greedy answers to held-out prompts that end in a repetition loop, before and after training

Read next: ../5-dpo_train.py (the loss), datasets.py (PreferenceDataset), loop.py (calls early_stop).
"""

import dataclasses
import hashlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checksums import find_damaged_record
from common.errors import UserError
from corpus.dataset_meta import read_meta
from model.checkpoint import LOAD_ERRORS, atomic_save, model_state_dict, state_fingerprint
from model.generate import generate
from model.repetition import has_loop
from model.sampling import SamplingParams
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer
from trainer.datasets import Batch, ChatDataset, PreferenceDataset, to_device
from trainer.distributed import DistContext
from trainer.loss import IGNORE_INDEX, token_log_probs
from trainer.metrics import MetricRow

# Allowed deviation of the first loss from its expected value E, divided by max(1, E).
REFERENCE_TOLERANCE = 0.01  # fp32 and TF32
LOW_PRECISION_TOLERANCE = 0.05  # bf16 and fp16
REPETITION_PROMPTS, REPETITION_TOKENS = 32, 128  # prompts per language, max_new_tokens per answer
LANGUAGE_MIX_TOLERANCE = 0.25  # warn if the fractions of Chinese rows differ by more


# ---- the reference ---------------------------------------------------------------------------------------------------
def without_dropout(model: Transformer) -> Transformer:
    """Return the model with dropout 0. With dropout the policy would differ from its reference already at step 1."""
    if not model.config.dropout:
        return model
    copy = Transformer(dataclasses.replace(model.config, dropout=0.0))
    copy.load_state_dict(model.state_dict())
    return copy


def load_or_compute_reference(
    dist: DistContext, model: Transformer, folder: str, pad_id: int, path: Path, batch_size: int
) -> dict[str, Tensor]:
    """Return {split: log p under `model` of every token of the split, (tokens,) fp32}, 0 outside answers.

    Reads them from `path` if that file was computed with the same weights, tokenizer, data and dtype. Otherwise all
    processes compute them together and rank 0 writes the file.
    """
    meta = read_meta(folder)
    key = {
        "parent": state_fingerprint(model_state_dict(model)),
        "tokenizer": meta["tokenizer"],
        "data": folder_fingerprint(folder),
        "dtype": str(dist.dtype).removeprefix("torch."),
    }
    cached = read_reference(path, key, meta["splits"])
    if dist.all_reduce_sum([float(cached is not None)])[0] == dist.world_size:
        dist.print0(f"reference: log-probabilities from {path} (same parent, tokenizer and data)")
        return cached or {}
    model.to(dist.device).eval()
    answers = {split: ChatDataset(folder, split, pad_id) for split in meta["splits"]}
    dist.print0(f"reference: computing log-probabilities of {sum(map(len, answers.values())):,} answers for {path}")
    log_probs = {split: reference_log_probs(dist, model, data, batch_size) for split, data in answers.items()}
    if dist.is_rank0:
        atomic_save({"key": key, "log_probs": log_probs}, path)
    return log_probs


def no_reference(folder: str) -> dict[str, Tensor]:
    """Return {split: zeros, (tokens,)}: for --explain, which needs the reference of one batch."""
    return {split: torch.zeros(entry["tokens"]) for split, entry in read_meta(folder)["splits"].items()}


def read_reference(path: Path, key: dict[str, str], splits: Collection[str]) -> dict[str, Tensor] | None:
    """Return the log-probabilities in a file, or None if it is missing, damaged or of other inputs."""
    try:
        if find_damaged_record(path):
            return None
        cached = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        log_probs: dict[str, Tensor] = cached["log_probs"]
        return log_probs if cached["key"] == key and log_probs.keys() == set(splits) else None
    except LOAD_ERRORS:
        return None


@torch.no_grad()
def reference_log_probs(dist: DistContext, model: Transformer, answers: ChatDataset, batch_size: int) -> Tensor:
    """Return log p of every token of a split, (tokens,), 0 outside answers. Each process computes some batches."""
    starts, order = answers.tokens.offsets(), answers.lengths().argsort(kind="stable")
    log_prob_stream = torch.zeros(answers.tokens.tokens)
    for number, first in enumerate(range(0, len(order), batch_size)):
        if number % dist.world_size != dist.rank:
            continue
        documents = order[first : first + batch_size]
        batch = to_device(answers.batch(documents), dist.device)
        with dist.autocast():
            hidden, _ = model(batch["input_ids"], token_mask=batch["token_mask"])
            log_probs = token_log_probs(hidden, model.lm_head.weight, batch["labels"]).cpu()
        for document, values in zip(documents, log_probs, strict=True):
            start, end = starts[document], starts[document + 1]
            log_prob_stream[start + 1 : end] = values[: end - start - 1]  # labels are shifted by one
    return dist.all_reduce(log_prob_stream).cpu()


def folder_fingerprint(folder: str) -> str:
    """Return 16 hex digits of the SHA-256 over all token ids and masks of a token folder."""
    digest = hashlib.sha256()
    for file in sorted([*Path(folder).glob("*.bin"), *Path(folder).glob("*.mask")]):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        with file.open("rb") as content:
            while piece := content.read(1 << 24):
                digest.update(piece)
    return digest.hexdigest()[:16]


# ---- metrics ---------------------------------------------------------------------------------------------------------
def preference_metrics(log_probs: Tensor, batch: Batch, margin: Tensor, pairs: Tensor) -> dict[str, Tensor]:
    """Return metrics summed over the pairs of a batch; the loop divides them by the number of pairs.

    log_probs: (2 * pairs, seq), as batch["reference"]. margin: (pairs,). pairs: (pairs,), False in an empty batch.
    kl is the mean over the tokens of both answers of (r - 1) - log r with r = pi / pi_ref: the estimator "k3" (Schulman
    2020, http://joschu.net/blog/kl-approx.html), which is unbiased for KL(pi_ref || pi) if the tokens are sampled from
    pi_ref. The answers of a dataset are not sampled from it, so kl is only a rough distance between the two models.
    """
    answer_mask = batch["labels"] != IGNORE_INDEX
    log_ratio = (log_probs - batch["reference"]).detach() * answer_mask  # log r of every token
    lengths = answer_mask.sum(1)
    k3 = (log_ratio.clamp(max=20).exp() - 1 - log_ratio).sum(1)
    (chosen, rejected), (chosen_k3, rejected_k3) = log_probs.detach().sum(1).chunk(2), k3.chunk(2)
    chosen_length, rejected_length = lengths.chunk(2)

    def prefers_chosen(log_probs: Tensor) -> Tensor:
        per_token = (log_probs.detach() * answer_mask).sum(1) / lengths.clamp(min=1)
        return torch.gt(*per_token.chunk(2)).float()

    values = {
        "reward_accuracy": (margin > 0).float(),
        # 1 if the chosen answer has the higher log p per token, under pi and (before training) under pi_ref.
        "chosen_preferred": prefers_chosen(log_probs),
        "chosen_preferred_before": prefers_chosen(batch["reference"]),
        "reward_margin": margin.detach(),
        "chosen_logp": chosen,
        "rejected_logp": rejected,
        "chosen_logp_delta": log_ratio.sum(1).chunk(2)[0],  # log pi(chosen) - log pi_ref(chosen), of the whole answer
        "kl": (chosen_k3 + rejected_k3) / (chosen_length + rejected_length).clamp(min=1),
        "chosen_length": chosen_length,
        "rejected_length": rejected_length,
    }
    return {name: (value * pairs).sum() for name, value in values.items()}


def warn_language_mismatch(dist: DistContext, folder: str, lineage: list[dict[str, Any]]) -> None:
    """Print the fractions of Chinese in the pairs and in the parent's SFT chats; warn if they differ strongly."""

    def chinese_fraction(tokens: str | Path) -> float:
        documents = {name: mix["documents"] for name, mix in read_meta(tokens)["report"]["languages"].items()}
        return documents.get("zh", 0) / max(sum(documents.values()), 1)

    pairs_fraction = chinese_fraction(folder)
    chats = next((Path(entry["data"]) for entry in reversed(lineage) if entry.get("stage") == "full_sft"), None)
    try:
        # The token folder tokens-<tokenizer> has the same name in both data folders.
        chats_fraction = chinese_fraction(chats / Path(folder).name) if chats else None
    except (UserError, KeyError):
        chats_fraction = None
    if chats_fraction is None:
        dist.print0(
            f"languages: {pairs_fraction:.0%} of the pairs are Chinese; "
            "the chats that the parent was trained on are not available for comparison"
        )
        return
    dist.print0(
        f"languages: {pairs_fraction:.0%} of the pairs are Chinese, "
        f"{chats_fraction:.0%} of the chats that the parent was trained on"
    )
    if abs(pairs_fraction - chats_fraction) > LANGUAGE_MIX_TOLERANCE:
        less = "English" if pairs_fraction > chats_fraction else "Chinese"
        dist.print0(
            f"WARNING: the language mixes differ strongly; {less} gets little preference data and may get worse"
        )


# ---- early stop ------------------------------------------------------------------------------------------------------
def chosen_drop_stop(
    max_drop: float, expected_loss: float | None, reference_path: Path, dist: DistContext
) -> Callable[[MetricRow], str]:
    """Return the function that the loop calls after every step: MetricRow -> reason to stop, or "" to continue.

    It raises UserError if the first loss is not `expected_loss`, which it is if the policy equals its reference.
    The default of --max_chosen_drop, 0.2 nats per token, was measured on the demo world. At a learning rate that kept
    the correct answers, the drop stayed below 0.06. At one that lost half of them, it exceeded 0.2 after 40 of 181
    steps and reached 1; every held-out pair was still ranked correctly, so the ranking does not show the loss.
    """
    relative_tolerance = REFERENCE_TOLERANCE if dist.dtype == torch.float32 else LOW_PRECISION_TOLERANCE

    def early_stop(row: MetricRow) -> str:
        if row["step"] == 1 and expected_loss is not None:
            first, tolerance = row["preference_loss"], relative_tolerance * max(1.0, expected_loss)
            if abs(first - expected_loss) > tolerance:
                raise UserError(
                    f"the first loss is {first:.4f}, not {expected_loss:.4f} ± {tolerance:g}, so the model does not "
                    f"equal its reference: delete {reference_path} and start anew with --resume never"
                )
            dist.print0(f"first loss {first:.4f}, expected {expected_loss:.4f} ± {tolerance:g}: ok")
        drop = -row["chosen_logp_delta"] / max(row["chosen_length"], 1)
        if max_drop and drop > max_drop:
            return (
                f"log p of the chosen answers fell {drop:.2f} nats per token below the parent's "
                f"(--max_chosen_drop {max_drop:g}): try a lower --learning_rate or a higher --sft_weight"
            )
        return ""

    return early_stop


# ---- repetition loops ------------------------------------------------------------------------------------------------
def repetition_rate(
    dist: DistContext, model: Transformer, tokenizer: ChatTokenizer, validation: dict[str, PreferenceDataset]
) -> dict[str, float]:
    """Return the fraction of answers with a repetition loop by split: greedy, 32 prompts, at most 128 tokens each."""
    rates, settings = {}, SamplingParams(max_new_tokens=REPETITION_TOKENS)
    for split, pairs in validation.items():
        prompts = [pairs.prompt_ids(row) for row in range(min(len(pairs), REPETITION_PROMPTS))]
        with dist.autocast():
            answers = generate(model.to(dist.device), prompts, settings, tokenizer)
        rates[split] = sum(has_loop(answer.ids) for answer in answers) / max(len(answers), 1)
    return rates


def measure_repetition(
    dist: DistContext, model: Transformer, tokenizer: ChatTokenizer, validation: dict[str, PreferenceDataset]
) -> Callable[[], MetricRow]:
    """Measure the loop rate before training. Returns a function that measures it again and returns both rates."""

    def measure(when: str) -> dict[str, float]:
        rates = repetition_rate(dist, model, tokenizer, validation) if dist.is_rank0 else {}
        dist.barrier()
        shown = ", ".join(f"{split} {rate:.0%}" for split, rate in rates.items())
        dist.print0(f"answers that loop, {when}: {shown or 'no held-out prompts'}")
        return rates

    before = measure("before")
    return lambda: {"loop_rate": {"before": before, "after": measure("after")}}
