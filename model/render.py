"""Rendered chats -> token ids and masks: the whole text is put together, then tokenised; the mask comes from its spans.

    spans of a chat format     [("<|im_start|>user\\n1+1?<|im_end|>\\n…assistant\\n", False), ("2<|im_end|>", True), …]
    ids, mask                  1 for the tokens that begin inside a trained span

A marker string that a user types stays text: it is cut in two while the chat is put together, and both parts are
tokenised by themselves. Called by tokenizer.py (`ChatTokenizer.render`).
"""

import bisect
import itertools
import re
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer

from common.errors import ANOTHER_FORMAT, UserError
from model.chat_template import Message, NamedFormat, RefusedChat, TooManyAnswers, Written
from model.jinja_template import TemplateFormat

Places = list[tuple[int, int]]  # of the answers in the text of a chat: (start, end)


class Sample(NamedTuple):
    """A rendered chat. `mask` is 1 at the trained tokens; `answers`: the indices of the messages that they write."""

    ids: list[int]
    mask: list[int]
    answers: list[int]


class Rendered(NamedTuple):
    """The samples of a chat, usually one; none where its format cannot write it, and then `refusal` is the reason.

    `too_long`: its first turns alone may be written.
    """

    samples: list[Sample]
    refusal: str = ""
    too_long: bool = False


class Text(NamedTuple):
    """A sample before it is tokenised: its text in the parts that are tokenised by themselves."""

    parts: list[str]
    places: Places
    answers: list[int]


def render_chats(
    marked: Tokenizer,
    chat_format: NamedFormat | TemplateFormat,
    markers: re.Pattern[str],
    chats: list[list[Message]],
    add_generation_prompt: bool,
) -> list[Rendered]:
    """`ChatTokenizer.render_each`. `marked` reads control tokens as such, `markers` finds them in text."""
    texts: list[list[Text]] = []
    refusals: list[RefusedChat | None] = []
    for messages in chats:
        try:
            texts.append(write_chat(chat_format, markers, messages, add_generation_prompt))
            refusals.append(None)
        except RefusedChat as refusal:
            texts.append([])
            refusals.append(refusal)
    parts = [part for samples in texts for sample in samples for part in sample.parts]
    encodings = iter(marked.encode_batch(parts, add_special_tokens=False))
    rendered = []
    for samples, refused in zip(texts, refusals, strict=True):
        tokenised = [join([next(encodings) for _ in sample.parts], sample) for sample in samples]
        rendered.append(Rendered(tokenised, str(refused or ""), isinstance(refused, TooManyAnswers)))
    return rendered


def write_chat(
    chat_format: NamedFormat | TemplateFormat,
    markers: re.Pattern[str],
    messages: list[Message],
    add_generation_prompt: bool,
) -> list[Text]:
    """The texts of a chat's samples. Raises RefusedChat."""
    cut, messages = guard(markers, messages)
    if add_generation_prompt:
        samples: list[Written] = [(chat_format.spans(messages, True), [])]
    else:
        samples = chat_format.samples(messages)
    texts = []
    for spans, answers in samples:
        ends = list(itertools.accumulate(len(text) for text, _ in spans))
        places = [(end - len(text), end) for (text, trained), end in zip(spans, ends, strict=True) if trained]
        text = "".join(text for text, _ in spans)
        texts.append(Text(text.split(cut) if cut else [text], places, answers))
    return texts


def join(encodings: list[Encoding], text: Text) -> Sample:
    """Ids of all parts, and the mask: 1 for the tokens that begin inside an answer."""
    ids: list[int] = []
    mask: list[int] = []
    place = 0  # of the part in the chat; between two parts one character, the cut, was left out
    for encoding, part in zip(encodings, text.parts, strict=True):
        tokens = range(len(encoding))
        begins = lambda token, encoding=encoding, place=place: place + encoding.token_to_chars(token)[0]
        mask += [0] * len(tokens)
        for answer in text.places:
            first, last = (len(ids) + bisect.bisect_left(tokens, edge, key=begins) for edge in answer)
            mask[first:last] = [1] * (last - first)
        ids += encoding.ids
        place += len(part) + 1
    return Sample(ids, mask, text.answers)


def render_unfinished(
    marked: Tokenizer, chat_format: NamedFormat | TemplateFormat, markers: re.Pattern[str], messages: list[Message]
) -> list[int]:
    """`ChatTokenizer.render_unfinished`. `marked` and `markers` as in `render_chats`."""
    typed = "".join(message["content"] for message in messages)
    end = next(chr(code) for code in range(0xF8FF, 0xDFFF, -1) if chr(code) not in typed)
    open_end = {**messages[-1], "content": messages[-1]["content"] + end}
    cut, guarded = guard(markers, [*messages[:-1], open_end])
    try:
        text, found, _ = chat_format.text(guarded).rpartition(end)
    except RefusedChat as refusal:
        raise UserError(f"{refusal}; {ANOTHER_FORMAT}") from None
    if not found:
        raise UserError("the chat template leaves out the last message: it cannot be continued")
    parts = text.split(cut) if cut else [text]
    return [i for part in marked.encode_batch(parts, add_special_tokens=False) for i in part.ids]


def guard(markers: re.Pattern[str], messages: list[Message]) -> tuple[str, list[Message]]:
    """The messages with a cut inside every marker that a user typed, and the character that stands for a cut."""
    typed = "".join(message["content"] for message in messages)
    if not markers.search(typed):
        return "", messages
    cut = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in typed)

    def split(found: re.Match[str]) -> str:
        return found[0][0] + cut + found[0][1:]

    return cut, [{**message, "content": markers.sub(split, message["content"])} for message in messages]
