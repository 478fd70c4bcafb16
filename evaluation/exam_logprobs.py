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
from evaluation.exam_prompts import ExamPrompt
from model.config import ModelConfig
from model.tokenizer import ChatTokenizer
from model.transformer import KVCache, Transformer

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 16384  # a larger batch overflows CPU caches: 4096 took half as long again
_WIDTH_MULTIPLE = 16  # widths are multiples of it: a CPU's kernels are prepared for each shape anew
MIN_SHARED_TOKENS = 32  # tokens that a group of questions has in common
_MAX_BLOCK_LOGITS = 1 << 24  # numbers in one block of logits
MAX_CACHE_BYTES = 1 << 30  # bytes of keys and values


@torch.inference_mode()
def compute_option_log_probs(
    model: Transformer,
    tokenizer: ChatTokenizer,
    prompts: list[ExamPrompt],
    method: str,
    autocast_context: Callable[[], AbstractContextManager[Any]],
    batch_tokens: int = 0,
) -> Iterator[int]:
    """Fill `log_probs` of all questions, batch after batch; yields how many each batch held.

    batch_tokens: positions computed at once, 0: what suits the device, 1: one question at a time, which shares nothing
        with others.
    Raises UserError when the model computes no number.
    """
    if not batch_tokens:
        batch_tokens = CPU_BATCH_TOKENS if model.lm_head.weight.device.type == "cpu" else GPU_BATCH_TOKENS
    for group, num_shared in _shared_prefix_groups(prompts, batch_tokens):
        shared_cache = None
        if num_shared:
            with autocast_context():
                shared_cache = _empty_cache(model, 1, num_shared)
                model(torch.tensor([group[0].prompt[:num_shared]], device=model.lm_head.weight.device), shared_cache)
        for batch in _similar_length_batches(group, num_shared, batch_tokens, model.config):
            with autocast_context():
                sums = _option_log_probs(model, batch, tokenizer.pad_id, shared_cache, batch_tokens)
            for one, log_probs in zip(batch, sums.tolist(), strict=True):
                _store_log_probs(one, log_probs, method)
            yield len(batch)


def _store_log_probs(one: ExamPrompt, log_probs: list[float], method: str) -> None:
    """Put the sums of the options as shown where they belong."""
    normalized = [0.0] * len(one.order)
    for index, option in enumerate(one.order):
        normalized[option] = log_probs[index] / (len(one.item.options[option]) if method == "text" else 1)
    if not all(map(math.isfinite, normalized)):
        raise UserError(f"the model computes no number for {one.item.location}: its weights are damaged")
    one.log_probs = tuple(normalized)


def _shared_prefix_groups(prompts: list[ExamPrompt], batch_tokens: int) -> Iterator[tuple[list[ExamPrompt], int]]:
    """Questions with equally many options that begin with the same tokens, and how many these are: those of the shared
    examples."""
    groups: dict[tuple[int, str, int], list[ExamPrompt]] = {}
    for one in prompts:
        group_key = (one.item.subject, one.num_shots) if one.num_shots and batch_tokens > 1 else ("", 0)
        groups.setdefault((len(one.options), *group_key), []).append(one)
    for group in groups.values():
        num_shared = 0
        if group[0].num_shots and len(group) > 1 and batch_tokens > 1:
            first, last = min(one.prompt for one in group), max(one.prompt for one in group)
            shortest = min(len(one.prompt) for one in group)
            differs = (i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1])
            num_shared = min(next(differs, shortest), shortest - 1)  # what comes behind the last token is needed
        yield group, num_shared if num_shared >= MIN_SHARED_TOKENS else 0


def _similar_length_batches(
    prompts: list[ExamPrompt], num_shared: int, batch_tokens: int, config: ModelConfig
) -> Iterator[list[ExamPrompt]]:
    """Questions of similar length, longest first; what fits into `batch_tokens`, or one. `start`: tokens shared."""
    batch: list[ExamPrompt] = []
    prompt = continuation_length = 0  # the longest of the batch
    for one in sorted(prompts, key=lambda one: (len(one.prompt), one.continuation_length), reverse=True):
        longest = max(prompt, len(one.prompt)), max(continuation_length, one.continuation_length)
        width = _padded_width(longest[0] - num_shared)
        rows = batch_tokens // width
        if num_shared or longest[1]:
            rows = min(rows, _max_cache_rows(config, num_shared + width))
        if batch and (len(batch) >= rows or sum(longest) > config.max_seq_len):
            yield batch
            batch, longest = [], (len(one.prompt), one.continuation_length)
        batch.append(one)
        prompt, continuation_length = longest
    yield batch


def _max_cache_rows(config: ModelConfig, length: int) -> int:
    """How many rows of so many tokens a cache may have (of 16-bit numbers)."""
    return MAX_CACHE_BYTES // (length * 4 * config.n_layers * config.n_kv_heads * config.head_dim)


def _padded_width(length: int) -> int:
    return -(-length // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE


def _option_log_probs(
    model: Transformer, batch: list[ExamPrompt], pad: int, shared_cache: KVCache | None, batch_tokens: int
) -> Tensor:
    """Log-probabilities of the options as shown, summed over their tokens, (questions, options).

    Pads stand on the right, where no real token looks.
    """
    device, num_shared = model.lm_head.weight.device, shared_cache.length if shared_cache else 0
    tails = [one.prompt[num_shared:] for one in batch]
    width = min(_padded_width(max(map(len, tails))), model.config.max_seq_len - num_shared)
    ids = torch.tensor([tail + [pad] * (width - len(tail)) for tail in tails], device=device)
    cache = _copy_cache(model, shared_cache, [0] * len(batch), num_shared, num_shared + width) if shared_cache else None
    if cache is None and any(one.continuation_length for one in batch):
        cache = _empty_cache(model, len(batch), width)
    hidden, _ = model(ids, cache)
    last = torch.tensor([len(tail) - 1 for tail in tails], device=device)
    firsts = torch.tensor([[option[0] for option in one.options] for one in batch], device=device)
    sums = _log_softmax(model, hidden[torch.arange(len(batch), device=device), last]).gather(1, firsts)
    return (
        sums + _continuation_log_probs(model, batch, pad, cache, batch_tokens)
        if cache and any(one.continuation_length for one in batch)
        else sums
    )


def _continuation_log_probs(
    model: Transformer, batch: list[ExamPrompt], pad: int, cache: KVCache, batch_tokens: int
) -> Tensor:
    """What the options' tokens behind their first add, (questions, options). Options of similar length go together.

    `cache` holds the prompts. The pads behind them are overwritten: every option begins where its own prompt ends.
    """
    device, lengths = model.lm_head.weight.device, [len(one.prompt) for one in batch]
    options = [option for one in batch for option in one.options]
    sums = torch.zeros(len(options), device=device)
    rows_at_once = _max_cache_rows(model.config, model.config.max_seq_len)
    for indices in _similar_length_groups([len(option) - 1 for option in options], batch_tokens, rows_at_once):
        rows = [index // len(batch[0].options) for index in indices]
        continuation_length, longest = len(options[indices[0]]) - 1, max(lengths[row] for row in rows)
        expanded = _copy_cache(model, cache, rows, longest, longest + continuation_length)
        expanded.lengths = torch.tensor([lengths[row] for row in rows], device=device)
        padded = [options[index] + [pad] * (continuation_length + 1 - len(options[index])) for index in indices]
        tokens = torch.tensor(padded, device=device)
        hidden, _ = model(tokens[:, :-1], expanded)
        is_real = torch.tensor(
            [[i < len(options[index]) for i in range(1, continuation_length + 1)] for index in indices], device=device
        )
        log_probs = torch.zeros(is_real.shape, device=device)
        log_probs[is_real] = _token_log_probs(model, hidden[is_real], tokens[:, 1:][is_real])
        sums[indices] = log_probs.sum(1)
    return sums.view(len(batch), -1)


def _similar_length_groups(lengths: list[int], batch_tokens: int, rows: int) -> Iterator[list[int]]:
    """Places of similar lengths, the longest of each part first; what fits into `batch_tokens` and so many rows, or
    one. Zeros are left out."""
    order = sorted((i for i, length in enumerate(lengths) if length), key=lengths.__getitem__, reverse=True)
    while order:
        count = max(min(batch_tokens // lengths[order[0]], rows), 1)
        while count > 1 and 3 * lengths[order[min(count, len(order)) - 1]] < 2 * lengths[order[0]]:
            count -= 1  # shorter ones would be mostly pads
        yield order[:count]
        del order[:count]


def _empty_cache(model: Transformer, rows: int, capacity: int) -> KVCache:
    """A cache in the number format in which the model computes."""
    weight = model.lm_head.weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
    return KVCache(model.config, rows, capacity, weight.device, dtype)


def _copy_cache(model: Transformer, cache: KVCache, rows: list[int], length: int, capacity: int) -> KVCache:
    """A cache with these rows of `cache`, the first `length` tokens of each, and room for more."""
    expanded = KVCache(model.config, len(rows), capacity, cache.keys.device, cache.keys.dtype)
    expanded.length = length
    expanded.keys[:, :, :, :length] = cache.keys[:, rows, :, :length]
    expanded.values[:, :, :, :length] = cache.values[:, rows, :, :length]
    return expanded


def _token_log_probs(model: Transformer, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token behind its hidden state, in blocks: (n, dim), (n,) -> (n,)."""
    rows = max(_MAX_BLOCK_LOGITS // model.config.vocab_size, 1)
    pairs = zip(hidden.split(rows), tokens.split(rows), strict=True)
    return torch.cat([_log_softmax(model, h).gather(1, t[:, None])[:, 0] for h, t in pairs])


def _log_softmax(model: Transformer, hidden: Tensor) -> Tensor:
    """fp32 whatever the number format: in bf16, letters tie that are not equal. (n, dim) -> (n, vocab)."""
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), model.lm_head.weight.float()).log_softmax(-1)
