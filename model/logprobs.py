"""Log-probabilities of drawn tokens and of a prompt, as OpenAI's API reports them.

    log p(token) = log_softmax(logits)[token]

Called by generate.py. Read next: generate.py (where hidden states come from), ../serving/echo.py (how they are sent).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

MAX_LOGITS = 2**24  # elements of a prompt's logits that are computed together: 64 MiB in fp32


@dataclass
class TokenLogprob:
    """log p of a token, and the likeliest tokens at its position, likeliest first, as (id, log p).

    Of a drawn token they are the model's own: before penalties, temperature and filters, over the tokens that may be
    drawn. Of a prompt token they are over the whole vocabulary.
    """

    id: int
    logprob: float
    top_logprobs: list[tuple[int, float]]


def token_logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """logits (vocab,) -> the log-probability of the token and of the `count` likeliest ones."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(count)
    return TokenLogprob(token, logprobs[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True)))


def prompt_logprobs(lm_head: nn.Linear, hidden: Tensor, prompt: list[int], count: int) -> list[TokenLogprob]:
    """The log-probability of every prompt token but the first, and of the `count` likeliest tokens at its position.

    hidden: (at least len(prompt), dim), the states after the final norm at the prompt's tokens. The logits are computed
    in chunks of positions, so that memory for them is bounded by MAX_LOGITS.
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
