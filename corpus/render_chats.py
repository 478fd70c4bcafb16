"""Chats -> documents of the token folder (ids, loss mask, answer bytes), truncated after whole turns.

Called by tokenize_chats.py. Read next: ../model/tokenizer.py (`render_each`).
"""

import itertools
import re

from corpus.chats import Message, chat_text, is_trained, trim_unanswered
from corpus.examples import ChatExample
from corpus.stats import DataStats
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
    while rendered.is_too_long and (first_half := trim_unanswered(messages[: len(messages) // 2])):
        messages, change = first_half, "cut at a whole turn to what the model's chat template can write"
        (rendered,) = tokenizer.render_each([messages])
    while not rendered.refusal and len(rendered.samples[-1].ids) > max_seq_len:
        turns = _count_fitting_turns(rendered.samples, max_seq_len)
        if turns == 0:
            stats.row_dropped(f"first turn longer than {max_seq_len} tokens", example.file, example.line)
            return []
        answers = [i for i, message in enumerate(messages) if is_trained(message)]
        messages = messages[: answers[turns - 1] + 1]
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
    stats.row_kept(example.language, len(text), sum(tokens), len(text.encode()), trained_tokens, max(tokens))
    return [(ids, mask, count_answer_bytes([messages[i] for i in answers])) for ids, mask, answers in samples]


def _drop_last_turns(messages: list[Message], max_seq_len: int) -> list[Message]:
    """Drop the last turns that cannot fit with any tokenizer; returns [] if not even the first turn can fit.

    A message takes at least one token, and a token has at most MAX_TOKEN_CHARACTERS characters. A jinja template is
    rendered once per answer, so the time would otherwise grow with the square of the turns.
    """
    if (
        len(messages) <= max_seq_len
        and sum(len(turn["content"]) for turn in messages) <= MAX_TOKEN_CHARACTERS * max_seq_len
    ):
        return messages
    ends = itertools.accumulate(len(turn["content"]) for turn in messages)
    fitting = sum(1 for _ in itertools.takewhile(lambda end: end <= MAX_TOKEN_CHARACTERS * max_seq_len, ends))
    return trim_unanswered(messages[: min(fitting, max(max_seq_len, 3))])


def _count_fitting_turns(samples: list[RenderedSample], max_seq_len: int) -> int:
    """Number of turns of a too long chat that may fit; less than the number of its turns."""
    if len(samples) > 1:  # every sample but the last is the chat up to one of its answers
        return sum(len(sample.answers) for sample in samples[:-1] if len(sample.ids) <= max_seq_len)
    # Each run of trained tokens is one answer; a turn fits only if its answer ends within the limit.
    ends = [run.end() for run in re.finditer(b"\1+", bytes(samples[0].mask))]
    return min(sum(end <= max_seq_len for end in ends), len(ends) - 1)


def count_answer_bytes(messages: list[Message]) -> int:
    """UTF-8 bytes of the trained answers."""
    return sum(len(message["content"].encode()) for message in messages if is_trained(message))
