"""Log-probabilities of generated tokens and of prompt tokens, as in OpenAI's API.

    log p(token) = log_softmax(logits)[token]

Called by generate.py. Read next: generate.py (the hidden states), ../serving/responses.py (the response format).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

MAX_LOGITS = 2**24  # logits per chunk of a prompt: 64 MiB in fp32


@dataclass
class TokenLogprob:
    """Log-probability of a token, and the most likely tokens at its position as (id, log-probability), sorted.

    For a generated token: before penalties, temperature and filters, normalized over the tokens that may be generated.
    For a prompt token: normalized over the whole vocabulary.
    """

    id: int
    logprob: float
    top_logprobs: list[tuple[int, float]]


def token_logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """logits (vocab,) -> the log-probability of the token and of the `count` most likely tokens."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(count)
    return TokenLogprob(token, logprobs[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True)))


def prompt_logprobs(lm_head: nn.Linear, hidden: Tensor, prompt: list[int], count: int) -> list[TokenLogprob]:
    """Log-probability of every prompt token except the first, and of the `count` most likely tokens at its position.

    hidden: (>= len(prompt), dim), the hidden states after the final norm. Logits are computed in chunks of at most
    MAX_LOGITS elements to bound memory.
    """
    chunk = max(1, MAX_LOGITS // lm_head.weight.shape[0])
    found = []
    for start in range(0, len(prompt) - 1, chunk):
        targets = prompt[start + 1 : start + 1 + chunk]
        logprobs = lm_head(hidden[start : start + len(targets)]).float().log_softmax(-1)
        values, ids = logprobs.topk(count)
        own = logprobs.gather(-1, torch.tensor(targets, device=logprobs.device)[:, None])[:, 0]
        rows = zip(targets, own.tolist(), ids.tolist(), values.tolist(), strict=True)
        found += [TokenLogprob(token, own, list(zip(i, v, strict=True))) for token, own, i, v in rows]
    return found
