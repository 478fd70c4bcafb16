"""Chats to token ids and loss masks: join the spans of a chat, tokenize the whole text, derive the mask from the spans.

    spans of a chat format     [("<|im_start|>user\\n1+1?<|im_end|>\\n…assistant\\n", False), ("2<|im_end|>", True), …]
    ids, mask                  mask 1 for the tokens that begin inside a trained span

A marker string inside a message stays text: it is split in two, and the parts of the chat are tokenized separately.
Called by tokenizer.py (`ChatTokenizer.render`).
"""

import bisect
import itertools
import re
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer

from common.errors import CHAT_FORMAT_ADVICE, UserError
from model.chat_template import ChatTemplate, Message, TooManyAnswersError, TrainingSpans, UnsupportedChatError
from model.jinja_template import JinjaTemplate

AnswerSpans = list[tuple[int, int]]  # (start, end) of each trained answer in the text of a chat


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


class SampleText(NamedTuple):
    """A sample before tokenization: its text, split into parts that are tokenized separately."""

    parts: list[str]
    answer_spans: AnswerSpans
    answers: list[int]


def render_chats(
    special_aware: Tokenizer,
    chat_format: ChatTemplate | JinjaTemplate,
    markers: re.Pattern[str],
    chats: list[list[Message]],
    add_generation_prompt: bool,
) -> list[RenderedChat]:
    """See `ChatTokenizer.render_each`. `special_aware` encodes markers as control tokens, `markers` matches them."""
    texts: list[list[SampleText]] = []
    refusals: list[UnsupportedChatError | None] = []
    for messages in chats:
        try:
            texts.append(render_texts(chat_format, markers, messages, add_generation_prompt))
            refusals.append(None)
        except UnsupportedChatError as refusal:
            texts.append([])
            refusals.append(refusal)
    parts = [part for samples in texts for sample in samples for part in sample.parts]
    encodings = iter(special_aware.encode_batch(parts, add_special_tokens=False))
    rendered = []
    for samples, error in zip(texts, refusals, strict=True):
        tokenised = [sample_from_encodings([next(encodings) for _ in sample.parts], sample) for sample in samples]
        rendered.append(RenderedChat(tokenised, str(error or ""), isinstance(error, TooManyAnswersError)))
    return rendered


def render_texts(
    chat_format: ChatTemplate | JinjaTemplate,
    markers: re.Pattern[str],
    messages: list[Message],
    add_generation_prompt: bool,
) -> list[SampleText]:
    """The texts of a chat's samples. Raises UnsupportedChatError if the format does not support the chat."""
    separator, messages = escape_markers(markers, messages)
    if add_generation_prompt:
        samples: list[TrainingSpans] = [(chat_format.spans(messages, True), [])]
    else:
        samples = chat_format.samples(messages)
    texts = []
    for spans, answers in samples:
        ends = list(itertools.accumulate(len(text) for text, _ in spans))
        answer_spans = [(end - len(text), end) for (text, trained), end in zip(spans, ends, strict=True) if trained]
        text = "".join(text for text, _ in spans)
        texts.append(SampleText(text.split(separator) if separator else [text], answer_spans, answers))
    return texts


def sample_from_encodings(encodings: list[Encoding], text: SampleText) -> RenderedSample:
    """Join the ids of all parts; the mask is 1 for tokens that begin inside an answer."""
    ids: list[int] = []
    mask: list[int] = []
    part_start = 0  # offset of the part in the text; each separator between parts takes one character
    for encoding, part in zip(encodings, text.parts, strict=True):
        tokens = range(len(encoding))
        token_start = lambda token, encoding=encoding, part_start=part_start: (
            part_start + encoding.token_to_chars(token)[0]
        )
        mask += [0] * len(tokens)
        for answer in text.answer_spans:
            first, last = (len(ids) + bisect.bisect_left(tokens, edge, key=token_start) for edge in answer)
            mask[first:last] = [1] * (last - first)
        ids += encoding.ids
        part_start += len(part) + 1
    return RenderedSample(ids, mask, text.answers)


def render_unfinished(
    special_aware: Tokenizer,
    chat_format: ChatTemplate | JinjaTemplate,
    markers: re.Pattern[str],
    messages: list[Message],
) -> list[int]:
    """See `ChatTokenizer.render_unfinished`. `special_aware` and `markers` as in `render_chats`."""
    content = "".join(message["content"] for message in messages)
    end = next(chr(code) for code in range(0xF8FF, 0xDFFF, -1) if chr(code) not in content)
    unfinished = {**messages[-1], "content": messages[-1]["content"] + end}
    separator, escaped = escape_markers(markers, [*messages[:-1], unfinished])
    try:
        text, found, _ = chat_format.text(escaped).rpartition(end)
    except UnsupportedChatError as refusal:
        raise UserError(f"{refusal}; {CHAT_FORMAT_ADVICE}") from None
    if not found:
        raise UserError("the chat template leaves out the last message: it cannot be continued")
    parts = text.split(separator) if separator else [text]
    return [i for part in special_aware.encode_batch(parts, add_special_tokens=False) for i in part.ids]


def escape_markers(markers: re.Pattern[str], messages: list[Message]) -> tuple[str, list[Message]]:
    """Insert an unused character into every marker in the messages; returns it ("" if there is no marker) and them."""
    content = "".join(message["content"] for message in messages)
    if not markers.search(content):
        return "", messages
    separator = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in content)

    def split(found: re.Match[str]) -> str:
        return found[0][0] + separator + found[0][1:]

    return separator, [{**message, "content": markers.sub(split, message["content"])} for message in messages]
