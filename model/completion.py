"""One prompt and its answer, generated token by token.

Called by generate.py (Batch), which computes the tokens. Read next: sampling.py, beams.py, detokenizer.py.
"""

import random
from collections.abc import Collection
from dataclasses import dataclass, field

from model.beams import BeamSearch
from model.detokenizer import TextStream
from model.logprobs import TokenProbability
from model.sampling import Penalties, Sampling
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer


@dataclass
class Answer:
    """`ids`: the new tokens without the closing marker. `text`: what they say, cut before a stop string.

    `finish_reason`: "stop" (closing marker or stop string) or "length" (max_new_tokens or max_seq_len); "" until then.
    `logprobs`: one entry per id, where the settings ask for them; `stop_logprob`: that of the closing marker, if the
    answer ends with it. `prompt_logprobs`: one entry per token of the prompt but the first, where the settings ask.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    logprobs: list[TokenProbability] = field(default_factory=list)
    stop_logprob: TokenProbability | None = None
    prompt_logprobs: list[TokenProbability] = field(default_factory=list)


@dataclass(eq=False)
class Slot:
    """One row of the cache, and the token that the next step reads there."""

    row: "Row"
    last: int


class Row:
    """One prompt, its sampling settings, and the state of its answer."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: ChatTokenizer,
        prompt: list[int],
        settings: Sampling,
        answer: Answer,
        number: int = 0,
    ) -> None:
        """`number`: index of this row among those with the same settings; it is added to their seed.

        Raises ValueError for a prompt that is empty or longer than max_seq_len; at that length the answer is empty.
        """
        limit, seed = model.config.max_seq_len, settings.seed
        if not prompt:
            raise ValueError("the prompt is empty: there is no token to continue from")
        if len(prompt) > limit:
            raise ValueError(f"the prompt has {len(prompt)} tokens, the model reads at most {limit} (max_seq_len)")
        self.prompt, self.settings, self.answer = prompt, settings, answer
        self.text = TextStream(tokenizer, settings.stop)
        self.draws = random.Random(None if seed is None else seed + number)
        self.left = min(settings.max_new_tokens, limit - len(prompt))  # tokens that may still be drawn
        self.cached = 0  # tokens of each slot whose keys and values are in the cache
        self.slots = [Slot(self, prompt[-1]) for _ in range(settings.num_beams)]  # one per beam, in their order
        self.penalties: Penalties | None = None
        if settings.penalises:
            self.penalties = Penalties(settings, prompt, tokenizer.stop_ids, model.lm_head.weight)
        self.search: BeamSearch | None = None
        if settings.num_beams > 1:
            self.search = BeamSearch(settings.num_beams, self.left, settings.length_penalty, tokenizer.stop_ids)
        if not self.left:
            answer.finish_reason = "length"

    def take(self, token: int, is_stop: bool) -> str:
        """Append a token to the answer; returns the text that it completed."""
        self.left -= 1
        self.slots[0].last = token
        piece = ""
        if not is_stop:
            self.answer.ids.append(token)
            piece = self.text.push(token)
            if self.penalties and not self.search:
                self.penalties.push([token])
        if is_stop or self.text.stopped or not self.left:
            piece += self.text.finish()
            self.answer.finish_reason = "stop" if is_stop or self.text.stopped else "length"
        self.answer.text += piece
        return piece

    def take_all(self, tokens: list[int], stop_ids: Collection[int]) -> str:
        """Append the tokens of a whole answer, up to where a stop string is complete; returns its text."""
        for token in tokens:
            self.take(token, token in stop_ids)
            if self.answer.finish_reason:
                break
        return self.answer.text
