"""Log-probabilities of generated tokens and of prompt tokens, as in OpenAI's API, and of whole texts.

    log p(token) = log_softmax(logits)[token]

Read next: generate.py (the hidden states), ../serving/echo.py (the response format).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.transformer import Transformer

MAX_LOGITS = 2**24  # logits per chunk of a prompt: 64 MiB in fp32
POSITIONS_PER_CHUNK = 1024
POSITIONS_MULTIPLE = 128  # on a CPU every new matmul shape allocates a new buffer


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


def label_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """ln p(label) at each position: hidden (n, dim), weight (vocab, dim), labels (n,) -> (n,), fp32."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


@torch.no_grad()
def sum_log_probs(model: Transformer, rows: list[tuple[list[int], list[int]]], pad_id: int) -> list[float]:
    """The sum of ln p over the tokens with mask 1 of each row (ids, mask), in one batch, padded on the right.

    The first token of a row has no prediction: its mask is ignored. A row has at most max_seq_len + 1 tokens, and one
    row at least two. The model must be in eval mode; an autocast context around the call sets the dtype.
    """
    width, weight = max(len(ids) for ids, _ in rows), model.lm_head.weight
    ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in rows], device=weight.device)
    mask = torch.tensor([mask + [0] * (width - len(mask)) for _, mask in rows], device=weight.device)
    scored = mask[:, 1:] > 0
    hidden, labels = model(ids[:, :-1])[0][scored], ids[:, 1:][scored]
    missing = -len(labels) % POSITIONS_MULTIPLE
    states = F.pad(hidden, (0, 0, 0, missing)).split(POSITIONS_PER_CHUNK)
    targets = F.pad(labels, (0, missing)).split(POSITIONS_PER_CHUNK)
    found = [label_log_probs(h, weight, y) for h, y in zip(states, targets, strict=True)]
    log_probs = torch.zeros(scored.shape, device=weight.device)
    log_probs[scored] = torch.cat(found)[: len(labels)]
    sums: list[float] = log_probs.cpu().double().sum(1).tolist()
    return sums
