"""Chats -> documents of the token folder: ids, mask of trained tokens, and bytes of the answers, cut at whole turns.

Called by prepare_chats.py. Read next: ../model/tokenizer.py (`render_each`).
"""

import itertools
from typing import Any

from corpus.chats import Message, chat_text, is_trained, whole_turns
from corpus.examples import Item
from corpus.stats import DataReport

LONGEST_TOKEN = 256  # characters; the longest of usual tokenizers are 128 spaces
Document = tuple[list[int], list[int], int]  # ids, mask, UTF-8 bytes of the answers


def render_chats(items: list[Item], tokenizer: Any, max_seq_len: int, report: DataReport) -> list[list[Document]]:
    """Of each chat the documents of as many whole first turns as fit; none when not even one does, or when the
    tokenizer's chat format cannot write the chat.

    That is one document, or several where the format writes an answer differently when turns follow it
    (model/tokenizer.py, `render_each`). A turn is never cut inside: half an answer would train to stop inside a
    sentence.
    """
    firsts = [_first_turns(item.messages, max_seq_len) for item in items]
    whole = iter(tokenizer.render_each([messages for messages in firsts if messages]))
    result = []
    for item, messages in zip(items, firsts, strict=True):
        if not messages:
            report.drop(f"first turn longer than {max_seq_len} tokens", item.file, item.line)
        result.append(_fit(item, next(whole), tokenizer, max_seq_len, report) if messages else [])
    return result


def _fit(item: Item, rendered: Any, tokenizer: Any, max_seq_len: int, report: DataReport) -> list[Document]:
    """`rendered` is that of the chat's first turns."""
    messages = _first_turns(item.messages, max_seq_len)
    shortened = f"cut at a whole turn to {max_seq_len} tokens"
    while rendered.too_long and (first_half := whole_turns(messages[: len(messages) // 2])):
        messages, shortened = first_half, "cut at a whole turn to what the model's chat template can write"
        (rendered,) = tokenizer.render_each([messages])
    while not rendered.refusal and len(rendered.samples[-1].ids) > max_seq_len:
        turns = _whole_turns(rendered.samples, max_seq_len)
        if turns == 0:
            report.drop(f"first turn longer than {max_seq_len} tokens", item.file, item.line)
            return []
        answers = [i for i, message in enumerate(messages) if is_trained(message)]
        messages = messages[: answers[turns - 1] + 1]
        (rendered,) = tokenizer.render_each([messages])
    trained_tokens = sum(sum(sample.mask) for sample in rendered.samples)
    if rendered.refusal or not trained_tokens:
        report.drop(rendered.refusal or "no trained token", item.file, item.line)
        return []
    if len(messages) < len(item.messages):
        report.shorten(shortened, item.file, item.line)
    samples = [sample for sample in rendered.samples if sample.answers]
    text = item.text if messages is item.messages else chat_text(messages)
    if len(samples) > 1:  # several samples repeat the first turns
        text = "".join(chat_text(messages[: sample.answers[-1] + 1]) for sample in samples)
    tokens = [len(sample.ids) for sample in samples]
    report.keep(item.language, len(text), sum(tokens), len(text.encode()), trained_tokens, max(tokens))
    return [(ids, mask, answer_bytes([messages[i] for i in answers])) for ids, mask, answers in samples]


def _first_turns(messages: list[Message], max_seq_len: int) -> list[Message]:
    """The chat without last turns that cannot fit with any tokenizer; empty where its first turn cannot.

    Every message takes a token or more, and a token stands for LONGEST_TOKEN characters or less. A model's chat
    template is rendered once for each answer: without this the time would grow with turns squared.
    """
    if len(messages) <= max_seq_len and sum(len(turn["content"]) for turn in messages) <= LONGEST_TOKEN * max_seq_len:
        return messages
    ends = itertools.accumulate(len(turn["content"]) for turn in messages)
    fitting = sum(1 for _ in itertools.takewhile(lambda end: end <= LONGEST_TOKEN * max_seq_len, ends))
    return whole_turns(messages[: min(fitting, max(max_seq_len, 3))])


def _whole_turns(samples: list[Any], max_seq_len: int) -> int:
    """How many turns of a chat that is too long may fit; fewer than it has."""
    if len(samples) > 1:  # each of the others is the beginning of the chat up to an answer
        return sum(len(sample.answers) for sample in samples[:-1] if len(sample.ids) <= max_seq_len)
    mask = samples[0].mask
    # Each run of trained tokens is one answer; no turn whose answer ends beyond the limit can stay.
    ends = [i + 1 for i, trained in enumerate(mask) if trained and not (i + 1 < len(mask) and mask[i + 1])]
    return min(sum(end <= max_seq_len for end in ends), len(ends) - 1)


def answer_bytes(messages: list[Message]) -> int:
    """UTF-8 bytes of what the assistant says."""
    return sum(len(message["content"].encode()) for message in messages if is_trained(message))
