"""Chats -> documents of the token folder: ids, mask of trained tokens, and bytes of the answers, cut at whole turns.

Called by prepare_chats.py. Read next: ../model/tokenizer.py (`render_each`).
"""

import itertools
from typing import Any

from corpus.chats import Message, chat_text, is_trained, trim_unanswered
from corpus.examples import Example
from corpus.stats import DataStats

MAX_TOKEN_CHARACTERS = 256  # characters; the longest of usual tokenizers are 128 spaces
MaskedTokens = tuple[list[int], list[int], int]  # ids, mask, UTF-8 bytes of the answers


def render_chat_examples(
    examples: list[Example], tokenizer: Any, max_seq_len: int, report: DataStats
) -> list[list[MaskedTokens]]:
    """Of each chat the documents of as many whole first turns as fit; none when not even one does, or when the
    tokenizer's chat format cannot write the chat.

    That is one document, or several where the format writes an answer differently when turns follow it
    (model/tokenizer.py, `render_each`). A turn is never cut inside: half an answer would train to stop inside a
    sentence.
    """
    fitting_chats = [_drop_last_turns(example.messages, max_seq_len) for example in examples]
    whole = iter(tokenizer.render_each([messages for messages in fitting_chats if messages]))
    result = []
    for example, messages in zip(examples, fitting_chats, strict=True):
        if not messages:
            report.row_dropped(f"first turn longer than {max_seq_len} tokens", example.file, example.line)
        result.append(_fit_chat(example, next(whole), tokenizer, max_seq_len, report) if messages else [])
    return result


def _fit_chat(
    example: Example, rendered: Any, tokenizer: Any, max_seq_len: int, report: DataStats
) -> list[MaskedTokens]:
    """`rendered` is that of the chat's first turns."""
    messages = _drop_last_turns(example.messages, max_seq_len)
    change = f"cut at a whole turn to {max_seq_len} tokens"
    while rendered.is_too_long and (first_half := trim_unanswered(messages[: len(messages) // 2])):
        messages, change = first_half, "cut at a whole turn to what the model's chat template can write"
        (rendered,) = tokenizer.render_each([messages])
    while not rendered.refusal and len(rendered.samples[-1].ids) > max_seq_len:
        turns = _count_fitting_turns(rendered.samples, max_seq_len)
        if turns == 0:
            report.row_dropped(f"first turn longer than {max_seq_len} tokens", example.file, example.line)
            return []
        answers = [i for i, message in enumerate(messages) if is_trained(message)]
        messages = messages[: answers[turns - 1] + 1]
        (rendered,) = tokenizer.render_each([messages])
    trained_tokens = sum(sum(sample.mask) for sample in rendered.samples)
    if rendered.refusal or not trained_tokens:
        report.row_dropped(rendered.refusal or "no trained token", example.file, example.line)
        return []
    if len(messages) < len(example.messages):
        report.row_truncated(change, example.file, example.line)
    samples = [sample for sample in rendered.samples if sample.answers]
    text = example.text if messages is example.messages else chat_text(messages)
    if len(samples) > 1:  # several samples repeat the first turns
        text = "".join(chat_text(messages[: sample.answers[-1] + 1]) for sample in samples)
    tokens = [len(sample.ids) for sample in samples]
    report.row_kept(example.language, len(text), sum(tokens), len(text.encode()), trained_tokens, max(tokens))
    return [(ids, mask, count_answer_bytes([messages[i] for i in answers])) for ids, mask, answers in samples]


def _drop_last_turns(messages: list[Message], max_seq_len: int) -> list[Message]:
    """The chat without last turns that cannot fit with any tokenizer; empty where its first turn cannot.

    Every message takes a token or more, and a token stands for MAX_TOKEN_CHARACTERS characters or less. A model's chat
    template is rendered once for each answer: without this the time would grow with turns squared.
    """
    if (
        len(messages) <= max_seq_len
        and sum(len(turn["content"]) for turn in messages) <= MAX_TOKEN_CHARACTERS * max_seq_len
    ):
        return messages
    ends = itertools.accumulate(len(turn["content"]) for turn in messages)
    fitting = sum(1 for _ in itertools.takewhile(lambda end: end <= MAX_TOKEN_CHARACTERS * max_seq_len, ends))
    return trim_unanswered(messages[: min(fitting, max(max_seq_len, 3))])


def _count_fitting_turns(samples: list[Any], max_seq_len: int) -> int:
    """How many turns of a chat that is too long may fit; fewer than it has."""
    if len(samples) > 1:  # each of the others is the beginning of the chat up to an answer
        return sum(len(sample.answers) for sample in samples[:-1] if len(sample.ids) <= max_seq_len)
    mask = samples[0].mask
    # Each run of trained tokens is one answer; no turn whose answer ends beyond the limit can stay.
    ends = [i + 1 for i, trained in enumerate(mask) if trained and not (i + 1 < len(mask) and mask[i + 1])]
    return min(sum(end <= max_seq_len for end in ends), len(ends) - 1)


def count_answer_bytes(messages: list[Message]) -> int:
    """UTF-8 bytes of what the assistant says."""
    return sum(len(message["content"].encode()) for message in messages if is_trained(message))
