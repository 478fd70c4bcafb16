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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.errors import UserError
from corpus.chats import Message
from corpus.examples import ChatExample, read_chat_examples
from corpus.language import detect_language
from corpus.readers import read_texts
from corpus.render_chats import render_chat_examples
from corpus.stats import DataStats
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer
from trainer.loss import IGNORE_INDEX, token_log_probs

WINDOWS_PER_BATCH = 16  # windows in one forward pass
MAX_WINDOW_TOKENS = 16_384  # at most so many tokens in one forward pass; a single longer window is allowed
MAX_BYTES = 100_000  # bytes read of each text, and of the answers in each language


@dataclass(frozen=True)
class ScoredSequence:
    """A sequence to score: `ids` (n,), and `score_mask` (n,): 1 where a token is scored, 0 for the first token."""

    ids: list[int]
    score_mask: list[int]
    utf8_bytes: int


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
    sequences, changed = [], 0
    for text in texts:
        ids = tokenizer.encode(text)
        changed += tokenizer.decode(ids) != text
        sequences.append(ScoredSequence(start + ids, [0] + [1] * len(ids), len(text.encode())))
    nats, tokens = (
        negative_log_probs(model, sequences, batch_size),
        sum(len(sequence.ids) - 1 for sequence in sequences),
    )
    result = _bits_per_byte_fields(nats, [sequence.utf8_bytes for sequence in sequences])
    return result | {"tokens": tokens, "documents": len(sequences), "changed": changed}


def sft_loss(
    model: Transformer, tokenizer: ChatTokenizer, chats: Iterable[list[Message]], batch_size: int = WINDOWS_PER_BATCH
) -> dict[str, Any]:
    """{"loss" (nats per trained token), "error", "bits_per_byte" of the answers, "tokens", "chats", "dropped"}.

    Masks and the truncation of long chats are those of SFT. `dropped`: chats whose first turn exceeds the context.
    """
    items = [ChatExample(messages) for messages in chats]
    rendered = render_chat_examples(items, tokenizer, model.config.max_seq_len, DataStats())
    sequences = [ScoredSequence(ids, mask, utf8_bytes) for documents in rendered for ids, mask, utf8_bytes in documents]
    dropped = sum(not documents for documents in rendered)
    if not sequences:
        return {"loss": None, "error": None, "bits_per_byte": None, "tokens": 0, "chats": 0, "dropped": dropped}
    nats, tokens = (
        negative_log_probs(model, sequences, batch_size),
        [sum(sequence.score_mask[1:]) for sequence in sequences],
    )
    loss, error = ratio_with_error(nats, tokens)
    bits = _bits_per_byte_fields(nats, [sequence.utf8_bytes for sequence in sequences])["bits_per_byte"]
    counts = {"tokens": sum(tokens), "chats": len(sequences), "dropped": dropped}
    return {"loss": loss, "error": error, "bits_per_byte": bits, **counts}


@torch.inference_mode()
def negative_log_probs(
    model: Transformer, sequences: Sequence[ScoredSequence], batch_size: int = WINDOWS_PER_BATCH
) -> list[float]:
    """The sum of -ln p over the scored tokens of each sequence, in nats; long sequences use a sliding window."""
    limit = model.config.max_seq_len
    queue = [
        (number, *window) for number, sequence in enumerate(sequences) for window in sliding_windows(sequence, limit)
    ]
    queue.sort(key=lambda window: len(window[1]))
    sums, device = [0.0] * len(sequences), model.lm_head.weight.device
    was_training = model.training
    model.eval()
    try:
        while queue:  # longest first: an out-of-memory error comes at once
            width = len(queue[-1][1])
            count = max(1, min(batch_size, MAX_WINDOW_TOKENS // width))
            queue, batch = queue[:-count], queue[-count:]
            ids = torch.tensor([inputs + [0] * (width - len(inputs)) for _, inputs, _ in batch], device=device)
            labels = torch.tensor(
                [targets + [IGNORE_INDEX] * (width - len(targets)) for *_, targets in batch], device=device
            )
            with torch.autocast(device.type, enabled=False):
                hidden, _ = model(ids)
                log_probs = token_log_probs(hidden, model.lm_head.weight, labels)
            found = log_probs.double().sum(-1) if device.type != "mps" else log_probs.cpu().double().sum(-1)
            for (number, *_), value in zip(batch, found.tolist(), strict=True):
                sums[number] -= value
    finally:
        model.train(was_training)
    return sums


def sliding_windows(sequence: ScoredSequence, limit: int) -> Iterable[tuple[list[int], list[int]]]:
    """(inputs, labels) of at most `limit` tokens each: every scored token is a label in exactly one window."""
    labels = [token if flag else IGNORE_INDEX for token, flag in zip(sequence.ids, sequence.score_mask, strict=True)][
        1:
    ]
    step = max(1, limit // 2)
    for start in itertools.count(0, step):
        inputs, targets = sequence.ids[start : start + limit], labels[start : start + limit]
        inputs = inputs[: len(targets)]  # the last token has no label
        num_seen = limit - step if start else 0  # labels already scored in the previous window
        if any(label != IGNORE_INDEX for label in targets[num_seen:]):
            yield inputs, [IGNORE_INDEX] * min(num_seen, len(targets)) + targets[num_seen:]
        if start + limit >= len(labels):
            return


def _bits_per_byte_fields(nats: list[float], utf8_bytes: list[int]) -> dict[str, Any]:
    value, error = ratio_with_error([value / math.log(2) for value in nats], utf8_bytes)
    return {"bits_per_byte": value, "error": error, "bytes": sum(utf8_bytes)}


def ratio_with_error(parts: Sequence[float], sizes: Sequence[int]) -> tuple[float | None, float | None]:
    """(sum(parts) / sum(sizes), its standard error over the samples); None where the ratio or error is undefined."""
    total, n = sum(sizes), len(parts)
    if not total:
        return None, None
    value = sum(parts) / total
    spread = sum((part - value * size) ** 2 for part, size in zip(parts, sizes, strict=True))
    return value, math.sqrt(spread * n / (n - 1)) / total if n > 1 else None
