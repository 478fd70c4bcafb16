"""The one generator: token ids in, answers out, for every front end.

    prefill  prompts in one forward pass, keys and values into the cache; the first token of each is drawn
    decode   the drawn tokens in, one more token of every row out; a row that has ended leaves

`DecodeBatch` holds the sequences that are decoded together: they join and leave between any two tokens, each is sampled
as if it were alone. A sequence with num_beams > 1 takes so many slots of the cache, one per beam; its text
is known, and comes out as one piece, when the search has ended. `generate` answers a list of prompts with it, `stream`
yields the text of one answer as it grows, and the server (serving/scheduler.py) lets rows join as requests come.

Called by 2-eval.py and every other front end. Read next: completion.py (Sequence), sampling.py (how a token is drawn),
beams.py (beam search), detokenizer.py (how ids become text), transformer.py (KVCache), tokenizer.py (prompts).
"""

import bisect
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from model.beams import BeamSearch
from model.chat_template import Message
from model.completion import Completion, Sequence, Slot
from model.logprobs import prompt_logprobs, token_logprob
from model.sampling import SamplingParams, sample_rows
from model.tokenizer import ChatTokenizer
from model.transformer import KVCache, Transformer

INITIAL_CACHE_LEN = 64  # tokens that a fresh cache has room for; it doubles when they are full


class DecodeBatch:
    """Rows that are decoded together in the first places of one cache, which grows with them.

    An autocast context around the calls decides the number format; the model is to be in eval mode.
    """

    def __init__(self, model: Transformer, tokenizer: ChatTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.slots: list[Slot] = []  # slot i lies in row i of the cache
        self.cache: KVCache | None = None
        self.device, entries = model.lm_head.weight.device, model.lm_head.weight.shape[0]
        self.stop_ids = frozenset(tokenizer.stop_ids)
        self.banned_mask = torch.zeros(entries, dtype=torch.bool, device=self.device)  # other markers, spare rows
        self.banned_mask[[*(tokenizer.special_ids - self.stop_ids), *range(tokenizer.vocab_size, entries)]] = True

    @property
    def sequences(self) -> list[Sequence]:
        """The rows that are being answered."""
        return list(dict.fromkeys(slot.sequence for slot in self.slots))

    @torch.inference_mode()
    def prefill(self, seqs: list[Sequence]) -> list[tuple[Sequence, str]]:
        """Read the prompts and draw each row's first token; returns each row's first text."""
        dynamic = self.model.config.rope_scaling.get("rope_type") == "dynamic"
        if dynamic and len({len(seq.prompt) for seq in seqs}) > 1:  # angles depend on the length: no padding
            return [piece for seq in seqs for piece in self.prefill([seq])]
        first, end = len(self.slots), len(self.slots) + len(seqs)
        beam_slots = [slot for seq in seqs for slot in seq.slots[1:]]  # the beams' own, which share the prompt
        width = max(len(seq.prompt) for seq in seqs)
        cache = self._ensure_capacity(end + len(beam_slots), width)
        # Padding on the right needs no mask, and the row's next tokens are written over it.
        ids = [seq.prompt + [self.tokenizer.pad_id] * (width - len(seq.prompt)) for seq in seqs]
        hidden, _ = self.model(torch.tensor(ids, device=self.device), cache.view(first, end))
        for seq in seqs:
            seq.num_cached = len(seq.prompt)
        self.slots += [seq.slots[0] for seq in seqs] + beam_slots
        if beam_slots:
            sources = [first + i for i, seq in enumerate(seqs) for _ in seq.slots[1:]]
            cache.copy_rows(sources, list(range(end, end + len(beam_slots))), width)
        for seq, states in zip(seqs, hidden, strict=True):
            if seq.settings.prompt_logprobs is not None:
                seq.completion.prompt_logprobs = prompt_logprobs(
                    self.model.lm_head, states, seq.prompt, seq.settings.prompt_logprobs
                )
        pieces = [(seq, "") for seq in seqs if not seq.tokens_left]  # only their prompts were to be read
        for seq, _ in pieces:
            self.remove(seq)
        active = [i for i, seq in enumerate(seqs) for _ in seq.slots if seq.tokens_left]
        if not active:
            return pieces
        last = torch.tensor([[i, len(seqs[i].prompt) - 1] for i in active], device=self.device)
        active_slots = [slot for seq in seqs for slot in seq.slots if seq.tokens_left]
        return pieces + self._next_text(active_slots, hidden[last[:, 0], last[:, 1]])

    @torch.inference_mode()
    def decode(self) -> list[tuple[Sequence, str]]:
        """Draw one more token of every row; returns the text that each released. Rows that have ended are gone then."""
        slots, cached = list(self.slots), [slot.sequence.num_cached for slot in self.slots]
        cache = self._ensure_capacity(len(slots), max(cached) + 1)
        ids = torch.tensor([[slot.last_token] for slot in slots], device=self.device)
        hidden, _ = self.model(ids, cache.view(0, len(slots), cached))
        for seq in self.sequences:
            seq.num_cached += 1
        return self._next_text(slots, hidden[:, -1])

    @torch.inference_mode()
    def remove(self, seq: Sequence) -> None:
        """Remove a row; the last slots take its place. RoPE is already applied to cached keys, so they can be moved."""
        cache = self.cache
        assert cache
        for slot in seq.slots:
            index, last = self.slots.index(slot), self.slots.pop()
            if last is not slot:
                self.slots[index] = last
                cache.copy_rows([len(self.slots)], [index], last.sequence.num_cached)
            for kept in (cache.keys, cache.values):
                kept[:, len(self.slots)] = 0  # no conversation's keys and values remain for another
        if not self.slots:
            self.cache = None

    def _ensure_capacity(self, seqs: int, tokens: int) -> KVCache:
        """The cache, large enough for so many rows of so many tokens."""
        previous, limit = self.cache, self.model.config.max_seq_len
        if previous and previous.keys.shape[1] >= seqs and previous.max_len >= tokens:
            return previous
        autocast = torch.is_autocast_enabled(self.device.type)
        dtype = torch.get_autocast_dtype(self.device.type) if autocast else self.model.lm_head.weight.dtype
        capacity = max(tokens, INITIAL_CACHE_LEN)
        if previous:
            seqs = max(seqs, previous.keys.shape[1])
            capacity = previous.max_len if previous.max_len >= tokens else max(tokens, 2 * previous.max_len)
        self.cache = KVCache(self.model.config, seqs, min(capacity, limit), self.device, dtype)
        if previous:
            used_slots, filled = len(self.slots), max((slot.sequence.num_cached for slot in self.slots), default=0)
            self.cache.keys[:, :used_slots, :, :filled] = previous.keys[:, :used_slots, :, :filled]
            self.cache.values[:, :used_slots, :, :filled] = previous.values[:, :used_slots, :, :filled]
        return self.cache

    def _next_text(self, slots: list[Slot], hidden: Tensor) -> list[tuple[Sequence, str]]:
        """hidden (slots, dim), after each slot's last token -> the text that each row's next token released."""
        logits = self.model.lm_head(hidden).float()
        seqs = [slot.sequence for slot in slots if slot.sequence.search is None]
        if len(seqs) == len(slots):
            return self._sample(seqs, logits)
        position = {slot: i for i, slot in enumerate(slots)}
        pieces = self._sample(seqs, logits[[position[seq.slots[0]] for seq in seqs]]) if seqs else []
        for seq in dict.fromkeys(slot.sequence for slot in slots):
            if seq.search:
                pieces.append(
                    (seq, self._advance_beams(seq, seq.search, logits[[position[slot] for slot in seq.slots]]))
                )
        return pieces

    def _sample(self, seqs: list[Sequence], logits: Tensor) -> list[tuple[Sequence, str]]:
        """logits (rows, vocab) -> the text that each row's next token released."""
        raw_logits = logits = logits.masked_fill(self.banned_mask, -math.inf)
        if any(seq.penalties for seq in seqs):
            row_logits = [(seq.penalties, logits[i : i + 1]) for i, seq in enumerate(seqs)]
            logits = torch.cat(
                [penalties.apply(one_row) if penalties else one_row for penalties, one_row in row_logits]
            )
        draws = [seq.rng.random() for seq in seqs]
        tokens = sample_rows(logits, [seq.settings for seq in seqs], draws).tolist()
        pieces = []
        for i, (seq, token) in enumerate(zip(seqs, tokens, strict=True)):
            is_stop = token in self.stop_ids
            if seq.settings.logprobs is not None:
                logprob = token_logprob(raw_logits[i], token, seq.settings.logprobs)
                if is_stop:
                    seq.completion.stop_logprob = logprob
                else:
                    seq.completion.logprobs.append(logprob)
            pieces.append((seq, seq.append(token, is_stop)))
            if seq.completion.finish_reason:
                self.remove(seq)
        return pieces

    def _advance_beams(self, seq: Sequence, search: BeamSearch, logits: Tensor) -> str:
        """One more token of each beam, logits (beams, vocab); the text of the answer if it is complete, else ""."""
        scores = logits.log_softmax(-1).masked_fill(self.banned_mask, -math.inf)  # the order of transformers
        if seq.penalties:
            scores = seq.penalties.apply(scores)
        parents, tokens = search.advance(scores)
        if search.done:
            self.remove(seq)
            return seq.extend(search.best, self.stop_ids)
        if seq.penalties:
            seq.penalties.reorder(parents)
            seq.penalties.update(tokens)
        moves = [(parent, beam) for beam, parent in enumerate(parents) if parent != beam]
        if moves:
            slot_indices = [self.slots.index(slot) for slot in seq.slots]
            sources, targets = ([slot_indices[beam] for beam in beams] for beams in zip(*moves, strict=True))
            assert self.cache
            self.cache.copy_rows(sources, targets, seq.num_cached)
        for slot, token in zip(seq.slots, tokens, strict=True):
            slot.last_token = token
        return ""


def _decode_all(
    model: Transformer, seqs: list[Sequence], tokenizer: ChatTokenizer
) -> Iterator[list[tuple[Sequence, str]]]:
    """Answer all rows; each step yields the new text of every row still going."""
    seqs = [seq for seq in seqs if seq.tokens_left or seq.settings.prompt_logprobs is not None]
    if not seqs:
        return
    was_training = model.training
    model.eval()
    batch = DecodeBatch(model, tokenizer)
    try:
        yield batch.prefill(seqs)
        while batch.sequences:
            yield batch.decode()
    finally:
        model.train(was_training)


def generate(
    model: Transformer, prompts: list[list[int]], settings: SamplingParams, tokenizer: ChatTokenizer
) -> list[Completion]:
    """One answer per prompt (token ids), all in one batch; the model's training flag is left as it was.

    An autocast context around the call decides the number format. Raises ValueError for a prompt that is empty or
    longer than max_seq_len; prompt and answer together stop at max_seq_len with finish reason "length".
    """
    completions = [Completion() for _ in prompts]
    pairs = zip(prompts, completions, strict=True)
    seqs = [Sequence(model, tokenizer, prompt, settings, completion, i) for i, (prompt, completion) in enumerate(pairs)]
    for _ in _decode_all(model, seqs, tokenizer):
        pass
    return completions


def stream(
    model: Transformer,
    prompt: list[int],
    settings: SamplingParams,
    tokenizer: ChatTokenizer,
    completion: Completion | None = None,
) -> Iterator[str]:
    """The text of one completion as it grows, in whole characters. `completion` is filled meanwhile.

    A beam search yields "" after each token, so that the caller can stop it, and the whole text at its end.

    Raises ValueError at once (not at the first piece) for a prompt that is empty or too long.
    """
    seq = Sequence(model, tokenizer, prompt, settings, completion if completion is not None else Completion())
    return (piece for pieces in _decode_all(model, [seq], tokenizer) for seq, piece in pieces if piece or seq.search)


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
    conversation = messages[len(system) :]
    starts = [0, *(i for i, message in enumerate(conversation) if i and message["role"] == "user")]

    def rendered(start: int) -> list[int]:
        kept = [*system, *conversation[start:]]
        return render(kept) if render else tokenizer.render(kept, add_generation_prompt=True)[0]

    full = rendered(0)
    if len(full) <= limit:
        return full
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
