"""Sampling: logits (batch, vocab) in, the next token of each row out.

    logits -> repetition, presence and frequency penalties -> no-repeat n-grams
           -> temperature -> top-k -> top-p -> min-p -> sample

The order is that of transformers' logits processors (GenerationMixin._get_logits_processor). Beam search applies the
first line to log-probabilities and does not sample (beams.py).
Called by generate.py. Read next: beams.py (beam search), generate.py (computes the logits).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import require

MAX_LOGPROBS = 20  # alternatives reported per token
MAX_BEAMS = 8  # each beam takes one row of the KV cache


@dataclass(frozen=True)
class SamplingParams:
    """Sampling and stopping settings of a sequence. Raises ValueError if a value is out of range."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the smallest set of tokens with total probability >= p (Holtzman et al. 2019, 3.1)
    min_p: float = 0.0  # keep tokens with probability >= min_p * maximum probability (Nguyen et al. 2024, 3)
    repetition_penalty: float = 1.0  # > 1: tokens of prompt and answer become less likely (Keskar et al. 2019, 4.1)
    presence_penalty: float = 0.0  # subtracted from the logit of every token that occurs in the answer (OpenAI's API)
    frequency_penalty: float = 0.0  # subtracted once per occurrence in the answer (OpenAI's API)
    penalty_window: int = 0  # presence and frequency penalties count this many last tokens of the answer; 0: all
    no_repeat_ngram_size: int = 0  # n: no n-gram of prompt and answer occurs twice (Paulus et al. 2017, 2.5); 0: off
    num_beams: int = 1  # > 1: beam search, deterministic (beams.py)
    length_penalty: float = 1.0  # final beam score = log-probability / length ** length_penalty
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()  # strings that end an answer and are not part of it
    seed: int | None = None  # None: random. Row i of a batch uses seed + i and samples as it would alone
    logprobs: int | None = None  # report each token's log-probability and those of this many most likely tokens
    prompt_logprobs: int | None = None  # the same for prompt tokens; max_new_tokens may then be 0

    def __post_init__(self) -> None:
        has_beams, alternatives = self.num_beams > 1, f"from 0 to {MAX_LOGPROBS}"
        for name, is_valid, rule in (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a number"),
            ("penalty_window", self.penalty_window >= 0, "at least 0"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "at least 0"),
            ("num_beams", 1 <= self.num_beams <= MAX_BEAMS, f"from 1 to {MAX_BEAMS}"),
            ("length_penalty", -10 <= self.length_penalty <= 10, "from -10 to 10"),
            ("temperature", not has_beams or self.temperature == 0, "0 with num_beams above 1"),
            ("logprobs", not has_beams or self.logprobs is None, "left out with num_beams above 1"),
            ("max_new_tokens", self.max_new_tokens >= (self.prompt_logprobs is None), "at least 1"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("logprobs", 0 <= (self.logprobs or 0) <= MAX_LOGPROBS, alternatives),
            ("prompt_logprobs", 0 <= (self.prompt_logprobs or 0) <= MAX_LOGPROBS, alternatives),
        ):
            require(is_valid, f"{name} must be {rule}, not {getattr(self, name)}", ValueError)

    @property
    def needs_counts(self) -> bool:
        """Whether a penalty depends on the number of occurrences in the answer."""
        return bool(self.presence_penalty or self.frequency_penalty)

    @property
    def has_penalties(self) -> bool:
        """Whether any penalty depends on earlier tokens."""
        return self.repetition_penalty != 1 or self.needs_counts or self.no_repeat_ngram_size > 0


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of seen tokens by `penalty`, multiply others. logits, seen (bool): (batch, vocab)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def apply_count_penalties(logits: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """logits - presence * [count > 0] - frequency * count. logits, counts: (batch, vocab)."""
    return logits - presence * (counts > 0) - frequency * counts


class NgramBlocker:
    """Tracks the n-grams of a sequence and bans the tokens that would repeat one.

    Bans the same tokens as transformers' NoRepeatNGramLogitsProcessor: n-grams of the prompt and stop tokens count.
    """

    def __init__(self, size: int, ids: list[int]) -> None:
        self.size = size
        self.prefix: tuple[int, ...] = ()  # the last n - 1 tokens
        self.followers: dict[tuple[int, ...], tuple[int, ...]] = {}  # n - 1 tokens -> the tokens that followed them
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Add the next token of the sequence."""
        if len(self.prefix) == self.size - 1:
            self.followers[self.prefix] = (*self.followers.get(self.prefix, ()), token)
        self.prefix = (*self.prefix, token)[max(0, len(self.prefix) + 2 - self.size) :]

    def banned_tokens(self) -> tuple[int, ...]:
        """The tokens that would repeat an n-gram."""
        return self.followers.get(self.prefix, ())

    def fork(self) -> "NgramBlocker":
        """An independent copy."""
        other = NgramBlocker(self.size, [])
        other.prefix, other.followers = self.prefix, self.followers.copy()
        return other


class Penalties:
    """Penalties on the next token's scores, from the tokens of prompt and answer; one row, or one per beam."""

    def __init__(self, settings: SamplingParams, prompt: list[int], stop_ids: list[int], scores_like: Tensor) -> None:
        """`scores_like`: a tensor (vocab, ...) on the device of the scores. `stop_ids` get no repetition penalty."""
        self.settings, self.stop_ids, rows = settings, stop_ids, settings.num_beams
        self.seen: Tensor | None = None  # (rows, vocab) bool: tokens of prompt and answer
        self.counts: Tensor | None = None  # (rows, vocab): occurrences in the answer, or in its last tokens
        self.recent: Tensor | None = None  # (rows, penalty_window): a ring buffer of the last tokens
        self.steps = 0
        self.ngrams: list[NgramBlocker] = []  # one per row
        if settings.repetition_penalty != 1:
            self.seen = torch.zeros(rows, scores_like.shape[0], dtype=torch.bool, device=scores_like.device)
            self.seen[:, prompt] = True
            self.seen[:, stop_ids] = False
        if settings.needs_counts:
            self.counts = torch.zeros(rows, scores_like.shape[0], device=scores_like.device)
            if settings.penalty_window:
                self.recent = torch.zeros(rows, settings.penalty_window, dtype=torch.long, device=scores_like.device)
        if settings.no_repeat_ngram_size:
            ngrams = NgramBlocker(settings.no_repeat_ngram_size, prompt)
            self.ngrams = [ngrams, *(ngrams.fork() for _ in range(rows - 1))]

    def apply(self, scores: Tensor) -> Tensor:
        """Apply the penalties to scores (rows, vocab), logits or log-probabilities."""
        if self.seen is not None:
            scores = apply_repetition_penalty(scores, self.seen, self.settings.repetition_penalty)
        if self.counts is not None:
            presence, frequency = self.settings.presence_penalty, self.settings.frequency_penalty
            scores = apply_count_penalties(scores, self.counts, presence, frequency)
        banned_tokens = [(row, token) for row, ngrams in enumerate(self.ngrams) for token in ngrams.banned_tokens()]
        if banned_tokens:
            index = torch.tensor(banned_tokens, device=scores.device).T
            scores = scores.index_put((index[0], index[1]), scores.new_tensor(-math.inf))
            # If all tokens of a row are banned, allow its stop tokens: the answer ends.
            empty = (scores == -math.inf).all(-1, keepdim=True)
            scores[:, self.stop_ids] = scores[:, self.stop_ids].masked_fill(empty, 0.0)
        return scores

    def update(self, tokens: list[int]) -> None:
        """Record the next token of every row."""
        rows = range(len(tokens))
        if self.seen is not None:
            self.seen[rows, tokens] = True
        if self.counts is not None:
            self.counts[rows, tokens] += 1
            if self.recent is not None:
                slot = self.steps % self.recent.shape[1]
                if self.steps >= self.recent.shape[1]:
                    self.counts[rows, self.recent[:, slot]] -= 1
                self.recent[:, slot] = torch.tensor(tokens)
            self.steps += 1
        for ngrams, token in zip(self.ngrams, tokens, strict=False):
            ngrams.append(token)

    def reorder(self, parents: list[int]) -> None:
        """Replace row i by a copy of row parents[i]."""
        self.seen = None if self.seen is None else self.seen[parents]
        self.counts = None if self.counts is None else self.counts[parents]
        self.recent = None if self.recent is None else self.recent[parents]
        self.ngrams = [self.ngrams[parent].fork() for parent in parents] if self.ngrams else []


def top_p_mask(logits: Tensor, top_p: float) -> Tensor:
    """True for the smallest set of most likely tokens with total probability >= top_p. logits, result: (batch, vocab).

    Of equal logits at the limit, those of lower ids are kept.
    """
    # Only the values are sorted: numpy sorts them with SIMD instructions, ten times as fast as torch.sort on a CPU.
    on_cpu = logits.device.type == "cpu"
    ordered = torch.from_numpy(np.sort(logits.numpy())).flip(-1) if on_cpu else logits.sort(descending=True).values
    count = 1 + (ordered.softmax(-1).cumsum(-1)[:, :-1] < top_p).sum(-1, keepdim=True)  # kept tokens of each row
    limit = ordered.gather(-1, count - 1)
    above, tied = logits > limit, logits == limit
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= count - above.sum(-1, keepdim=True)))


def filter_logits(logits: Tensor, settings: SamplingParams) -> Tensor:
    """Set logits (batch, vocab) to -inf where top-k, top-p or min-p exclude a token; the most likely one remains."""
    if 0 < settings.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(settings.top_k).values[:, -1:], -math.inf)
    if settings.top_p < 1:
        logits = logits.masked_fill(~top_p_mask(logits, settings.top_p), -math.inf)
    if settings.min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(settings.min_p), -math.inf)
    return logits


def sample(logits: Tensor, settings: SamplingParams, uniforms: list[float]) -> Tensor:
    """Sample the next token of each row: logits (batch, vocab) -> (batch,). `uniforms`: one value in [0, 1) per row."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    # Subtract the maximum first, so that a small temperature cannot overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(settings.temperature, 1e-6)
    mass = filter_logits(logits, settings).softmax(-1).cumsum(-1)
    # Capped at 1 - 1e-6: the target stays below the total in fp32, so a token with probability 0 is never sampled.
    uniform = torch.tensor([[min(uniform, 1 - 1e-6)] for uniform in uniforms], dtype=mass.dtype, device=mass.device)
    return torch.searchsorted(mass, uniform * mass[:, -1:], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def sample_rows(logits: Tensor, settings: Sequence[SamplingParams], uniforms: list[float]) -> Tensor:
    """`sample` with separate settings per row; rows with equal settings are sampled together."""
    groups: dict[tuple[float, ...], list[int]] = {}
    for i, params in enumerate(settings):
        filter_key = (params.temperature, params.top_k, params.top_p, params.min_p)
        groups.setdefault(filter_key if params.temperature else (), []).append(i)
    if len(groups) == 1:
        return sample(logits, settings[0], uniforms)
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    for rows in groups.values():
        tokens[rows] = sample(logits[rows], settings[rows[0]], [uniforms[i] for i in rows])
    return tokens
