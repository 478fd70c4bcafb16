"""How the next token is drawn: logits in, one token a row out.

    logits -> repetition, presence and frequency penalties -> temperature -> top-k -> top-p -> min-p -> draw

Called by generate.py. Read next: generate.py (where the logits come from).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_LOGPROBS = 20  # alternatives that may be told per token


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn and when an answer ends. Raises ValueError for a number that makes no sense."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # keep the k likeliest tokens (0: all)
    top_p: float = 1.0  # keep the likeliest tokens until their probabilities sum to p (Holtzman et al. 2019, 3.1)
    min_p: float = 0.0  # keep tokens at least this share as likely as the likeliest (Nguyen et al. 2024, 3)
    repetition_penalty: float = 1.0  # > 1: tokens seen in prompt or answer become less likely (Keskar et al. 2019, 4.1)
    presence_penalty: float = 0.0  # taken off the logit of every token that the answer has already (OpenAI's API)
    frequency_penalty: float = 0.0  # the same, once for each time that it has it
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()  # strings that end an answer and are not part of it
    seed: int | None = None  # None: different each time. Row i of a batch draws as prompt i would alone with seed + i
    logprobs: int | None = None  # note each token's log-probability, and those of so many likeliest ones beside it
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt; then max_new_tokens may be 0

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a number"),
            ("max_new_tokens", self.max_new_tokens >= (self.prompt_logprobs is None), "at least 1"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS, f"from 0 to {MOST_LOGPROBS}"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MOST_LOGPROBS,
                f"from 0 to {MOST_LOGPROBS}",
            ),
        ):
            if not good:
                raise ValueError(f"{name} must be {rule}, not {getattr(self, name)}")

    @property
    def counts_repeats(self) -> bool:
        """Whether an answer's own tokens change what follows."""
        return bool(self.presence_penalty or self.frequency_penalty)


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make seen tokens less likely whatever the sign of their logit. logits, seen (bool): (batch, vocab)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalise_counts(logits: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """logits - presence * [count > 0] - frequency * count. logits, counts: (batch, vocab)."""
    return logits - presence * (counts > 0) - frequency * counts


def keep_likely(logits: Tensor, settings: Sampling) -> Tensor:
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


def choose(logits: Tensor, settings: Sampling, draws: list[float]) -> Tensor:
    """The next token of each row: logits (batch, vocab) -> (batch,). `draws`: one number in [0, 1) per row."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    # The maximum comes off first, so that a tiny temperature cannot overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(settings.temperature, 1e-6)
    mass = keep_likely(logits, settings).softmax(-1).cumsum(-1)
    # Below 1 - 1e-6 the target stays under the total in fp32 too: a token of no probability is never hit.
    draw = torch.tensor([[min(draw, 1 - 1e-6)] for draw in draws], dtype=mass.dtype, device=mass.device)
    return torch.searchsorted(mass, draw * mass[:, -1:], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def choose_each(logits: Tensor, settings: Sequence[Sampling], draws: list[float]) -> Tensor:
    """As `choose`, where every row has settings of its own; rows that agree are drawn together."""
    groups: dict[tuple[float, ...], list[int]] = {}
    for i, each in enumerate(settings):
        drawn = (each.temperature, each.top_k, each.top_p, each.min_p)
        groups.setdefault(drawn if each.temperature else (), []).append(i)
    if len(groups) == 1:
        return choose(logits, settings[0], draws)
    chosen = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    for rows in groups.values():
        chosen[rows] = choose(logits[rows], settings[rows[0]], [draws[i] for i in rows])
    return chosen
