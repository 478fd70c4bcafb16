"""The log-probabilities of an exam's options, with as little work as possible.

    * questions of similar length are computed together, a batch of `batch_tokens` positions at once
    * the examples in front of a subject's questions are read once, not before every question
    * the options of a question share one pass over their prompt; their first tokens need no other, and their further
      tokens go with options of similar length
    * logits are computed only where an option is read

Keys and values of what is shared lie in a KVCache that is copied to every row; the results equal those of one option at
a time (tests/evaluation/test_exam_logprobs.py). Read next: exam_prompts.py (what is asked), ../model/transformer.py
(the cache).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from evaluation.exam_prompts import Asked
from model.config import ModelConfig
from model.tokenizer import ChatTokenizer
from model.transformer import KVCache, Transformer

CPU_BATCH_TOKENS, BATCH_TOKENS = 1024, 16384  # a larger batch overflows a CPU's caches: 4096 took half as long again
WIDTH_STEP = 16  # widths are multiples of it: a CPU's kernels are prepared for each shape anew
WORTH_SHARING = 32  # tokens that a group of questions has in common
LARGEST_LOGITS = 1 << 24  # numbers in one block of logits
LARGEST_CACHE = 1 << 30  # bytes of keys and values


@torch.inference_mode()
def answer(
    model: Transformer,
    tokenizer: ChatTokenizer,
    asked: list[Asked],
    method: str,
    number_format: Callable[[], AbstractContextManager[Any]],
    batch_tokens: int = 0,
) -> Iterator[int]:
    """Fill `log_probs` of all questions, batch after batch; yields how many each batch held.

    batch_tokens: positions computed at once, 0: what suits the device, 1: one question at a time, which shares nothing
        with others.
    Raises UserError when the model computes no number.
    """
    if not batch_tokens:
        batch_tokens = CPU_BATCH_TOKENS if model.lm_head.weight.device.type == "cpu" else BATCH_TOKENS
    for group, start in _groups(asked, batch_tokens):
        shared = None
        if start:
            with number_format():
                shared = _empty(model, 1, start)
                model(torch.tensor([group[0].prompt[:start]], device=model.lm_head.weight.device), shared)
        for batch in _batches(group, start, batch_tokens, model.config):
            with number_format():
                sums = _sums(model, batch, tokenizer.pad_id, shared, batch_tokens)
            for one, found in zip(batch, sums.tolist(), strict=True):
                _note(one, found, method)
            yield len(batch)


def _note(one: Asked, found: list[float], method: str) -> None:
    """Put the sums of the options as shown where they belong."""
    own = [0.0] * len(one.order)
    for place, option in enumerate(one.order):
        own[option] = found[place] / (len(one.item.options[option]) if method == "text" else 1)
    if not all(map(math.isfinite, own)):
        raise UserError(f"the model computes no number for {one.item.where}: its weights are damaged")
    one.log_probs = tuple(own)


def _groups(asked: list[Asked], batch_tokens: int) -> Iterator[tuple[list[Asked], int]]:
    """Questions with equally many options that begin with the same tokens, and how many these are: those of the shared
    examples."""
    groups: dict[tuple[int, str, int], list[Asked]] = {}
    for one in asked:
        alike = (one.item.subject, one.examples) if one.examples and batch_tokens > 1 else ("", 0)
        groups.setdefault((len(one.options), *alike), []).append(one)
    for group in groups.values():
        start = 0
        if group[0].examples and len(group) > 1 and batch_tokens > 1:
            first, last = min(one.prompt for one in group), max(one.prompt for one in group)
            shortest = min(len(one.prompt) for one in group)
            differs = (i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1])
            start = min(next(differs, shortest), shortest - 1)  # what comes behind the last token is needed
        yield group, start if start >= WORTH_SHARING else 0


def _batches(asked: list[Asked], start: int, batch_tokens: int, config: ModelConfig) -> Iterator[list[Asked]]:
    """Questions of similar length, longest first; what fits into `batch_tokens`, or one. `start`: tokens shared."""
    batch: list[Asked] = []
    prompt = rest = 0  # the longest of the batch
    for one in sorted(asked, key=lambda one: (len(one.prompt), one.rest), reverse=True):
        longest = max(prompt, len(one.prompt)), max(rest, one.rest)
        width = _padded(longest[0] - start)
        rows = batch_tokens // width
        if start or longest[1]:
            rows = min(rows, _cached_rows(config, start + width))
        if batch and (len(batch) >= rows or sum(longest) > config.max_seq_len):
            yield batch
            batch, longest = [], (len(one.prompt), one.rest)
        batch.append(one)
        prompt, rest = longest
    yield batch


def _cached_rows(config: ModelConfig, length: int) -> int:
    """How many rows of so many tokens a cache may have (of 16-bit numbers)."""
    return LARGEST_CACHE // (length * 4 * config.n_layers * config.n_kv_heads * config.head_dim)


def _padded(length: int) -> int:
    return -(-length // WIDTH_STEP) * WIDTH_STEP


def _sums(model: Transformer, batch: list[Asked], pad: int, shared: KVCache | None, batch_tokens: int) -> Tensor:
    """Log-probabilities of the options as shown, summed over their tokens, (questions, options).

    Pads stand on the right, where no real token looks.
    """
    device, start = model.lm_head.weight.device, shared.length if shared else 0
    tails = [one.prompt[start:] for one in batch]
    width = min(_padded(max(map(len, tails))), model.config.max_seq_len - start)
    ids = torch.tensor([tail + [pad] * (width - len(tail)) for tail in tails], device=device)
    cache = _copied(model, shared, [0] * len(batch), start, start + width) if shared else None
    if cache is None and any(one.rest for one in batch):
        cache = _empty(model, len(batch), width)
    hidden, _ = model(ids, cache)
    last = torch.tensor([len(tail) - 1 for tail in tails], device=device)
    firsts = torch.tensor([[option[0] for option in one.options] for one in batch], device=device)
    sums = _log_softmax(model, hidden[torch.arange(len(batch), device=device), last]).gather(1, firsts)
    return sums + _rests(model, batch, pad, cache, batch_tokens) if cache and any(one.rest for one in batch) else sums


def _rests(model: Transformer, batch: list[Asked], pad: int, cache: KVCache, batch_tokens: int) -> Tensor:
    """What the options' tokens behind their first add, (questions, options). Options of similar length go together.

    `cache` holds the prompts. The pads behind them are overwritten: every option begins where its own prompt ends.
    """
    device, lengths = model.lm_head.weight.device, [len(one.prompt) for one in batch]
    options = [option for one in batch for option in one.options]
    sums = torch.zeros(len(options), device=device)
    rows_at_once = _cached_rows(model.config, model.config.max_seq_len)
    for places in _alike([len(option) - 1 for option in options], batch_tokens, rows_at_once):
        rows = [place // len(batch[0].options) for place in places]
        rest, longest = len(options[places[0]]) - 1, max(lengths[row] for row in rows)
        many = _copied(model, cache, rows, longest, longest + rest)
        many.lengths = torch.tensor([lengths[row] for row in rows], device=device)
        padded = [options[place] + [pad] * (rest + 1 - len(options[place])) for place in places]
        tokens = torch.tensor(padded, device=device)
        hidden, _ = model(tokens[:, :-1], many)
        real = torch.tensor([[i < len(options[place]) for i in range(1, rest + 1)] for place in places], device=device)
        found = torch.zeros(real.shape, device=device)
        found[real] = _picked(model, hidden[real], tokens[:, 1:][real])
        sums[places] = found.sum(1)
    return sums.view(len(batch), -1)


def _alike(lengths: list[int], batch_tokens: int, rows: int) -> Iterator[list[int]]:
    """Places of similar lengths, the longest of each part first; what fits into `batch_tokens` and so many rows, or
    one. Zeros are left out."""
    order = sorted((i for i, length in enumerate(lengths) if length), key=lengths.__getitem__, reverse=True)
    while order:
        count = max(min(batch_tokens // lengths[order[0]], rows), 1)
        while count > 1 and 3 * lengths[order[min(count, len(order)) - 1]] < 2 * lengths[order[0]]:
            count -= 1  # shorter ones would be mostly pads
        yield order[:count]
        del order[:count]


def _empty(model: Transformer, rows: int, room: int) -> KVCache:
    """A cache in the number format in which the model computes."""
    weight = model.lm_head.weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
    return KVCache(model.config, rows, room, weight.device, dtype)


def _copied(model: Transformer, cache: KVCache, rows: list[int], length: int, room: int) -> KVCache:
    """A cache with these rows of `cache`, the first `length` tokens of each, and room for more."""
    many = KVCache(model.config, len(rows), room, cache.keys.device, cache.keys.dtype)
    many.length = length
    many.keys[:, :, :, :length] = cache.keys[:, rows, :, :length]
    many.values[:, :, :, :length] = cache.values[:, rows, :, :length]
    return many


def _picked(model: Transformer, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token behind its hidden state, in blocks: (n, dim), (n,) -> (n,)."""
    rows = max(LARGEST_LOGITS // model.config.vocab_size, 1)
    pairs = zip(hidden.split(rows), tokens.split(rows), strict=True)
    return torch.cat([_log_softmax(model, h).gather(1, t[:, None])[:, 0] for h, t in pairs])


def _log_softmax(model: Transformer, hidden: Tensor) -> Tensor:
    """fp32 whatever the number format: in bf16, letters tie that are not equal. (n, dim) -> (n, vocab)."""
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), model.lm_head.weight.float()).log_softmax(-1)
