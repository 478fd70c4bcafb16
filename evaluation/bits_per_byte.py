"""Loss on held-out text and chats: bits per byte, which does not depend on the tokenizer, and the SFT loss.

    bits per byte = sum over tokens of -log2 p(token | preceding tokens) / UTF-8 bytes of the text
    SFT loss      = mean over trained tokens of -ln p(token | preceding tokens)    also in bits per byte of the answers

Every document begins with the start token of pretraining documents. A document longer than the context is read with a
sliding window whose stride is half the context: each token is predicted once, and after the first window with at least
half a context of preceding tokens. The windows depend on the context only, not on the batch.
Matrix products use fp32 on every device and sums use fp64, so the score does not depend on --dtype.

`error` is one standard error of a ratio estimator over the sampled documents (Cochran, Sampling Techniques, 6.4). It
does not cover texts of other kinds.
Read next: report.py (the caller), ../corpus/prepare_chats.py (how chats are split for training).
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from corpus.chats import Message
from corpus.examples import ChatExample
from corpus.language import detect_language
from corpus.read_examples import read_chat_examples
from corpus.readers import read_texts
from corpus.render_chats import render_chat_examples
from corpus.stats import DataStats
from model.logprobs import row_log_probs
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer

WINDOWS_PER_BATCH = 16  # windows in one forward pass
MAX_WINDOW_TOKENS = 16_384  # at most so many tokens in one forward pass; a single longer window is allowed
MAX_BYTES = 100_000  # bytes read of each text, and of the answers in each language


MaskedIds = tuple[list[int], list[int]]  # ids, mask: 1 where a token is scored; nothing predicts the first one


# ---- reading ---------------------------------------------------------------------------------------------------------
def read_named_texts(names: Sequence[str], max_bytes: int = MAX_BYTES) -> dict[str, dict[str, Any]]:
    """{"zh": {"file", "texts", "bytes"}} for each `zh=FILE`; a FILE without a name gets its first document's language.

    Reads any format of corpus/readers.py, at most `max_bytes` of each file; the last document is truncated there.
    Raises UserError for an unreadable or empty file and for two files of one name.
    """
    found: dict[str, dict[str, Any]] = {}
    for entry in names:
        name, equals, path = entry.partition("=")
        if not equals or not name.replace("_", "").isalnum() or len(name) > 12:
            name, path = "", entry
        texts = list(_limit_bytes(read_texts([path], DataStats()), max_bytes))
        if not texts:
            raise UserError(f"{path}: no text to measure bits per byte on")
        name = name or detect_language(texts[0])
        if name in found:
            raise UserError(
                f"--texts: {found[name]['file']} and {path} are both named {name}: name them, as law={path}"
            )
        found[name] = {"file": path, "texts": texts, "bytes": sum(len(text.encode()) for text in texts)}
    return found


def _limit_bytes(documents: Iterable[Any], max_bytes: int) -> Iterable[str]:
    for document in documents:
        raw = document.text.encode()
        yield raw[:max_bytes].decode(errors="ignore")
        max_bytes -= len(raw)
        if max_bytes <= 0:
            return


def read_chats_by_language(path: str, max_bytes: int = MAX_BYTES) -> dict[str, list[list[Message]]]:
    """The chats of a file by language, up to `max_bytes` of answers in each. Raises UserError where there are none."""
    found: dict[str, list[list[Message]]] = {}
    bytes_left = {"zh": max_bytes, "en": max_bytes}
    for item in read_chat_examples([path], DataStats()):
        if bytes_left[item.language] > 0:
            found.setdefault(item.language, []).append(item.messages)
            answers = (message["content"] for message in item.messages if message["role"] == "assistant")
            bytes_left[item.language] -= sum(len(answer.encode()) for answer in answers)
        elif max(bytes_left.values()) <= 0:
            break
    if not found:
        raise UserError(f"{path}: no chats to measure the SFT loss on")
    return dict(sorted(found.items(), reverse=True))


# ---- measuring -------------------------------------------------------------------------------------------------------
def bits_per_byte(
    model: Transformer, tokenizer: ChatTokenizer, texts: Iterable[str], batch_size: int = WINDOWS_PER_BATCH
) -> dict[str, Any]:
    """{"bits_per_byte", "error" (None for one document), "bytes", "tokens", "documents", "changed"} of the texts.

    `changed` counts the documents that differ after encoding and decoding: the model predicts another text there.
    """
    start = (tokenizer.encode_document("") or [tokenizer.eos_id])[:1]
    documents: list[MaskedIds] = []
    utf8_bytes, changed = [], 0
    for text in texts:
        ids = tokenizer.encode(text)
        changed += tokenizer.decode(ids) != text
        documents.append((start + ids, [0] + [1] * len(ids)))
        utf8_bytes.append(len(text.encode()))
    value, error = ratio_with_error(_bits(negative_log_probs(model, documents, batch_size)), utf8_bytes)
    counts = {"tokens": sum(len(ids) - 1 for ids, _ in documents), "documents": len(documents)}
    return {"bits_per_byte": value, "error": error, "bytes": sum(utf8_bytes), **counts, "changed": changed}


def sft_loss(
    model: Transformer, tokenizer: ChatTokenizer, chats: Iterable[list[Message]], batch_size: int = WINDOWS_PER_BATCH
) -> dict[str, Any]:
    """{"loss" (nats per trained token), "error", "bits_per_byte" of the answers, "tokens", "chats", "dropped"}.

    Masks and the truncation of long chats are those of SFT. `dropped`: chats whose first turn exceeds the context.
    """
    items = [ChatExample(messages) for messages in chats]
    rendered = render_chat_examples(items, tokenizer, model.config.max_seq_len, DataStats())
    samples = [sample for samples_of_chat in rendered for sample in samples_of_chat]
    nats = negative_log_probs(model, [(ids, mask) for ids, mask, _ in samples], batch_size)
    tokens = [sum(mask[1:]) for _, mask, _ in samples]
    loss, error = ratio_with_error(nats, tokens)
    bits, _ = ratio_with_error(_bits(nats), [utf8_bytes for *_, utf8_bytes in samples])
    counts = {"tokens": sum(tokens), "chats": len(samples), "dropped": sum(not samples for samples in rendered)}
    return {"loss": loss, "error": error, "bits_per_byte": bits, **counts}


def negative_log_probs(
    model: Transformer, sequences: Sequence[MaskedIds], batch_size: int = WINDOWS_PER_BATCH
) -> list[float]:
    """The sum of -ln p over the scored tokens of each sequence, in nats; long sequences use a sliding window."""
    limit, sums = model.config.max_seq_len, [0.0] * len(sequences)
    queue = [(number, window) for number, each in enumerate(sequences) for window in sliding_windows(*each, limit)]
    queue.sort(key=lambda window: len(window[1][0]))
    while queue:  # longest first: an out-of-memory error comes at once
        count = max(1, min(batch_size, MAX_WINDOW_TOKENS // (len(queue[-1][1][0]) - 1)))
        queue, batch = queue[:-count], queue[-count:]
        log_probs = fp32_log_probs(model, [window for _, window in batch])
        for (number, _), value in zip(batch, log_probs.sum(1).tolist(), strict=True):
            sums[number] -= value
    return sums


def fp32_log_probs(model: Transformer, rows: list[MaskedIds]) -> Tensor:
    """`row_log_probs` with fp32 matrix products and in eval mode: (rows, longest row - 1)."""
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(model.lm_head.weight.device.type, enabled=False):
            return row_log_probs(model, rows, pad_id=0)
    finally:
        model.train(was_training)


def sliding_windows(ids: list[int], mask: list[int], limit: int) -> Iterator[MaskedIds]:
    """(ids, mask) of at most `limit` inputs and the token after them: every token is scored in exactly one window."""
    step = max(1, limit // 2)
    for start in itertools.count(0, step):
        num_seen = limit - step + 1 if start else 1  # tokens scored in the previous window; nothing predicts the first
        window, end = ids[start : start + limit + 1], start + limit + 1
        window_mask = [0] * min(num_seen, len(window)) + mask[start + num_seen : end]
        if any(window_mask):
            yield window, window_mask
        if end >= len(ids):
            return


def _bits(nats: list[float]) -> list[float]:
    return [value / math.log(2) for value in nats]


def ratio_with_error(parts: Sequence[float], sizes: Sequence[int]) -> tuple[float | None, float | None]:
    """(sum(parts) / sum(sizes), its standard error over the samples); None where the ratio or error is undefined."""
    total, n = sum(sizes), len(parts)
    if not total:
        return None, None
    value = sum(parts) / total
    spread = sum((part - value * size) ** 2 for part, size in zip(parts, sizes, strict=True))
    return value, math.sqrt(spread * n / (n - 1)) / total if n > 1 else None
