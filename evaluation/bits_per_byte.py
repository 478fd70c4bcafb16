"""How well does a model predict text that it has not seen? In a unit that does not depend on the tokenizer.

    bits per byte = sum over tokens of -log2 p(token | what stands before) / UTF-8 bytes of the text
    SFT loss      = mean over trained tokens of -ln p(token | chat until there)    also in bits per byte of the answers

A document begins behind the token that begins documents in pretraining. One that is longer than the context is read
through a sliding window: every window moves on by half the context, so each token is predicted once, and from the
second window on with at least half a context before it. Windows depend on the context alone, never on the batch.
The products are made in fp32 on every machine: a score is no place for rounding. Sums are kept in fp64.

The error is that of a ratio estimated from a sample of documents (Cochran, Sampling Techniques, 6.4): one standard
error, and it knows nothing of other texts than those.
Read next: report.py (who asks), ../corpus/prepare_chats.py (how chats are cut for training).
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.errors import UserError
from corpus.chats import Message
from corpus.examples import Example, read_chat_examples
from corpus.language import detect_language
from corpus.readers import read_texts
from corpus.render_chats import render_chat_examples
from corpus.stats import DataStats
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer
from trainer.loss import IGNORE_INDEX, token_log_probs

WINDOWS_PER_BATCH = 16  # windows that go through the model together
MAX_WINDOW_TOKENS = 16_384  # and at most so many tokens, but for a single window
MAX_BYTES = 100_000  # read from the start of a text, and of the answers in one language


@dataclass(frozen=True)
class ScoredSequence:
    """Something to predict: `ids` (n,), of which those flagged in `score_mask` (n,) count; the first one never does."""

    ids: list[int]
    score_mask: list[int]
    utf8_bytes: int


# ---- reading ---------------------------------------------------------------------------------------------------------
def read_named_texts(names: Sequence[str], max_bytes: int = MAX_BYTES) -> dict[str, dict[str, Any]]:
    """{"zh": {"file", "texts", "bytes"}} for each `zh=FILE`; without a name, the language of the first document is it.

    Any format of corpus/readers.py; at most `max_bytes` of each, the last document cut there. Raises UserError.
    """
    found: dict[str, dict[str, Any]] = {}
    for entry in names:
        name, equals, path = entry.partition("=")
        if not equals or not name.replace("_", "").isalnum() or len(name) > 12:
            name, path = "", entry
        texts = list(_limit_bytes(read_texts([path], DataStats()), max_bytes))
        if not texts:
            raise UserError(f"{path}: no text in it to measure bits per byte on")
        name = name or detect_language(texts[0])
        if name in found:
            raise UserError(
                f"--texts: {found[name]['file']} and {path} are both {name}: give them names, as law={path}"
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
    """The chats of a file by language, until their answers have `max_bytes` in each. Raises UserError."""
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
        raise UserError(f"{path}: no chat in it to measure the SFT loss on")
    return dict(sorted(found.items(), reverse=True))


# ---- measuring -------------------------------------------------------------------------------------------------------
def bits_per_byte(
    model: Transformer, tokenizer: ChatTokenizer, texts: Iterable[str], batch_size: int = WINDOWS_PER_BATCH
) -> dict[str, Any]:
    """bits_per_byte, its standard error (None for one document), bytes, tokens, documents, and how many documents the
    tokenizer cannot give back as they were (`changed`): of those it predicts something else than the text."""
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
    """loss (nats per trained token), its standard error, bits_per_byte of the answers, tokens, chats, and `dropped`:
    chats whose first turn is longer than the context. What is trained, and where a long chat is cut, is as in SFT."""
    items = [Example("", messages, "", 0, "", 0) for messages in chats]
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
    """-ln p of the scored tokens, summed for each row; rows longer than the context through a sliding window."""
    limit = model.config.max_seq_len
    queue = [
        (number, *window) for number, sequence in enumerate(sequences) for window in sliding_windows(sequence, limit)
    ]
    queue.sort(key=lambda window: len(window[1]))
    sums, device = [0.0] * len(sequences), model.lm_head.weight.device
    was_training = model.training
    model.eval()
    try:
        while queue:  # the longest first: too little memory shows at once
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
    """(inputs, labels) of at most `limit` tokens each: every scored token is the label of exactly one window."""
    labels = [token if flag else IGNORE_INDEX for token, flag in zip(sequence.ids, sequence.score_mask, strict=True)][
        1:
    ]
    step = max(1, limit // 2)
    for start in itertools.count(0, step):
        inputs, targets = sequence.ids[start : start + limit], labels[start : start + limit]
        inputs = inputs[: len(targets)]  # nothing follows the last token
        num_seen = limit - step if start else 0  # labels that the window before this one has
        if any(label != IGNORE_INDEX for label in targets[num_seen:]):
            yield inputs, [IGNORE_INDEX] * min(num_seen, len(targets)) + targets[num_seen:]
        if start + limit >= len(labels):
            return


def _bits_per_byte_fields(nats: list[float], utf8_bytes: list[int]) -> dict[str, Any]:
    value, error = ratio_with_error([value / math.log(2) for value in nats], utf8_bytes)
    return {"bits_per_byte": value, "error": error, "bytes": sum(utf8_bytes)}


def ratio_with_error(parts: Sequence[float], sizes: Sequence[int]) -> tuple[float | None, float | None]:
    """sum(parts) / sum(sizes), and its standard error from the spread over the samples; None where there is none."""
    total, n = sum(sizes), len(parts)
    if not total:
        return None, None
    value = sum(parts) / total
    spread = sum((part - value * size) ** 2 for part, size in zip(parts, sizes, strict=True))
    return value, math.sqrt(spread * n / (n - 1)) / total if n > 1 else None
