"""The one generator: token ids in, answers out, for every front end.

    prefill   the whole prompt in one forward pass, keys and values into the cache
    repeat    logits -> repetition penalty -> temperature -> top-k -> top-p -> min-p -> draw;  feed the drawn token

`generate` answers a batch, `stream` yields the text of one answer as it grows. Rows of a batch are padded on the left,
so all of them end where the next token goes; each row draws for itself and is answered as if it were alone.

Called by 2-eval.py and every later front end. Read next: transformer.py (KVCache), chat.py (who renders a prompt).
"""

import codecs
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from tokenizers import decoders
from torch import Tensor

from model.chat import ChatTokenizer, Message
from model.transformer import KVCache, Transformer

# Byte-level pieces spell a byte as one visible character: printable ones as themselves, others from U+0100 on (GPT-2).
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn and when an answer ends. Raises ValueError for a number that makes no sense."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # keep the k likeliest tokens (0: all)
    top_p: float = 1.0  # keep the likeliest tokens until their probabilities sum to p (Holtzman et al. 2019, 3.1)
    min_p: float = 0.0  # keep tokens at least this share as likely as the likeliest (Nguyen et al. 2024, 3)
    repetition_penalty: float = 1.0  # > 1: tokens seen in prompt or answer become less likely (Keskar et al. 2019, 4.1)
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()  # strings that end an answer and are not part of it
    seed: int | None = None  # None: different each time. Row i of a batch draws as prompt i would alone with seed + i

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("stop", all(self.stop), "strings that are not empty"),
        ):
            if not good:
                raise ValueError(f"{name} must be {rule}, not {getattr(self, name)}")


@dataclass
class Answer:
    """`ids`: the new tokens without the closing marker. `text`: what they say, cut before a stop string.

    `finish_reason`: "stop" (closing marker or stop string) or "length" (max_new_tokens or max_seq_len); "" until then.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""


class TextStream:
    """Ids in, text out, token by token: the pieces joined equal `tokenizer.decode` of all ids (up to a stop string).

    Holds back what the next token may still change: an unfinished UTF-8 character, and the beginning of a stop string.
    """

    def __init__(self, tokenizer: ChatTokenizer, stop: tuple[str, ...] = ()) -> None:
        self.backend = tokenizer.backend
        self.byte_level = isinstance(tokenizer.backend.decoder, decoders.ByteLevel)
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # Other decoders: ids whose text is not out yet, behind one whose text is: some treat a first piece differently.
        self.run: list[int] = []
        self.out = ""  # the text of that one
        self.stop = stop
        self.held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that is certain after one more token; often empty in the middle of a character."""
        piece = self.backend.id_to_token(token_id) or ""
        if self.byte_level:
            spelled = all(char in _BYTE_OF for char in piece)
            raw = bytes(_BYTE_OF[char] for char in piece) if spelled else piece.encode()
            return self._release(self.utf8.decode(raw))
        self.run.append(token_id)
        lone_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
        return "" if lone_byte or self._decode_run().endswith("\ufffd") else self._release(self._take_run())

    def finish(self) -> str:
        """What was held back, once no token follows; half a character becomes U+FFFD."""
        return self._release(self.utf8.decode(b"", final=True) + self._take_run(), final=True)

    def _decode_run(self) -> str:
        return self.backend.decode(self.run, skip_special_tokens=False) if self.run else ""

    def _take_run(self) -> str:
        """The run's text. Bytes such as <0xE4> are valid only as a whole run, which ends where another piece comes."""
        text = self._decode_run()[len(self.out) :]
        self.run = self.run[-1:]
        self.out = self._decode_run()
        return text

    def _release(self, text: str, final: bool = False) -> str:
        if self.stopped or not self.stop:
            return "" if self.stopped else text
        self.held += text
        # The stop string that is complete first counts, so that the cut does not depend on how text falls into tokens.
        found = min(((at + len(s), at) for s in self.stop if (at := self.held.find(s)) >= 0), default=None)
        if found:
            self.stopped = True
            return self.held[: found[1]]
        begun = (k for s in self.stop for k in range(1, len(s)) if self.held.endswith(s[:k]))
        keep = 0 if final else max(begun, default=0)
        certain, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return certain


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make seen tokens less likely whatever the sign of their logit. logits, seen (bool): (batch, vocab)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_likely(logits: Tensor, settings: Sampling) -> Tensor:
    """Logits (batch, vocab) with -inf where top-k, top-p or min-p rule a token out; the likeliest always stays."""
    if 0 < settings.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(settings.top_k).values[:, -1:], -math.inf)
    if settings.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        mass_before = probabilities.cumsum(-1) - probabilities
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, mass_before >= settings.top_p)
        logits = logits.masked_fill(drop, -math.inf)
    if settings.min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(settings.min_p), -math.inf)
    return logits


def choose(logits: Tensor, settings: Sampling, draws: list[float]) -> Tensor:
    """The next token of each row: logits (batch, vocab) -> (batch,). `draws`: one number in [0, 1) per row."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    # The maximum comes off first, so that a tiny temperature cannot overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(settings.temperature, 1e-6)
    mass = keep_likely(logits, settings).softmax(-1).cumsum(-1)
    # Below 1 - 1e-6 the target stays under the total in fp32 too: a token of no probability is never hit.
    draw = torch.tensor([[min(draw, 1 - 1e-6)] for draw in draws], dtype=mass.dtype, device=mass.device)
    return torch.searchsorted(mass, draw * mass[:, -1:], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


class _Row:
    """One prompt of a batch and what has become of it."""

    def __init__(self, prompt: list[int], answer: Answer, text: TextStream, draws: random.Random, left: int) -> None:
        self.prompt, self.answer, self.text, self.draws = prompt, answer, text, draws
        self.left = left  # tokens that may still be drawn
        self.padding = 0  # pad tokens in front of the prompt

    def take(self, token: int, is_stop: bool) -> str:
        """Note a drawn token; returns the text that it released."""
        self.left -= 1
        piece = ""
        if not is_stop:
            self.answer.ids.append(token)
            piece = self.text.push(token)
        ends = is_stop or self.text.stopped or not self.left
        if ends:
            piece += self.text.finish()
            self.answer.finish_reason = "stop" if is_stop or self.text.stopped else "length"
        self.answer.text += piece
        return piece


def _compact(cache: KVCache, rows: list[_Row], going: list[int], limit: int, model: Transformer) -> KVCache:
    """A cache of the rows still going, without the padding that they have in common.

    Keys are stored already turned by their own row's positions, so moving them to other slots changes nothing.
    """
    shift = min(rows[i].padding for i in going)
    room = min(limit, cache.length - shift + max(rows[i].left for i in going))
    smaller = KVCache(model.config, len(going), room, cache.keys.device, cache.keys.dtype)
    smaller.length = cache.length - shift
    smaller.keys[:, :, :, : smaller.length] = cache.keys[:, going, :, shift : cache.length]
    smaller.values[:, :, :, : smaller.length] = cache.values[:, going, :, shift : cache.length]
    for i in going:
        rows[i].padding -= shift
    return smaller


@torch.inference_mode()
def _run(model: Transformer, rows: list[_Row], settings: Sampling, tokenizer: ChatTokenizer) -> Iterator[list[str]]:
    """Draw token after token until every row has ended; each step yields the new text of every row still going."""
    if not rows:
        return
    weight, limit = model.lm_head.weight, model.config.max_seq_len
    device = weight.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
    stop_ids = tokenizer.stop_ids
    forbidden = torch.zeros(weight.shape[0], dtype=torch.bool, device=device)  # other markers, spare rows
    forbidden[[*(tokenizer.special_ids - set(stop_ids)), *range(tokenizer.vocab_size, len(forbidden))]] = True

    width = max(len(row.prompt) for row in rows)
    for row in rows:
        row.padding = width - len(row.prompt)
    input_ids = torch.tensor([[tokenizer.pad_id] * row.padding + row.prompt for row in rows], device=device)
    seen = torch.zeros(len(rows), len(forbidden), dtype=torch.bool, device=device)
    for row, seen_row in zip(rows, seen, strict=True):
        seen_row[row.prompt] = True
    seen[:, stop_ids] = False  # the marker that ends a turn is no repeated word
    cache = KVCache(model.config, len(rows), min(limit, width + max(row.left for row in rows)), device, dtype)
    padding = torch.tensor([row.padding for row in rows], device=device) if any(row.padding for row in rows) else None

    was_training = model.training
    model.eval()
    try:
        while True:
            hidden, _ = model(input_ids, cache, padding)
            logits = model.lm_head(hidden[:, -1]).float()
            if settings.repetition_penalty != 1:
                logits = penalise_repetition(logits, seen, settings.repetition_penalty)
            logits = logits.masked_fill(forbidden, -math.inf)
            chosen = choose(logits, settings, [row.draws.random() for row in rows])
            tokens = chosen.tolist()
            going = [i for i, row in enumerate(rows) if not row.answer.finish_reason]
            yield [rows[i].take(tokens[i], tokens[i] in stop_ids) for i in going]
            going = [i for i in going if not rows[i].answer.finish_reason]
            if not going:
                return
            if len(going) <= len(rows) // 2 or cache.length == cache.max_len:
                cache = _compact(cache, rows, going, limit, model)
                rows, seen, chosen = [rows[i] for i in going], seen[going], chosen[going]
                padded = any(row.padding for row in rows)
                padding = torch.tensor([row.padding for row in rows], device=device) if padded else None
            seen[torch.arange(len(rows), device=device), chosen] = True
            input_ids = chosen[:, None]
    finally:
        model.train(was_training)


def _start(
    model: Transformer, prompts: list[list[int]], settings: Sampling, tokenizer: ChatTokenizer, answers: list[Answer]
) -> list[_Row]:
    """The rows that have room for an answer. Raises ValueError for a prompt that is empty or too long."""
    limit, seed = model.config.max_seq_len, settings.seed
    rows = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if not prompt:
            raise ValueError("the prompt is empty: there is no token to go on from")
        if len(prompt) > limit:
            raise ValueError(f"the prompt has {len(prompt)} tokens, the model reads at most {limit} (max_seq_len)")
        draws = random.Random(None if seed is None else seed + i)
        left = min(settings.max_new_tokens, limit - len(prompt))
        if left:
            rows.append(_Row(prompt, answer, TextStream(tokenizer, settings.stop), draws, left))
        else:
            answer.finish_reason = "length"
    return rows


def generate(
    model: Transformer, prompts: list[list[int]], settings: Sampling, tokenizer: ChatTokenizer
) -> list[Answer]:
    """One answer per prompt (token ids), all in one batch; the model's training flag is left as it was.

    An autocast context around the call decides the number format. Raises ValueError for a prompt that is empty or
    longer than max_seq_len; prompt and answer together stop at max_seq_len with finish reason "length".
    """
    answers = [Answer() for _ in prompts]
    rows = _start(model, prompts, settings, tokenizer, answers)
    for _ in _run(model, rows, settings, tokenizer):
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
    rows = _start(model, [prompt], settings, tokenizer, [answer if answer is not None else Answer()])
    return (piece for pieces in _run(model, rows, settings, tokenizer) for piece in pieces if piece)


def fit_chat(tokenizer: ChatTokenizer, messages: list[Message], limit: int) -> list[int]:
    """The rendered chat up to where the assistant speaks, in at most `limit` tokens.

    Whole turns are dropped, oldest first; a system message and the last question stay, even where they alone exceed
    the limit (then `generate` says so).
    """
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    while True:
        ids, _ = tokenizer.render([*system, *turns], add_generation_prompt=True)
        later_questions = [i for i, message in enumerate(turns) if i and message["role"] == "user"]
        if len(ids) <= limit or not later_questions:
            return ids
        turns = turns[later_questions[0] :]
