"""How the next token is drawn: logits in, one token a row out.

    logits -> repetition, presence and frequency penalties -> no repeated n-grams
           -> temperature -> top-k -> top-p -> min-p -> draw

The order is that of transformers' logits processors (GenerationMixin._get_logits_processor). A beam search applies the
first line to log-probabilities and draws nothing (beams.py).
Called by generate.py. Read next: beams.py (the other way to decode), generate.py (where the logits come from).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOGPROBS = 20  # alternatives that may be told per token
MAX_BEAMS = 8  # each beam takes a row of the cache


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn and when an answer ends. Raises ValueError for a number that makes no sense."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # keep the k likeliest tokens (0: all)
    top_p: float = 1.0  # keep the likeliest tokens until their probabilities sum to p (Holtzman et al. 2019, 3.1)
    min_p: float = 0.0  # keep tokens at least this share as likely as the likeliest (Nguyen et al. 2024, 3)
    repetition_penalty: float = 1.0  # > 1: tokens seen in prompt or answer become less likely (Keskar et al. 2019, 4.1)
    presence_penalty: float = 0.0  # taken off the logit of every token that the answer has already (OpenAI's API)
    frequency_penalty: float = 0.0  # the same, once for each time that it has it
    no_repeat_ngram_size: int = 0  # n: no n tokens of prompt and answer come twice (Paulus et al. 2017, 2.5); 0: off
    num_beams: int = 1  # > 1: beam search with so many beams, which draws nothing (beams.py)
    length_penalty: float = 1.0  # a beam's score is its log-probability / length ** length_penalty
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()  # strings that end an answer and are not part of it
    seed: int | None = None  # None: different each time. Row i of a batch draws as prompt i would alone with seed + i
    logprobs: int | None = None  # note each token's log-probability, and those of so many likeliest ones beside it
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt; then max_new_tokens may be 0

    def __post_init__(self) -> None:
        for name, is_valid, rule in (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a number"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "at least 0"),
            ("num_beams", 1 <= self.num_beams <= MAX_BEAMS, f"from 1 to {MAX_BEAMS}"),
            ("length_penalty", -10 <= self.length_penalty <= 10, "from -10 to 10"),
            ("temperature", self.num_beams == 1 or self.temperature == 0, "0 with num_beams above 1"),
            ("logprobs", self.num_beams == 1 or self.logprobs is None, "left out with num_beams above 1"),
            ("max_new_tokens", self.max_new_tokens >= (self.prompt_logprobs is None), "at least 1"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MAX_LOGPROBS,
                f"from 0 to {MAX_LOGPROBS}",
            ),
        ):
            if not is_valid:
                raise ValueError(f"{name} must be {rule}, not {getattr(self, name)}")

    @property
    def needs_counts(self) -> bool:
        """Whether an answer's own tokens change what follows."""
        return bool(self.presence_penalty or self.frequency_penalty)

    @property
    def has_penalties(self) -> bool:
        """Whether tokens of prompt or answer change what follows."""
        return self.repetition_penalty != 1 or self.needs_counts or self.no_repeat_ngram_size > 0


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make seen tokens less likely whatever the sign of their logit. logits, seen (bool): (batch, vocab)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def apply_count_penalties(logits: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """logits - presence * [count > 0] - frequency * count. logits, counts: (batch, vocab)."""
    return logits - presence * (counts > 0) - frequency * counts


class NgramBlocker:
    """The n-grams of a sequence of token ids: which tokens would complete one of them a second time.

    The same tokens as transformers' NoRepeatNGramLogitsProcessor bans: prompt and answer count alike, and so do the
    tokens that end a turn.
    """

    def __init__(self, size: int, ids: list[int]) -> None:
        self.size = size
        self.prefix: tuple[int, ...] = ()  # the last n - 1 tokens
        self.followers: dict[tuple[int, ...], tuple[int, ...]] = {}  # n - 1 tokens -> the tokens that followed them
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Append a token."""
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
    """The penalties on the next token's scores that follow from prompt and answer, for one row or for each beam."""

    def __init__(self, settings: SamplingParams, prompt: list[int], stop_ids: list[int], scores_like: Tensor) -> None:
        """`scores_like`: (vocab, ...), a tensor on the device of the scores. Tokens in `stop_ids` are not penalised."""
        self.settings, self.stop_ids, rows = settings, stop_ids, settings.num_beams
        self.seen: Tensor | None = None  # (rows, vocab) bool: tokens of prompt and answer
        self.counts: Tensor | None = None  # (rows, vocab): how often the answer has each token
        self.ngrams: list[NgramBlocker] = []  # one per row
        if settings.repetition_penalty != 1:
            self.seen = torch.zeros(rows, scores_like.shape[0], dtype=torch.bool, device=scores_like.device)
            self.seen[:, prompt] = True
            self.seen[:, stop_ids] = False
        if settings.needs_counts:
            self.counts = torch.zeros(rows, scores_like.shape[0], device=scores_like.device)
        if settings.no_repeat_ngram_size:
            ngrams = NgramBlocker(settings.no_repeat_ngram_size, prompt)
            self.ngrams = [ngrams, *(ngrams.fork() for _ in range(rows - 1))]

    def apply(self, scores: Tensor) -> Tensor:
        """Scores (rows, vocab), logits or log-probabilities, after the penalties."""
        if self.seen is not None:
            scores = apply_repetition_penalty(scores, self.seen, self.settings.repetition_penalty)
        if self.counts is not None:
            presence, frequency = self.settings.presence_penalty, self.settings.frequency_penalty
            scores = apply_count_penalties(scores, self.counts, presence, frequency)
        banned_tokens = [(row, token) for row, ngrams in enumerate(self.ngrams) for token in ngrams.banned_tokens()]
        if banned_tokens:
            index = torch.tensor(banned_tokens, device=scores.device).T
            scores = scores.index_put((index[0], index[1]), scores.new_tensor(-math.inf))
            # A row without any token left ends: its stop tokens are allowed again.
            empty = (scores == -math.inf).all(-1, keepdim=True)
            scores[:, self.stop_ids] = scores[:, self.stop_ids].masked_fill(empty, 0.0)
        return scores

    def update(self, tokens: list[int]) -> None:
        """Count one more token of every row."""
        rows = range(len(tokens))
        if self.seen is not None:
            self.seen[rows, tokens] = True
        if self.counts is not None:
            self.counts[rows, tokens] += 1
        for ngrams, token in zip(self.ngrams, tokens, strict=False):
            ngrams.append(token)

    def reorder(self, parents: list[int]) -> None:
        """Row i becomes a copy of row parents[i]."""
        self.seen = None if self.seen is None else self.seen[parents]
        self.counts = None if self.counts is None else self.counts[parents]
        self.ngrams = [self.ngrams[parent].fork() for parent in parents] if self.ngrams else []


def filter_logits(logits: Tensor, settings: SamplingParams) -> Tensor:
    """Logits (batch, vocab) with -inf where top-k, top-p or min-p rule a token out; the likeliest always stays."""
    if 0 < settings.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(settings.top_k).values[:, -1:], -math.inf)
    if settings.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        mass_before = probabilities.cumsum(-1) - probabilities
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, mass_before >= settings.top_p)
        logits = logits.masked_fill(drop, -math.inf)
    if settings.min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(settings.min_p), -math.inf)
    return logits


def sample(logits: Tensor, settings: SamplingParams, uniforms: list[float]) -> Tensor:
    """The next token of each row: logits (batch, vocab) -> (batch,). `uniforms`: one number in [0, 1) per row."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    # The maximum comes off first, so that a tiny temperature cannot overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(settings.temperature, 1e-6)
    mass = filter_logits(logits, settings).softmax(-1).cumsum(-1)
    # Below 1 - 1e-6 the target stays under the total in fp32 too: a token of no probability is never hit.
    uniform = torch.tensor([[min(uniform, 1 - 1e-6)] for uniform in uniforms], dtype=mass.dtype, device=mass.device)
    return torch.searchsorted(mass, uniform * mass[:, -1:], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def sample_rows(logits: Tensor, settings: Sequence[SamplingParams], uniforms: list[float]) -> Tensor:
    """As `sample`, where every row has settings of its own; rows that agree are drawn together."""
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
