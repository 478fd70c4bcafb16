"""Chats -> documents of the token folder (ids, loss mask, answer bytes), truncated after whole turns.

Called by tokenize_chats.py. Read next: ../model/tokenizer.py (`render_each`).
"""

import itertools
import re

from corpus.chats import Message, chat_text, is_trained
from corpus.examples import ChatExample
from corpus.stats import DataStats
from corpus.turn_rules import first_turns
from model.chatml import answer_text, message_texts
from model.renderer import RenderedChat, RenderedSample
from model.tokenizer import ChatTokenizer

MAX_TOKEN_CHARACTERS = 256  # upper bound; the longest token of common tokenizers is 128 spaces
MaskedTokens = tuple[list[int], list[int], int]  # ids, mask (1 = trained), UTF-8 bytes of the answers


def render_chat_examples(
    examples: list[ChatExample], tokenizer: ChatTokenizer, max_seq_len: int, stats: DataStats
) -> list[list[MaskedTokens]]:
    """For each chat, the documents of as many whole first turns as fit into `max_seq_len` tokens.

    A chat gives one document, or several if the chat format renders an answer differently when turns follow it
    (model/tokenizer.py, `render_each`). The list is empty if the first turn does not fit, or if the chat format cannot
    render the chat. Turns are never cut: half an answer would train the model to stop inside a sentence.
    """
    fitting_chats = [_drop_last_turns(example.messages, max_seq_len) for example in examples]
    rendered = iter(tokenizer.render_each([messages for messages in fitting_chats if messages]))
    result = []
    for example, messages in zip(examples, fitting_chats, strict=True):
        if not messages:
            stats.row_dropped(f"first turn longer than {max_seq_len} tokens", example.file, example.line)
        result.append(_fit_chat(example, next(rendered), tokenizer, max_seq_len, stats) if messages else [])
    return result


def _fit_chat(
    example: ChatExample, rendered: RenderedChat, tokenizer: ChatTokenizer, max_seq_len: int, stats: DataStats
) -> list[MaskedTokens]:
    """The documents of one chat. `rendered`: its turns that `_drop_last_turns` keeps."""
    messages = _drop_last_turns(example.messages, max_seq_len)
    change = f"cut at a whole turn to {max_seq_len} tokens"
    while rendered.is_too_long and (first_half := first_turns(messages, len(messages) // 2)):
        messages, change = first_half, "cut at a whole turn to what the model's chat template can write"
        (rendered,) = tokenizer.render_each([messages])
    while not rendered.refusal and any(len(sample.ids) > max_seq_len for sample in rendered.samples):
        answers = [i for i, message in enumerate(messages) if is_trained(message)]
        fitting = _count_fitting_answers(rendered.samples, max_seq_len)
        messages = first_turns(messages, answers[fitting - 1] + 1) if fitting else []
        if not messages:
            stats.row_dropped(f"first turn longer than {max_seq_len} tokens", example.file, example.line)
            return []
        (rendered,) = tokenizer.render_each([messages])
    trained_tokens = sum(sum(sample.mask) for sample in rendered.samples)
    if rendered.refusal or not trained_tokens:
        stats.row_dropped(rendered.refusal or "no trained token", example.file, example.line)
        return []
    if len(messages) < len(example.messages):
        stats.row_truncated(change, example.file, example.line)
    samples = [sample for sample in rendered.samples if sample.answers]
    text = example.text if messages is example.messages else chat_text(messages)
    if len(samples) > 1:  # several samples repeat the first turns
        text = "".join(chat_text(messages[: sample.answers[-1] + 1]) for sample in samples)
    tokens = [len(sample.ids) for sample in samples]
    markers = sum(count_markers(tokenizer, sample.ids) for sample in samples)
    stats.row_kept(example.language, len(text), sum(tokens), len(text.encode()), trained_tokens, max(tokens), markers)
    return [(ids, mask, count_answer_bytes([messages[i] for i in answers])) for ids, mask, answers in samples]


def _drop_last_turns(messages: list[Message], max_seq_len: int) -> list[Message]:
    """Drop the last turns that cannot fit with any tokenizer; returns [] if not even the first turn can fit.

    A message takes at least one token, and a token has at most MAX_TOKEN_CHARACTERS characters. A jinja template is
    rendered once per answer, so the time would otherwise grow with the square of the turns.
    """
    lengths = [message_length(turn) for turn in messages]
    if len(messages) <= max_seq_len and sum(lengths) <= MAX_TOKEN_CHARACTERS * max_seq_len:
        return messages
    ends = itertools.accumulate(lengths)
    fitting = sum(1 for _ in itertools.takewhile(lambda end: end <= MAX_TOKEN_CHARACTERS * max_seq_len, ends))
    return first_turns(messages, min(fitting, max(max_seq_len, 3)))


def message_length(message: Message) -> int:
    """Characters of a message in every sample of its chat: without its thought, which later turns leave out."""
    return sum(map(len, message_texts(message))) - len(message.get("reasoning_content", ""))


def _count_fitting_answers(samples: list[RenderedSample], max_seq_len: int) -> int:
    """Number of trained answers of a too long chat that may fit; less than their number."""
    fitting = 0
    for sample in samples:
        # Each run of trained tokens is one answer, and fits only if it ends within the limit.
        fitting += sum(run.end() <= max_seq_len for run in re.finditer(b"\1+", bytes(sample.mask)))
        if len(sample.ids) > max_seq_len:
            break
    return min(fitting, sum(len(sample.answers) for sample in samples) - 1)


def count_answer_bytes(messages: list[Message]) -> int:
    """UTF-8 bytes of the trained answers."""
    return sum(len(answer_text(message).encode()) for message in messages if is_trained(message))


def count_markers(tokenizer: ChatTokenizer, ids: list[int]) -> int:
    """The number of control tokens and of CHAT_MARKERS, which no characters of the text belong to."""
    markers = tokenizer.special_ids | tokenizer.chat_marker_ids
    return sum(index in markers for index in ids)
