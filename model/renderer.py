"""Renderer: chats as text with spans of answers -> token ids and a loss mask.

    text      <|im_start|>assistant\\n{answer}<|im_end|>\\n        the whole text is tokenized
    span                             ^^^^^^^^^^^^^^^^            mask = 1 for tokens that begin in the span of an answer

A marker string inside a message stays text: an unused character is inserted into it before the chat is rendered, and
the parts of the text between these characters are tokenized separately.
Read next: chat_template.py (named formats), jinja_template.py (templates of imported models).
"""

import bisect
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from common.errors import CHAT_FORMAT_ADVICE, UserError
from model.chat_template import ChatFormat, Message, SampleText, TooManyAnswersError, UnsupportedChatError
from model.chatml import TEXT_KEYS, message_texts
from model.fast_bpe import FastBPE


class RenderedSample(NamedTuple):
    """A tokenized sample. `mask` is 1 at trained tokens; `answers`: indices of the messages that they belong to."""

    ids: list[int]
    mask: list[int]
    answers: list[int]


class RenderedChat(NamedTuple):
    """The samples of a chat, usually one. If the format does not support the chat: none, and `refusal` is the reason.

    `is_too_long`: the chat has too many turns; its first turns alone may be supported.
    """

    samples: list[RenderedSample]
    refusal: str = ""
    is_too_long: bool = False


class Renderer:
    """Renders chats with a chat format to token ids and loss masks."""

    def __init__(
        self,
        backend: Tokenizer,
        markers: re.Pattern[str],
        chat_format: ChatFormat,
        answer_markers: re.Pattern[str],
        fast_bpe: Callable[[], FastBPE | None] = lambda: None,
    ) -> None:
        """`backend` encodes marker strings as control tokens; `markers` matches them.

        `answer_markers`: those that stay text in the contents of answers. The templates of imported models read
        thoughts there.
        """
        self.backend, self.markers, self.chat_format, self.fast_bpe = backend, markers, chat_format, fast_bpe
        self.answer_markers = answer_markers
        added = backend.get_added_tokens_decoder()
        self.marker_ids = {token.content: i for i, token in added.items()}
        if any(token.lstrip or token.rstrip or token.single_word for token in added.values()):
            self.fast_bpe = lambda: None  # the text around such a token changes its place

    def render(
        self, chats: list[list[Message]], add_generation_prompt: bool, enable_thinking: bool | None = None
    ) -> list[RenderedChat]:
        """See `ChatTokenizer.render_each`."""
        texts = [self._sample_texts(messages, add_generation_prompt, enable_thinking) for messages in chats]
        tokenized = iter(self._tokenize([sample for samples, _ in texts for sample in samples], len(chats) > 1))
        rendered = []
        for samples, refusal in texts:
            found = [next(tokenized) for _ in samples]
            rendered.append(RenderedChat(found, str(refusal or ""), isinstance(refusal, TooManyAnswersError)))
        return rendered

    def _tokenize(self, samples: list[tuple[SampleText, list[str]]], many: bool) -> list[RenderedSample]:
        """The tokenized samples. FastBPE is not for several threads; those of a server render one chat at a time."""
        fast_bpe = self.fast_bpe() if many else None
        pieces = [self._split(*sample) if fast_bpe else [] for sample in samples]
        slow = [part for (_, parts), found in zip(samples, pieces, strict=True) if not found for part in parts]
        encodings = iter(self.backend.encode_batch(slow, add_special_tokens=False))
        texts = [text for found in pieces for text, _ in found if text not in self.marker_ids]
        arrays = iter(fast_bpe.encode(texts) if fast_bpe else [])
        return [
            self._join_pieces(sample, found, arrays) if found
            else join_parts(sample, parts, [next(encodings) for _ in parts])
            for (sample, parts), found in zip(samples, pieces, strict=True)
        ]  # fmt: skip

    def _split(self, sample: SampleText, parts: list[str]) -> list[tuple[str, bool]]:
        """Markers and the texts between them, split at the edges of answers too, and whether each is trained.

        Returns [] if a token may span the edge of an answer: FastBPE is for a BPE in which a line end is a token.
        """
        pieces, offset = [], 0
        for part in parts:
            cuts = {edge for marker in self.markers.finditer(part) for edge in marker.span()} | {0, len(part)}
            for edge in {edge - offset for span in sample.spans for edge in span} - cuts:
                if 0 < edge < len(part):
                    if "\n" not in part[edge - 1 : edge + 1]:
                        return []
                    cuts.add(edge)
            for start, end in pairwise(sorted(cuts)):
                is_trained = any(first <= offset + start < last for first, last in sample.spans)
                pieces.append((part[start:end], is_trained))
            offset += len(part) + 1
        return pieces

    def _join_pieces(
        self, sample: SampleText, pieces: list[tuple[str, bool]], arrays: Iterator[np.ndarray]
    ) -> RenderedSample:
        """The sample of the pieces; `arrays` yields the ids of those that are no markers."""
        ids: list[int] = []
        mask: list[int] = []
        for text, is_trained in pieces:
            ids += [self.marker_ids[text]] if text in self.marker_ids else next(arrays).tolist()
            mask += [int(is_trained)] * (len(ids) - len(mask))
        return RenderedSample(ids, mask, sample.answers)

    def render_unfinished(self, messages: list[Message]) -> list[int]:
        """See `ChatTokenizer.render_unfinished`."""
        end = unused_character(messages, range(0xF8FF, 0xDFFF, -1))
        unfinished = {**messages[-1], "content": messages[-1]["content"] + end}
        separator, escaped = self._escape_markers([*messages[:-1], unfinished])
        try:
            text, found, _ = self.chat_format.text(escaped).rpartition(end)
        except UnsupportedChatError as refusal:
            raise UserError(f"{refusal}; {CHAT_FORMAT_ADVICE}") from None
        if not found:
            raise UserError("the chat template leaves out the last message: it cannot be continued")
        encodings = self.backend.encode_batch(text.split(separator) if separator else [text], add_special_tokens=False)
        return [i for encoding in encodings for i in encoding.ids]

    def _sample_texts(
        self, messages: list[Message], add_generation_prompt: bool, enable_thinking: bool | None = None
    ) -> tuple[list[tuple[SampleText, list[str]]], UnsupportedChatError | None]:
        """The samples of a chat with the parts of their texts, or the reason why the format does not support it."""
        separator, escaped = self._escape_markers(messages)
        try:
            samples = self.chat_format.samples(escaped, add_generation_prompt, enable_thinking)
        except UnsupportedChatError as refusal:
            return [], refusal
        return [(s, s.text.split(separator) if separator else [s.text]) for s in samples], None

    def _escape_markers(self, messages: list[Message]) -> tuple[str, list[Message]]:
        """Insert an unused character into every marker of the messages; returns it ("" without markers) and them."""
        if not any(self.markers.search(text) for message in messages for text in message_texts(message)):
            return "", messages
        separator = unused_character(messages, range(0xE000, 0xF8FF))
        split = lambda found: found[0][0] + separator + found[0][1:]
        escaped = []
        for message in messages:
            parts = {key: _map_texts(message[key], self.markers, split) for key in TEXT_KEYS if key in message}
            if message["role"] == "assistant":
                parts["content"] = self.answer_markers.sub(split, message["content"])
            escaped.append({**message, **parts})
        return separator, escaped


def _map_texts(value: Any, markers: re.Pattern[str], split: Callable[[re.Match[str]], str]) -> Any:
    """The value with every marker in its strings, keys of objects included, replaced by `split` of it."""
    if isinstance(value, str):
        return markers.sub(split, value)
    if isinstance(value, list):
        return [_map_texts(entry, markers, split) for entry in value]
    if isinstance(value, dict):
        return {markers.sub(split, key): _map_texts(entry, markers, split) for key, entry in value.items()}
    return value


def unused_character(messages: list[Message], codes: range) -> str:
    """The first character of a range that does not occur in the messages."""
    content = "".join(text for message in messages for text in message_texts(message))
    return next(chr(code) for code in codes if chr(code) not in content)


def join_parts(sample: SampleText, parts: list[str], encodings: list[Encoding]) -> RenderedSample:
    """Join the ids of all parts of a text; the mask is 1 for tokens that begin inside a trained answer."""
    ids: list[int] = []
    mask: list[int] = []
    offset = 0  # of the part in the text; each separator between parts takes one character
    for part, encoding in zip(parts, encodings, strict=True):
        token_start = lambda token, encoding=encoding: encoding.token_to_chars(token)[0]
        mask += [0] * len(encoding)
        for span in sample.spans:
            tokens = range(len(encoding))
            first, last = (len(ids) + bisect.bisect_left(tokens, edge - offset, key=token_start) for edge in span)
            mask[first:last] = [1] * (last - first)
        ids += encoding.ids
        offset += len(part) + 1
    return RenderedSample(ids, mask, sample.answers)
