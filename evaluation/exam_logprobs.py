"""Batched log-probabilities of an exam's options.

    * questions of similar length form a batch of up to `batch_tokens` positions
    * the few-shot examples of a subject are computed once and shared through a KVCache
    * the options of a question share one forward pass over the prompt, which also predicts their first tokens; their
      remaining tokens are batched with options of similar length
    * logits are computed only at the positions that predict an option's tokens

Shared keys and values are copied to every row of a batch. The results equal those of one option at a time
(tests/evaluation/test_exam_logprobs.py).
Read next: exam_prompts.py (the prompts), ../model/transformer.py (the cache).
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from evaluation.chat_model import ChatModel
from evaluation.exam_prompts import ExamPrompt
from model.config import ModelConfig
from model.transformer import KVCache, Transformer

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 16384  # larger batches overflow CPU caches: 4096 took 1.5 times as long
_WIDTH_MULTIPLE = 16  # padded widths are multiples of it, because CPU kernels are prepared for each new shape
MIN_SHARED_TOKENS = 32  # a shorter common prefix is not shared
_MAX_BLOCK_LOGITS = 1 << 24  # values in one block of logits
MAX_CACHE_BYTES = 1 << 30  # bytes of keys and values, for 16-bit values


@torch.inference_mode()
def compute_option_log_probs(
    chat_model: ChatModel, prompts: list[ExamPrompt], method: str, batch_tokens: int = 0
) -> Iterator[ExamPrompt]:
    """Fill `log_probs` of every prompt, batch by batch; yields the prompts.

    batch_tokens: positions per forward pass. 0: the default of the device. 1: one question at a time, nothing shared.
    Raises UserError when a log-probability is not finite.
    """
    model, pad = chat_model.model, chat_model.tokenizer.pad_id
    batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if chat_model.device.type == "cpu" else GPU_BATCH_TOKENS)
    for group, num_shared in _shared_prefix_groups(prompts, batch_tokens):
        shared_cache = None
        if num_shared:
            with chat_model.autocast():
                shared_cache = _empty_cache(model, 1, num_shared)
                model(torch.tensor([group[0].prompt[:num_shared]], device=chat_model.device), shared_cache)
        for batch in _similar_length_batches(group, num_shared, batch_tokens, model.config):
            with chat_model.autocast():
                sums = _option_log_probs(model, batch, pad, shared_cache, batch_tokens)
            for question, log_probs in zip(batch, sums.tolist(), strict=True):
                _store_log_probs(question, log_probs, method)
            yield from batch


def _store_log_probs(question: ExamPrompt, log_probs: list[float], method: str) -> None:
    """Store the sums in the file's option order; method "text" divides by the characters of the option."""
    normalized = [0.0] * len(question.order)
    for index, option in enumerate(question.order):
        normalized[option] = log_probs[index] / (len(question.item.options[option]) if method == "text" else 1)
    if not all(map(math.isfinite, normalized)):
        raise UserError(
            f"{question.item.location}: the log-probabilities are not finite: the model's weights are damaged"
        )
    question.log_probs = tuple(normalized)


def _shared_prefix_groups(prompts: list[ExamPrompt], batch_tokens: int) -> Iterator[tuple[list[ExamPrompt], int]]:
    """(questions with the same examples and number of options, length of their common token prefix or 0)."""
    groups: dict[tuple[int, str, int], list[ExamPrompt]] = {}
    for question in prompts:
        group_key = (question.item.subject, question.num_shots) if question.num_shots and batch_tokens > 1 else ("", 0)
        groups.setdefault((len(question.options), *group_key), []).append(question)
    for group in groups.values():
        num_shared = 0
        if group[0].num_shots and len(group) > 1 and batch_tokens > 1:
            first, last = min(question.prompt for question in group), max(question.prompt for question in group)
            shortest = min(len(question.prompt) for question in group)
            differs = (i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1])
            num_shared = min(next(differs, shortest), shortest - 1)  # the last token predicts the option
        yield group, num_shared if num_shared >= MIN_SHARED_TOKENS else 0


def _similar_length_batches(
    prompts: list[ExamPrompt], num_shared: int, batch_tokens: int, config: ModelConfig
) -> Iterator[list[ExamPrompt]]:
    """Batches of questions of similar length, longest first: up to `batch_tokens` positions, at least one question."""
    batch: list[ExamPrompt] = []
    longest_prompt = longest_continuation = 0  # in the batch
    for question in sorted(
        prompts, key=lambda question: (len(question.prompt), question.continuation_length), reverse=True
    ):
        longest = max(longest_prompt, len(question.prompt)), max(longest_continuation, question.continuation_length)
        width = _padded_width(longest[0] - num_shared)
        rows = batch_tokens // width
        if num_shared or longest[1]:
            rows = min(rows, _max_cache_rows(config, num_shared + width))
        if batch and (len(batch) >= rows or sum(longest) > config.max_seq_len):
            yield batch
            batch, longest = [], (len(question.prompt), question.continuation_length)
        batch.append(question)
        longest_prompt, longest_continuation = longest
    yield batch


def _max_cache_rows(config: ModelConfig, length: int) -> int:
    """The number of rows of `length` tokens in a cache of MAX_CACHE_BYTES."""
    return MAX_CACHE_BYTES // (length * 4 * config.n_layers * config.n_kv_heads * config.head_dim)


def _padded_width(length: int) -> int:
    return -(-length // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE


def _option_log_probs(
    model: Transformer, batch: list[ExamPrompt], pad: int, shared_cache: KVCache | None, batch_tokens: int
) -> Tensor:
    """Log-probability of each option, summed over its tokens, in the order of the prompt: (questions, options).

    Padding is on the right, where causal attention of the real tokens does not reach it.
    """
    device, num_shared = model.lm_head.weight.device, shared_cache.length if shared_cache else 0
    tails = [question.prompt[num_shared:] for question in batch]
    width = min(_padded_width(max(map(len, tails))), model.config.max_seq_len - num_shared)
    ids = torch.tensor([tail + [pad] * (width - len(tail)) for tail in tails], device=device)
    cache = _copy_cache(model, shared_cache, [0] * len(batch), num_shared, num_shared + width) if shared_cache else None
    if cache is None and any(question.continuation_length for question in batch):
        cache = _empty_cache(model, len(batch), width)
    hidden, _ = model(ids, cache)
    last = torch.tensor([len(tail) - 1 for tail in tails], device=device)
    firsts = torch.tensor([[option[0] for option in question.options] for question in batch], device=device)
    sums = _log_softmax(model, hidden[torch.arange(len(batch), device=device), last]).gather(1, firsts)
    return (
        sums + _continuation_log_probs(model, batch, pad, cache, batch_tokens)
        if cache and any(question.continuation_length for question in batch)
        else sums
    )


def _continuation_log_probs(
    model: Transformer, batch: list[ExamPrompt], pad: int, cache: KVCache, batch_tokens: int
) -> Tensor:
    """Summed log-probability of the options' tokens after the first: (questions, options).

    `cache` holds the prompts. Every option begins at the end of its own prompt and overwrites the padding there.
    """
    device, lengths = model.lm_head.weight.device, [len(question.prompt) for question in batch]
    options = [option for question in batch for option in question.options]
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
    """Groups of indices of similar lengths, longest first: up to `batch_tokens` positions and `rows` rows, at least one
    index. Lengths of 0 are left out."""
    order = sorted((i for i, length in enumerate(lengths) if length), key=lengths.__getitem__, reverse=True)
    while order:
        count = max(min(batch_tokens // lengths[order[0]], rows), 1)
        while count > 1 and 3 * lengths[order[min(count, len(order)) - 1]] < 2 * lengths[order[0]]:
            count -= 1  # shorter ones would be mostly padding
        yield order[:count]
        del order[:count]


def _empty_cache(model: Transformer, rows: int, capacity: int) -> KVCache:
    """A cache in the dtype of the forward pass."""
    weight = model.lm_head.weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
    return KVCache(model.config, rows, capacity, weight.device, dtype)


def _copy_cache(model: Transformer, cache: KVCache, rows: list[int], length: int, capacity: int) -> KVCache:
    """A cache of `capacity` tokens with the first `length` tokens of the given rows of `cache`."""
    expanded = KVCache(model.config, len(rows), capacity, cache.keys.device, cache.keys.dtype)
    expanded.length = length
    expanded.keys[:, :, :, :length] = cache.keys[:, rows, :, :length]
    expanded.values[:, :, :, :length] = cache.values[:, rows, :, :length]
    return expanded


def _token_log_probs(model: Transformer, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token given its hidden state, in blocks: (n, dim), (n,) -> (n,)."""
    rows = max(_MAX_BLOCK_LOGITS // model.config.vocab_size, 1)
    pairs = zip(hidden.split(rows), tokens.split(rows), strict=True)
    return torch.cat([_log_softmax(model, h).gather(1, t[:, None])[:, 0] for h, t in pairs])


def _log_softmax(model: Transformer, hidden: Tensor) -> Tensor:
    """(n, dim) -> (n, vocab), always in fp32: bf16 rounds different letters to equal values."""
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), model.lm_head.weight.float()).log_softmax(-1)
