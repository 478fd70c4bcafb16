"""Sequence: one prompt, its sampling settings and the state of its generation.

Called by generate.py (DecodeBatch), which computes the tokens. Read next: sampling.py, beams.py, detokenizer.py.
"""

import random
from collections.abc import Collection
from dataclasses import dataclass, field

from model.beams import BeamSearch
from model.detokenizer import IncrementalDetokenizer
from model.logprobs import TokenLogprob
from model.sampling import Penalties, SamplingParams
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer


@dataclass
class Completion:
    """The generated tokens and text of a sequence.

    `ids`: generated tokens, excluding the stop token. `text`: the decoded ids, cut before a stop string.
    `finish_reason`: "stop" (stop token or stop string) or "length" (max_new_tokens or max_seq_len); "" while running.
    `logprobs`: one entry per id, if requested. `stop_logprob`: the entry of the stop token, if one was generated.
    `prompt_logprobs`: one entry per prompt token except the first, if requested.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    stop_logprob: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


class Sequence:
    """One prompt, its sampling settings, and the state of its generation."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: ChatTokenizer,
        prompt: list[int],
        settings: SamplingParams,
        completion: Completion,
        index: int = 0,
    ) -> None:
        """`index` is added to the seed, because sequences with the same settings must not sample the same tokens.

        Raises ValueError if the prompt is empty or longer than max_seq_len. If it has exactly
        max_seq_len tokens, nothing is generated.
        """
        limit, seed = model.config.max_seq_len, settings.seed
        if not prompt:
            raise ValueError("the prompt is empty: there is no token to continue from")
        if len(prompt) > limit:
            raise ValueError(f"the prompt has {len(prompt)} tokens, the model reads at most {limit} (max_seq_len)")
        self.prompt, self.settings, self.completion = prompt, settings, completion
        self.detokenizer = IncrementalDetokenizer(tokenizer, settings.stop)
        self.rng = random.Random(None if seed is None else seed + index)
        self.tokens_left = min(settings.max_new_tokens, limit - len(prompt))  # tokens that may still be generated
        self.num_cached = 0  # number of cached tokens per beam
        self.last_tokens = [prompt[-1]] * settings.num_beams  # the next input of each beam
        self.penalties: Penalties | None = None
        if settings.has_penalties:
            self.penalties = Penalties(settings, prompt, tokenizer.stop_ids, model.lm_head.weight)
        self.search: BeamSearch | None = None
        if settings.num_beams > 1:
            self.search = BeamSearch(settings.num_beams, self.tokens_left, settings.length_penalty, tokenizer.stop_ids)
        if not self.tokens_left:
            completion.finish_reason = "length"

    def append(self, token: int, is_stop: bool) -> str:
        """Append a generated token; return the new text, "" while a character or stop string is incomplete."""
        self.tokens_left -= 1
        self.last_tokens[0] = token
        piece = ""
        if not is_stop:
            self.completion.ids.append(token)
            piece = self.detokenizer.push(token)
            if self.penalties and not self.search:
                self.penalties.update([token])
        if is_stop or self.detokenizer.stopped or not self.tokens_left:
            piece += self.detokenizer.finish()
            self.completion.finish_reason = "stop" if is_stop or self.detokenizer.stopped else "length"
        self.completion.text += piece
        return piece

    def extend(self, tokens: list[int], stop_ids: Collection[int]) -> str:
        """Append the tokens of a finished beam, up to a stop token or stop string; return the text of the answer."""
        for token in tokens:
            self.append(token, token in stop_ids)
            if self.completion.finish_reason:
                break
        return self.completion.text
