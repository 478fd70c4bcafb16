"""Text generation with a KV cache and continuous batching, used by evaluation and serving.

    prefill  one forward pass over the prompts fills the cache; samples the first token of each sequence
    decode   one forward pass over the last tokens; samples one more token of each sequence, removes finished sequences

`DecodeBatch` holds the sequences that are decoded together. They join and leave between any two steps, and the tokens
of a sequence do not depend on the others. A sequence with num_beams > 1 takes one row of the cache (slot) per beam and
returns its text when the search ends. `generate` completes a list of prompts, `stream` yields the text of one
completion incrementally, and serving/scheduler.py adds sequences as requests arrive.

Called by 2-eval.py and the server. Read next: completion.py (Sequence), sampling.py (the next token), beams.py (beam
search), detokenizer.py (ids to text), transformer.py (KVCache), tokenizer.py (prompts).
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

INITIAL_CACHE_LEN = 64  # capacity of a new cache in tokens per row; it doubles when full


class DecodeBatch:
    """Sequences that are decoded together; slot i uses row i of a cache that grows on demand.

    The model must be in eval mode. An autocast context around the calls sets the dtype.
    """

    def __init__(self, model: Transformer, tokenizer: ChatTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.slots: list[Slot] = []  # slot i is row i of the cache
        self.cache: KVCache | None = None
        self.device, entries = model.lm_head.weight.device, model.lm_head.weight.shape[0]
        self.stop_ids = frozenset(tokenizer.stop_ids)
        self.banned_mask = torch.zeros(entries, dtype=torch.bool, device=self.device)  # other special and unused tokens
        self.banned_mask[[*(tokenizer.special_ids - self.stop_ids), *range(tokenizer.vocab_size, entries)]] = True

    @property
    def sequences(self) -> list[Sequence]:
        """The running sequences."""
        return list(dict.fromkeys(slot.sequence for slot in self.slots))

    @torch.inference_mode()
    def prefill(self, seqs: list[Sequence]) -> list[tuple[Sequence, str]]:
        """Process the prompts of new sequences and sample their first tokens; returns the text of each, possibly ""."""
        dynamic = self.model.config.rope_scaling.get("rope_type") == "dynamic"
        if dynamic and len({len(seq.prompt) for seq in seqs}) > 1:  # RoPE depends on the length
            return [piece for seq in seqs for piece in self.prefill([seq])]
        first, end = len(self.slots), len(self.slots) + len(seqs)
        beam_slots = [slot for seq in seqs for slot in seq.slots[1:]]  # copies of the first beam's prompt
        width = max(len(seq.prompt) for seq in seqs)
        cache = self._ensure_capacity(end + len(beam_slots), width)
        # Right padding needs no mask: causal attention ignores it, and the next tokens overwrite it.
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
        pieces = [(seq, "") for seq in seqs if not seq.tokens_left]  # nothing to generate: prompt logprobs only
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
        """Sample one more token of every sequence; returns the text of each and removes finished sequences."""
        slots, cached = list(self.slots), [slot.sequence.num_cached for slot in self.slots]
        cache = self._ensure_capacity(len(slots), max(cached) + 1)
        ids = torch.tensor([[slot.last_token] for slot in slots], device=self.device)
        hidden, _ = self.model(ids, cache.view(0, len(slots), cached))
        for seq in self.sequences:
            seq.num_cached += 1
        return self._next_text(slots, hidden[:, -1])

    @torch.inference_mode()
    def remove(self, seq: Sequence) -> None:
        """Remove a sequence; the last slots fill its rows. RoPE is already applied to cached keys, so rows can move."""
        cache = self.cache
        assert cache
        for slot in seq.slots:
            index, last = self.slots.index(slot), self.slots.pop()
            if last is not slot:
                self.slots[index] = last
                cache.copy_rows([len(self.slots)], [index], last.sequence.num_cached)
            for kept in (cache.keys, cache.values):
                kept[:, len(self.slots)] = 0  # no data of one request remains for the next
        if not self.slots:
            self.cache = None

    def _ensure_capacity(self, seqs: int, tokens: int) -> KVCache:
        """The cache, grown if needed to `seqs` rows of `tokens` tokens."""
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
        """hidden (slots, dim) at the last token of each slot -> the new text of each sequence."""
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
        """Sample from logits (seqs, vocab); returns the new text of each sequence."""
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
        """Advance a beam search by one token, logits (beams, vocab); returns the whole text at its end, else ""."""
        scores = logits.log_softmax(-1).masked_fill(
            self.banned_mask, -math.inf
        )  # before the penalties, as in transformers
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
    """Run all sequences to their end; each step yields the new text of every running sequence."""
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
    """One completion per prompt (token ids), in one batch. Restores the model's training mode.

    An autocast context around the call sets the dtype. Prompt and completion together have at most max_seq_len tokens;
    then finish_reason is "length". Raises ValueError for a prompt that is empty or longer than max_seq_len.
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
    """Yields the text of one completion incrementally, in complete characters, and fills `completion`.

    A beam search yields "" after each token (the caller may stop there) and the whole text at its end.
    Raises ValueError, at the call and not at the first piece, for a prompt that is empty or too long.
    """
    seq = Sequence(model, tokenizer, prompt, settings, completion if completion is not None else Completion())
    return (piece for pieces in _decode_all(model, [seq], tokenizer) for seq, piece in pieces if piece or seq.search)


def fit_chat(
    tokenizer: ChatTokenizer,
    messages: list[Message],
    limit: int,
    render: Callable[[list[Message]], list[int]] | None = None,
) -> list[int]:
    """The ids of the rendered chat with a generation prompt, at most `limit` tokens.

    Drops the oldest turns as needed, but never a system message or the last question: if those alone exceed the
    limit, `generate` raises ValueError. `render` replaces the default rendering, for example to continue an answer.
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
    # Dropping turns never lengthens the prompt, so a binary search finds the first start that fits.
    first = bisect.bisect_left(starts, True, key=lambda start: len(rendered(start)) <= limit)
    return rendered(starts[min(first, len(starts) - 1)])


def chat_prompt(
    model: Transformer,
    tokenizer: ChatTokenizer,
    messages: list[Message],
    max_new_tokens: int,
    render: Callable[[list[Message]], list[int]] | None = None,
) -> list[int]:
    """`fit_chat` with the limit that leaves max_new_tokens, or a quarter of max_seq_len, for the answer."""
    limit = model.config.max_seq_len
    return fit_chat(tokenizer, messages, limit - min(max_new_tokens, limit // 4), render)
