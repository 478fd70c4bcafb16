"""Text generation with a KV cache and continuous batching, used by evaluation and serving.

    prefill  one forward pass over the prompts fills the cache; samples the first token of each sequence
    decode   one step of DecodeModel over the last tokens; samples one more of each sequence, removes finished sequences

`DecodeBatch` holds the sequences that are decoded together. They join and leave between any two steps, and the tokens
of a sequence do not depend on the others. A sequence with num_beams > 1 takes one row of the cache per beam and returns
its text when the search ends. `generate` completes a list of prompts, `stream` yields the text of one
completion incrementally, and serving/scheduler.py adds sequences as requests arrive.

Called by 2-eval.py and the server. Read next: completion.py (Sequence), sampling.py (the next token), beams.py (beam
search), detokenizer.py (ids to text), transformer.py (KVCache), tokenizer.py (prompts).
"""

import bisect
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from common.device import compute_dtype
from model.beams import BeamSearch
from model.chat_template import Message
from model.completion import Completion, Sequence
from model.decode import DecodeModel
from model.logprobs import prompt_logprobs, token_logprob
from model.sampling import SamplingParams, sample_rows
from model.tokenizer import ChatTokenizer
from model.transformer import KVCache, Transformer

INITIAL_CACHE_LEN = 64  # capacity of a new cache in tokens per row; it doubles when full
CacheRow = tuple[Sequence, int]  # a sequence and the index of one of its beams


class DecodeBatch:
    """Sequences that are decoded together; `rows` names the sequence and beam of each row of the cache.

    The model must be in eval mode. An autocast context around the calls sets the dtype.
    """

    def __init__(self, model: Transformer, tokenizer: ChatTokenizer, decoder: DecodeModel | None = None) -> None:
        """`decoder`: the model's decoding step; None: made at the first step, from the weights as they are then."""
        self.model, self.tokenizer, self.decoder = model, tokenizer, decoder
        self.rows: list[CacheRow] = []
        self.cache: KVCache | None = None  # grows on demand
        self.device, entries = model.lm_head.weight.device, model.lm_head.weight.shape[0]
        self.stop_ids = frozenset(tokenizer.stop_ids)
        unused = [
            *range(tokenizer.vocab_size, entries),
            *(tokenizer.chat_marker_ids if tokenizer.has_old_files else ()),
        ]
        banned = {*(tokenizer.special_ids - self.stop_ids), *unused}  # other special and unused tokens
        self.banned_ids = torch.tensor(sorted(banned), dtype=torch.long, device=self.device)

    @property
    def sequences(self) -> list[Sequence]:
        """The running sequences."""
        return list(dict.fromkeys(seq for seq, _ in self.rows))

    @torch.inference_mode()
    def prefill(self, seqs: list[Sequence]) -> list[tuple[Sequence, str]]:
        """Process the prompts of new sequences and sample their first tokens; returns the text of each, possibly ""."""
        dynamic = self.model.config.rope_scaling.get("rope_type") == "dynamic"
        if dynamic and len({len(seq.prompt) for seq in seqs}) > 1:  # RoPE depends on the length
            return [piece for seq in seqs for piece in self.prefill([seq])]
        # Equal prompts, as those of a group of rollouts, are computed once; the other rows and beams get a copy.
        prompts = list(dict.fromkeys(tuple(seq.prompt) for seq in seqs))
        row_of = {seq: prompts.index(tuple(seq.prompt)) for seq in seqs}
        first, width = len(self.rows), max(map(len, prompts))
        rows = [(seq, beam) for seq in seqs for beam in range(seq.settings.num_beams)]
        cache = self._ensure_capacity(first + len(rows), width)
        # Right padding needs no mask: causal attention ignores it, and the next tokens overwrite it.
        ids = [[*prompt, *[self.tokenizer.pad_id] * (width - len(prompt))] for prompt in prompts]
        hidden, _ = self.model(torch.tensor(ids, device=self.device), cache.view(first, first + len(prompts)))
        self.rows += rows
        if len(rows) > len(prompts):
            sources = [first + row_of[seq] for seq, _ in rows]
            cache.copy_rows(cache, sources, slice(first, first + len(rows)), width)
        for seq, row in row_of.items():
            seq.num_cached, count = len(seq.prompt), seq.settings.prompt_logprobs
            if count is not None:
                seq.completion.prompt_logprobs = prompt_logprobs(self.model.lm_head, hidden[row], seq.prompt, count)
        finished = [seq for seq in seqs if not seq.tokens_left]  # prompt logprobs only
        for seq in finished:
            self.remove(seq)
        active = [(seq, beam) for seq, beam in rows if seq.tokens_left]
        last = hidden[[row_of[seq] for seq, _ in active], [len(seq.prompt) - 1 for seq, _ in active]]
        return [(seq, "") for seq in finished] + (
            self._next_text(active, self.model.lm_head(last).float()) if active else []
        )

    @torch.inference_mode()
    def decode(self) -> list[tuple[Sequence, str]]:
        """Sample one more token of every sequence; returns the text of each and removes finished sequences."""
        rows, cached = list(self.rows), [seq.num_cached for seq, _ in self.rows]
        cache = self._ensure_capacity(len(rows), max(cached) + 1)
        self.decoder = self.decoder or DecodeModel(self.model, compute_dtype(self.model.lm_head.weight))
        logits = self.decoder.step([seq.last_tokens[beam] for seq, beam in rows], cached, cache)
        for seq in self.sequences:
            seq.num_cached += 1
        return self._next_text(rows, logits)

    @torch.inference_mode()
    def remove(self, seq: Sequence) -> None:
        """Remove a sequence; the last rows take its place. RoPE is already applied to cached keys, so rows can move."""
        cache = self.cache
        assert cache
        for beam in range(seq.settings.num_beams):
            index, last = self.rows.index((seq, beam)), self.rows.pop()
            if index < len(self.rows):
                self.rows[index] = last
                cache.copy_rows(cache, [len(self.rows)], [index], last[0].num_cached)
            for kept in (cache.keys, cache.values):
                kept[:, len(self.rows)] = 0  # no data of one request remains for the next
        if not self.rows:
            self.cache = None

    def _ensure_capacity(self, rows: int, tokens: int) -> KVCache:
        """The cache, grown if needed to `rows` rows of `tokens` tokens."""
        old, weight, capacity = self.cache, self.model.lm_head.weight, max(tokens, INITIAL_CACHE_LEN)
        if old:
            if old.keys.shape[1] >= rows and old.max_len >= tokens:
                return old
            rows = max(rows, old.keys.shape[1])
            capacity = old.max_len if old.max_len >= tokens else max(tokens, 2 * old.max_len)
        capacity = min(capacity, self.model.config.max_seq_len)
        self.cache = KVCache(self.model.config, rows, capacity, self.device, compute_dtype(weight))
        if old:
            used, filled = slice(len(self.rows)), max((seq.num_cached for seq, _ in self.rows), default=0)
            self.cache.copy_rows(old, used, used, filled)
        return self.cache

    def _next_text(self, rows: list[CacheRow], logits: Tensor) -> list[tuple[Sequence, str]]:
        """logits (rows, vocab) in fp32 after the last token of each row -> the new text of each sequence."""
        seqs = [seq for seq, _ in rows if not seq.search]
        if len(seqs) == len(rows):
            return self._sample(seqs, logits)
        index = {row: i for i, row in enumerate(rows)}
        pieces = self._sample(seqs, logits[[index[seq, 0] for seq in seqs]]) if seqs else []
        for seq, search in {seq: seq.search for seq, _ in rows if seq.search}.items():
            beams = [index[seq, beam] for beam in range(search.num_beams)]
            pieces.append((seq, self._advance_beams(seq, search, logits[beams])))
        return pieces

    def _sample(self, seqs: list[Sequence], logits: Tensor) -> list[tuple[Sequence, str]]:
        """Sample from logits (seqs, vocab); returns the new text of each sequence."""
        raw_logits = logits = logits.index_fill(1, self.banned_ids, -math.inf)
        if any(seq.penalties for seq in seqs):
            rows = [(seq.penalties, logits[i : i + 1]) for i, seq in enumerate(seqs)]
            logits = torch.cat([penalties.apply(row) if penalties else row for penalties, row in rows])
        draws = [seq.rng.random() for seq in seqs]
        tokens = sample_rows(logits, [seq.settings for seq in seqs], draws).tolist()
        pieces = []
        for seq, token, row in zip(seqs, tokens, raw_logits, strict=True):
            is_stop, count = token in self.stop_ids, seq.settings.logprobs
            if count is not None and is_stop:
                seq.completion.stop_logprob = token_logprob(row, token, count)
            elif count is not None:
                seq.completion.logprobs.append(token_logprob(row, token, count))
            pieces.append((seq, seq.append(token, is_stop)))
            if seq.completion.finish_reason:
                self.remove(seq)
        return pieces

    def _advance_beams(self, seq: Sequence, search: BeamSearch, logits: Tensor) -> str:
        """Advance a beam search by one token, logits (beams, vocab); returns the whole text at its end, else ""."""
        # log_softmax over all tokens, before bans and penalties, as in transformers
        scores = logits.log_softmax(-1).index_fill(1, self.banned_ids, -math.inf)
        parents, tokens = search.advance(seq.penalties.apply(scores) if seq.penalties else scores)
        if search.done:
            self.remove(seq)
            return seq.extend(search.best, self.stop_ids)
        if seq.penalties:
            seq.penalties.reorder(parents)
            seq.penalties.update(tokens)
        seq.last_tokens = tokens
        moved = [beam for beam, parent in enumerate(parents) if parent != beam]
        if moved and self.cache:
            row_of = [self.rows.index((seq, beam)) for beam in range(search.num_beams)]
            sources, targets = [row_of[parents[beam]] for beam in moved], [row_of[beam] for beam in moved]
            self.cache.copy_rows(self.cache, sources, targets, seq.num_cached)
        return ""


def _decode_all(
    model: Transformer, tokenizer: ChatTokenizer, seqs: list[Sequence], decoder: DecodeModel | None
) -> Iterator[list[tuple[Sequence, str]]]:
    """Run all sequences to their end; each step yields the new text of every running sequence."""
    seqs = [seq for seq in seqs if seq.tokens_left or seq.settings.prompt_logprobs is not None]
    if not seqs:
        return
    was_training = model.training
    model.eval()
    batch = DecodeBatch(model, tokenizer, decoder)
    try:
        yield batch.prefill(seqs)
        while batch.sequences:
            yield batch.decode()
    finally:
        model.train(was_training)


def complete(
    model: Transformer, tokenizer: ChatTokenizer, seqs: list[Sequence], decoder: DecodeModel | None = None
) -> None:
    """Generate all sequences to their end in one batch, each with its own settings. As `generate` otherwise."""
    for _ in _decode_all(model, tokenizer, seqs, decoder):
        pass


def generate(
    model: Transformer,
    prompts: list[list[int]],
    settings: SamplingParams,
    tokenizer: ChatTokenizer,
    decoder: DecodeModel | None = None,
) -> list[Completion]:
    """One completion per prompt (token ids), in one batch. Restores the model's training mode.

    `decoder`: as in DecodeBatch; a caller with several batches and constant weights passes the same one.
    An autocast context around the call sets the dtype. Prompt and completion together have at most max_seq_len tokens;
    then finish_reason is "length". Raises ValueError for a prompt that is empty or longer than max_seq_len.
    """
    seqs = [Sequence(model, tokenizer, prompt, settings, Completion(), i) for i, prompt in enumerate(prompts)]
    complete(model, tokenizer, seqs, decoder)
    return [seq.completion for seq in seqs]


def stream(
    model: Transformer,
    prompt: list[int],
    settings: SamplingParams,
    tokenizer: ChatTokenizer,
    completion: Completion | None = None,
    decoder: DecodeModel | None = None,
) -> Iterator[str]:
    """Yields the text of one completion incrementally, in complete characters, and fills `completion`.

    A beam search yields "" after each token (the caller may stop there) and the whole text at its end.
    Raises ValueError, at the call and not at the first piece, for a prompt that is empty or too long.
    """
    seq = Sequence(model, tokenizer, prompt, settings, completion if completion is not None else Completion())
    return (
        piece
        for pieces in _decode_all(model, tokenizer, [seq], decoder)
        for seq, piece in pieces
        if piece or seq.search
    )


def fit_chat(
    tokenizer: ChatTokenizer,
    messages: list[Message],
    limit: int,
    render: Callable[[list[Message]], list[int]] | None = None,
    enable_thinking: bool | None = None,
) -> list[int]:
    """The ids of the rendered chat with a generation prompt, at most `limit` tokens.

    Drops the oldest turns as needed, but never a system message or the last question: if those alone exceed the
    limit, `generate` raises ValueError. `render` replaces the default rendering, for example to continue an answer.
    `enable_thinking`: see `ChatTokenizer.render`. Turns begin at a user message, so a call keeps its results.
    """
    system = messages[:1] if messages[0]["role"] == "system" else []
    conversation = messages[len(system) :]
    starts = [0, *(i for i, message in enumerate(conversation) if i and message["role"] == "user")]

    def rendered(start: int) -> list[int]:
        kept = [*system, *conversation[start:]]
        return render(kept) if render else tokenizer.render(kept, True, enable_thinking)[0]

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
    enable_thinking: bool | None = None,
) -> list[int]:
    """`fit_chat` with the limit that leaves max_new_tokens, or a quarter of max_seq_len, for the answer."""
    limit = model.config.max_seq_len
    return fit_chat(tokenizer, messages, limit - min(max_new_tokens, limit // 4), render, enable_thinking)
