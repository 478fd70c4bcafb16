"""The one generator: token ids in, answers out, for every front end.

    join     prompts in one forward pass, keys and values into the cache; the first token of each is drawn
    step     the drawn tokens in, one more token of every row out; a row that has ended leaves

`Batch` holds the rows that are decoded together: they may join and leave between any two tokens, each draws for itself
and is answered as if it were alone. A row with num_beams > 1 takes so many slots of the cache, one per beam; its text
is known, and comes out as one piece, when the search has ended. `generate` answers a list of prompts with it, `stream`
yields the text of one answer as it grows, and the server (serving/scheduler.py) lets rows join as requests come.

Called by 2-eval.py and every other front end. Read next: completion.py (Row), sampling.py (how a token is drawn),
beams.py (beam search), detokenizer.py (how ids become text), transformer.py (KVCache), tokenizer.py (prompts).
"""

import bisect
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from model.beams import BeamSearch
from model.chat_template import Message
from model.completion import Answer, Row, Slot
from model.logprobs import prompt_logprobs, token_logprob
from model.sampling import Sampling, choose_each
from model.tokenizer import ChatTokenizer
from model.transformer import KVCache, Transformer

FIRST_ROOM = 64  # tokens that a fresh cache has room for; it doubles when they are full


class Batch:
    """Rows that are decoded together in the first places of one cache, which grows with them.

    An autocast context around the calls decides the number format; the model is to be in eval mode.
    """

    def __init__(self, model: Transformer, tokenizer: ChatTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.slots: list[Slot] = []  # slot i lies in row i of the cache
        self.cache: KVCache | None = None
        self.device, entries = model.lm_head.weight.device, model.lm_head.weight.shape[0]
        self.stop_ids = frozenset(tokenizer.stop_ids)
        self.forbidden = torch.zeros(entries, dtype=torch.bool, device=self.device)  # other markers, spare rows
        self.forbidden[[*(tokenizer.special_ids - self.stop_ids), *range(tokenizer.vocab_size, entries)]] = True

    @property
    def rows(self) -> list[Row]:
        """The rows that are being answered."""
        return list(dict.fromkeys(slot.row for slot in self.slots))

    @torch.inference_mode()
    def join(self, rows: list[Row]) -> list[tuple[Row, str]]:
        """Read the prompts and draw each row's first token; returns each row's first text."""
        dynamic = self.model.config.rope_scaling.get("rope_type") == "dynamic"
        if dynamic and len({len(row.prompt) for row in rows}) > 1:  # angles depend on the length: no padding
            return [piece for row in rows for piece in self.join([row])]
        first, end = len(self.slots), len(self.slots) + len(rows)
        others = [slot for row in rows for slot in row.slots[1:]]  # the beams' own, which share the prompt
        width = max(len(row.prompt) for row in rows)
        cache = self._make_room(end + len(others), width)
        # Padding on the right needs no mask, and the row's next tokens are written over it.
        ids = [row.prompt + [self.tokenizer.pad_id] * (width - len(row.prompt)) for row in rows]
        hidden, _ = self.model(torch.tensor(ids, device=self.device), cache.part(first, end))
        for row in rows:
            row.cached = len(row.prompt)
        self.slots += [row.slots[0] for row in rows] + others
        if others:
            sources = [first + i for i, row in enumerate(rows) for _ in row.slots[1:]]
            cache.copy_rows(sources, list(range(end, end + len(others))), width)
        for row, states in zip(rows, hidden, strict=True):
            if row.settings.prompt_logprobs is not None:
                row.answer.prompt_logprobs = prompt_logprobs(
                    self.model.lm_head, states, row.prompt, row.settings.prompt_logprobs
                )
        pieces = [(row, "") for row in rows if not row.left]  # only their prompts were to be read
        for row, _ in pieces:
            self.leave(row)
        which = [i for i, row in enumerate(rows) for _ in row.slots if row.left]
        if not which:
            return pieces
        last = torch.tensor([[i, len(rows[i].prompt) - 1] for i in which], device=self.device)
        drawn = [slot for row in rows for slot in row.slots if row.left]
        return pieces + self._draw(drawn, hidden[last[:, 0], last[:, 1]])

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, str]]:
        """Draw one more token of every row; returns the text that each released. Rows that have ended are gone then."""
        slots, cached = list(self.slots), [slot.row.cached for slot in self.slots]
        cache = self._make_room(len(slots), max(cached) + 1)
        ids = torch.tensor([[slot.last] for slot in slots], device=self.device)
        hidden, _ = self.model(ids, cache.part(0, len(slots), cached))
        for row in self.rows:
            row.cached += 1
        return self._draw(slots, hidden[:, -1])

    @torch.inference_mode()
    def leave(self, row: Row) -> None:
        """Remove a row; the last slots take its place. RoPE is already applied to cached keys, so they can be moved."""
        cache = self.cache
        assert cache
        for slot in row.slots:
            place, last = self.slots.index(slot), self.slots.pop()
            if last is not slot:
                self.slots[place] = last
                cache.copy_rows([len(self.slots)], [place], last.row.cached)
            for kept in (cache.keys, cache.values):
                kept[:, len(self.slots)] = 0  # no conversation's keys and values remain for another
        if not self.slots:
            self.cache = None

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
            taken, filled = len(self.slots), max((slot.row.cached for slot in self.slots), default=0)
            self.cache.keys[:, :taken, :, :filled] = old.keys[:, :taken, :, :filled]
            self.cache.values[:, :taken, :, :filled] = old.values[:, :taken, :, :filled]
        return self.cache

    def _draw(self, slots: list[Slot], hidden: Tensor) -> list[tuple[Row, str]]:
        """hidden (slots, dim), after each slot's last token -> the text that each row's next token released."""
        logits = self.model.lm_head(hidden).float()
        rows = [slot.row for slot in slots if slot.row.search is None]
        if len(rows) == len(slots):
            return self._draw_plain(rows, logits)
        where = {slot: i for i, slot in enumerate(slots)}
        pieces = self._draw_plain(rows, logits[[where[row.slots[0]] for row in rows]]) if rows else []
        for row in dict.fromkeys(slot.row for slot in slots):
            if row.search:
                pieces.append((row, self._advance(row, row.search, logits[[where[slot] for slot in row.slots]])))
        return pieces

    def _draw_plain(self, rows: list[Row], logits: Tensor) -> list[tuple[Row, str]]:
        """logits (rows, vocab) -> the text that each row's next token released."""
        own = logits = logits.masked_fill(self.forbidden, -math.inf)
        if any(row.penalties for row in rows):
            parts = [(row.penalties, logits[i : i + 1]) for i, row in enumerate(rows)]
            logits = torch.cat([penalties.apply(part) if penalties else part for penalties, part in parts])
        draws = [row.draws.random() for row in rows]
        tokens = choose_each(logits, [row.settings for row in rows], draws).tolist()
        pieces = []
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            is_stop = token in self.stop_ids
            if row.settings.logprobs is not None:
                probability = token_logprob(own[i], token, row.settings.logprobs)
                if is_stop:
                    row.answer.stop_logprob = probability
                else:
                    row.answer.logprobs.append(probability)
            pieces.append((row, row.take(token, is_stop)))
            if row.answer.finish_reason:
                self.leave(row)
        return pieces

    def _advance(self, row: Row, search: BeamSearch, logits: Tensor) -> str:
        """One more token of each beam, logits (beams, vocab); the text of the answer if it is complete, else ""."""
        scores = logits.log_softmax(-1).masked_fill(self.forbidden, -math.inf)  # the order of transformers
        if row.penalties:
            scores = row.penalties.apply(scores)
        parents, tokens = search.advance(scores)
        if search.done:
            self.leave(row)
            return row.take_all(search.best, self.stop_ids)
        if row.penalties:
            row.penalties.reorder(parents)
            row.penalties.push(tokens)
        moved = [(parent, beam) for beam, parent in enumerate(parents) if parent != beam]
        if moved:
            places = [self.slots.index(slot) for slot in row.slots]
            sources, targets = ([places[beam] for beam in beams] for beams in zip(*moved, strict=True))
            assert self.cache
            self.cache.copy_rows(sources, targets, row.cached)
        for slot, token in zip(row.slots, tokens, strict=True):
            slot.last = token
        return ""


def _run(model: Transformer, rows: list[Row], tokenizer: ChatTokenizer) -> Iterator[list[tuple[Row, str]]]:
    """Answer all rows; each step yields the new text of every row still going."""
    rows = [row for row in rows if row.left or row.settings.prompt_logprobs is not None]
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

    A beam search yields "" after each token, so that the caller can stop it, and the whole text at its end.

    Raises ValueError at once (not at the first piece) for a prompt that is empty or too long.
    """
    row = Row(model, tokenizer, prompt, settings, answer if answer is not None else Answer())
    return (piece for pieces in _run(model, [row], tokenizer) for row, piece in pieces if piece or row.search)


def fit_chat(
    tokenizer: ChatTokenizer,
    messages: list[Message],
    limit: int,
    render: Callable[[list[Message]], list[int]] | None = None,
) -> list[int]:
    """The rendered chat up to where the assistant speaks, in at most `limit` tokens.

    Whole turns are dropped, oldest first; a system message and the last question stay, even where they alone exceed
    the limit (then `generate` says so). `render` turns messages into ids in another way, for example with the last
    answer left open.
    """
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    starts = [0, *(i for i, message in enumerate(turns) if i and message["role"] == "user")]

    def rendered(start: int) -> list[int]:
        kept = [*system, *turns[start:]]
        return render(kept) if render else tokenizer.render(kept, add_generation_prompt=True)[0]

    whole = rendered(0)
    if len(whole) <= limit:
        return whole
    # Fewer turns are never longer: halving finds the first start that fits without rendering all of them.
    first = bisect.bisect_left(starts, True, key=lambda start: len(rendered(start)) <= limit)
    return rendered(starts[min(first, len(starts) - 1)])


def chat_prompt(
    model: Transformer,
    tokenizer: ChatTokenizer,
    messages: list[Message],
    max_new_tokens: int,
    render: Callable[[list[Message]], list[int]] | None = None,
) -> list[int]:
    """The rendered chat, with as many of its last turns as leave room to answer. `render`: see fit_chat."""
    limit = model.config.max_seq_len
    return fit_chat(tokenizer, messages, limit - min(max_new_tokens, limit // 4), render)
