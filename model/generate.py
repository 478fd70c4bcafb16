"""The one generator: token ids in, answers out, for every front end.

    join     prompts in one forward pass, keys and values into the cache; the first token of each is drawn
    step     the drawn tokens in, one more token of every row out; a row that has ended leaves

`Batch` holds the rows that are decoded together: they may join and leave between any two tokens, each draws for itself
and is answered as if it were alone. `generate` answers a list of prompts with it, `stream` yields the text of one
answer as it grows, and the server (serving/engine.py) lets rows join as requests come.

Called by 2-eval.py and every other front end. Read next: sampling.py (how a token is drawn), text_stream.py (how ids
become text), transformer.py (KVCache), chat.py (who renders a prompt).
"""

import bisect
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.chat import ChatTokenizer, Message
from model.sampling import Sampling, choose_each, penalise_counts, penalise_repetition
from model.text_stream import TextStream
from model.transformer import KVCache, Transformer

FIRST_ROOM = 64  # tokens that a fresh cache has room for; it doubles when they are full


@dataclass
class TokenProbability:
    """log p of a drawn token, and the likeliest tokens there, likeliest first, as (id, log p).

    They are the model's own: before penalties, temperature and filters, over the tokens that may be drawn at all.
    """

    id: int
    logprob: float
    likeliest: list[tuple[int, float]]


@dataclass
class Answer:
    """`ids`: the new tokens without the closing marker. `text`: what they say, cut before a stop string.

    `finish_reason`: "stop" (closing marker or stop string) or "length" (max_new_tokens or max_seq_len); "" until then.
    `logprobs`: one entry per id, where the settings ask for them.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    logprobs: list[TokenProbability] = field(default_factory=list)


class Row:
    """One prompt, how it is to be answered, and what has become of it."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: ChatTokenizer,
        prompt: list[int],
        settings: Sampling,
        answer: Answer,
        number: int = 0,
    ) -> None:
        """`number`: of this row among those with the same settings; it is added to their seed.

        Raises ValueError for a prompt that is empty or longer than max_seq_len; one that fills it has ended already.
        """
        limit, seed = model.config.max_seq_len, settings.seed
        if not prompt:
            raise ValueError("the prompt is empty: there is no token to go on from")
        if len(prompt) > limit:
            raise ValueError(f"the prompt has {len(prompt)} tokens, the model reads at most {limit} (max_seq_len)")
        self.prompt, self.settings, self.answer = prompt, settings, answer
        self.text = TextStream(tokenizer, settings.stop)
        self.draws = random.Random(None if seed is None else seed + number)
        self.left = min(settings.max_new_tokens, limit - len(prompt))  # tokens that may still be drawn
        self.cached = 0  # tokens whose keys and values are in the cache
        self.last = prompt[-1]  # the token that the next step reads
        weight = model.lm_head.weight
        self.seen: Tensor | None = None  # (vocab,) bool: tokens of prompt and answer
        self.counts: Tensor | None = None  # (vocab,) how often the answer has each token
        if settings.repetition_penalty != 1:
            self.seen = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
            self.seen[prompt] = True
            self.seen[tokenizer.stop_ids] = False  # the marker that ends a turn is no repeated word
        if settings.counts_repeats:
            self.counts = torch.zeros(weight.shape[0], device=weight.device)
        if not self.left:
            answer.finish_reason = "length"

    def penalised(self, logits: Tensor) -> Tensor:
        """Logits (1, vocab) after this row's own penalties."""
        if self.seen is not None:
            logits = penalise_repetition(logits, self.seen, self.settings.repetition_penalty)
        if self.counts is not None:
            presence, frequency = self.settings.presence_penalty, self.settings.frequency_penalty
            logits = penalise_counts(logits, self.counts, presence, frequency)
        return logits

    def take(self, token: int, is_stop: bool) -> str:
        """Note a drawn token; returns the text that it released."""
        self.left -= 1
        self.last = token
        piece = ""
        if not is_stop:
            self.answer.ids.append(token)
            piece = self.text.push(token)
            if self.seen is not None:
                self.seen[token] = True
            if self.counts is not None:
                self.counts[token] += 1
        if is_stop or self.text.stopped or not self.left:
            piece += self.text.finish()
            self.answer.finish_reason = "stop" if is_stop or self.text.stopped else "length"
        self.answer.text += piece
        return piece


class Batch:
    """Rows that are decoded together in the first places of one cache, which grows with them.

    An autocast context around the calls decides the number format; the model is to be in eval mode.
    """

    def __init__(self, model: Transformer, tokenizer: ChatTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.rows: list[Row] = []
        self.cache: KVCache | None = None
        self.device, entries = model.lm_head.weight.device, model.lm_head.weight.shape[0]
        self.stop_ids = frozenset(tokenizer.stop_ids)
        self.forbidden = torch.zeros(entries, dtype=torch.bool, device=self.device)  # other markers, spare rows
        self.forbidden[[*(tokenizer.special_ids - self.stop_ids), *range(tokenizer.vocab_size, entries)]] = True

    @torch.inference_mode()
    def join(self, rows: list[Row]) -> list[tuple[Row, str]]:
        """Read the prompts and draw each row's first token; returns each row's first text."""
        dynamic = self.model.config.rope_scaling.get("rope_type") == "dynamic"
        if dynamic and len({len(row.prompt) for row in rows}) > 1:  # its angles depend on the length: no padding
            return [piece for row in rows for piece in self.join([row])]
        first, end = len(self.rows), len(self.rows) + len(rows)
        width = max(len(row.prompt) for row in rows)
        cache = self._make_room(end, width)
        # Padding on the right needs no mask, and the row's next tokens are written over it.
        ids = [row.prompt + [self.tokenizer.pad_id] * (width - len(row.prompt)) for row in rows]
        hidden, _ = self.model(torch.tensor(ids, device=self.device), cache.part(first, end))
        last = torch.tensor([len(row.prompt) - 1 for row in rows], device=self.device)
        for row in rows:
            row.cached = len(row.prompt)
        self.rows += rows
        return self._draw(rows, hidden[torch.arange(len(rows), device=self.device), last])

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, str]]:
        """Draw one more token of every row; returns the text that each released. Rows that have ended are gone then."""
        rows, cached = list(self.rows), [row.cached for row in self.rows]
        cache = self._make_room(len(rows), max(cached) + 1)
        ids = torch.tensor([[row.last] for row in rows], device=self.device)
        hidden, _ = self.model(ids, cache.part(0, len(rows), cached))
        for row in rows:
            row.cached += 1
        return self._draw(rows, hidden[:, -1])

    @torch.inference_mode()
    def leave(self, row: Row) -> None:
        """Take a row out; the last one moves to its place. Keys carry their position: moved, they are the same."""
        place, last = self.rows.index(row), self.rows.pop()
        if last is not row:
            self.rows[place] = last
        if not self.rows:
            self.cache = None
        for kept in (self.cache.keys, self.cache.values) if self.cache else ():
            if last is not row:
                kept[:, place, :, : last.cached] = kept[:, len(self.rows), :, : last.cached]
            kept[:, len(self.rows)] = 0  # nothing of one conversation stays for the next

    def _make_room(self, rows: int, tokens: int) -> KVCache:
        """The cache, large enough for so many rows of so many tokens."""
        old, limit = self.cache, self.model.config.max_seq_len
        if old and old.keys.shape[1] >= rows and old.max_len >= tokens:
            return old
        autocast = torch.is_autocast_enabled(self.device.type)
        dtype = torch.get_autocast_dtype(self.device.type) if autocast else self.model.lm_head.weight.dtype
        room = max(tokens, FIRST_ROOM)
        if old:
            rows = max(rows, old.keys.shape[1])
            room = old.max_len if old.max_len >= tokens else max(tokens, 2 * old.max_len)
        self.cache = KVCache(self.model.config, rows, min(room, limit), self.device, dtype)
        if old:
            taken, filled = len(self.rows), max((row.cached for row in self.rows), default=0)
            self.cache.keys[:, :taken, :, :filled] = old.keys[:, :taken, :, :filled]
            self.cache.values[:, :taken, :, :filled] = old.values[:, :taken, :, :filled]
        return self.cache

    def _draw(self, rows: list[Row], hidden: Tensor) -> list[tuple[Row, str]]:
        """hidden (rows, dim), after each row's last token -> the text that each row's next token released."""
        logits = self.model.lm_head(hidden).float().masked_fill(self.forbidden, -math.inf)
        own = logits
        if any(row.seen is not None or row.counts is not None for row in rows):
            logits = torch.cat([row.penalised(logits[i : i + 1]) for i, row in enumerate(rows)])
        draws = [row.draws.random() for row in rows]
        tokens = choose_each(logits, [row.settings for row in rows], draws).tolist()
        pieces = []
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            is_stop = token in self.stop_ids
            if row.settings.logprobs is not None and not is_stop:
                row.answer.logprobs.append(_probability(own[i], token, row.settings.logprobs))
            pieces.append((row, row.take(token, is_stop)))
            if row.answer.finish_reason:
                self.leave(row)
        return pieces


def _probability(logits: Tensor, token: int, count: int) -> TokenProbability:
    """logits (vocab,) -> the log-probability of the token and of the `count` likeliest ones."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(count)
    return TokenProbability(token, logprobs[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True)))


def _run(model: Transformer, rows: list[Row], tokenizer: ChatTokenizer) -> Iterator[list[tuple[Row, str]]]:
    """Answer all rows; each step yields the new text of every row still going."""
    rows = [row for row in rows if not row.answer.finish_reason]
    if not rows:
        return
    was_training = model.training
    model.eval()
    batch = Batch(model, tokenizer)
    try:
        yield batch.join(rows)
        while batch.rows:
            yield batch.step()
    finally:
        model.train(was_training)


def generate(
    model: Transformer, prompts: list[list[int]], settings: Sampling, tokenizer: ChatTokenizer
) -> list[Answer]:
    """One answer per prompt (token ids), all in one batch; the model's training flag is left as it was.

    An autocast context around the call decides the number format. Raises ValueError for a prompt that is empty or
    longer than max_seq_len; prompt and answer together stop at max_seq_len with finish reason "length".
    """
    answers = [Answer() for _ in prompts]
    pairs = zip(prompts, answers, strict=True)
    rows = [Row(model, tokenizer, prompt, settings, answer, i) for i, (prompt, answer) in enumerate(pairs)]
    for _ in _run(model, rows, tokenizer):
        pass
    return answers


def stream(
    model: Transformer,
    prompt: list[int],
    settings: Sampling,
    tokenizer: ChatTokenizer,
    answer: Answer | None = None,
) -> Iterator[str]:
    """The text of one answer as it grows, in whole characters. `answer` is filled on the way, for its finish reason.

    Raises ValueError at once (not at the first piece) for a prompt that is empty or too long.
    """
    row = Row(model, tokenizer, prompt, settings, answer if answer is not None else Answer())
    return (piece for pieces in _run(model, [row], tokenizer) for _, piece in pieces if piece)


def fit_chat(tokenizer: ChatTokenizer, messages: list[Message], limit: int) -> list[int]:
    """The rendered chat up to where the assistant speaks, in at most `limit` tokens.

    Whole turns are dropped, oldest first; a system message and the last question stay, even where they alone exceed
    the limit (then `generate` says so).
    """
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    starts = [0, *(i for i, message in enumerate(turns) if i and message["role"] == "user")]

    def rendered(start: int) -> list[int]:
        return tokenizer.render([*system, *turns[start:]], add_generation_prompt=True)[0]

    whole = rendered(0)
    if len(whole) <= limit:
        return whole
    # Fewer turns are never longer: halving finds the first start that fits without rendering all of them.
    first = bisect.bisect_left(starts, True, key=lambda start: len(rendered(start)) <= limit)
    return rendered(starts[min(first, len(starts) - 1)])
