"""A row's two answers to one prompt: each side as a whole conversation, and the prompt that both share.

The prompt is the common beginning of both conversations in whole messages, never in characters: two answers that begin
with the same words are still two answers.

Called by rows.py. Read next: pairs.py (pairs -> documents).
"""

import itertools
from typing import Any

from corpus.chats import Message, Notes, is_blank, is_filled, message, messages_of, spells_messages
from corpus.layouts import COMPARISONS
from corpus.report import BadRow, UnfitRow
from corpus.row_keys import Fields, RowKeys

SIDES = ("chosen", "rejected")
NO_PAIR = "none of the keys of a pair"


def sides_of(row: dict[str, Any], fields: Fields, keys: RowKeys, used: set[str]) -> tuple[Any, Any]:
    """The better and the worse answer: two keys, a ranked list, or two answers and a key that names the better one.

    Adds the keys that it reads to `used`. Raises UnfitRow where no answer is better, BadRow for a row without a pair.
    """
    better, worse = (fields.get(side, [None])[0] or keys.present(row, side) for side in SIDES)
    if better is not None and worse is not None and ("chosen" in fields or "rejected" in fields):
        used.update((better, worse))
        return row[better], row[worse]
    for first, second, mark, (one, other) in COMPARISONS:
        if first in row and second in row and mark in row:
            used.update((first, second, mark))
            said = str(row[mark]).strip().lower()
            if said not in (str(one), str(other)):
                raise UnfitRow(f"no answer is marked as the better one ({mark})")
            return (row[first], row[second]) if said == str(one) else (row[second], row[first])
    for key in fields.get("answer", ()):
        if isinstance(row[key], (list, tuple)) and len(row[key]) > 1:
            used.add(key)
            return row[key][0], row[key][-1]
    raise BadRow(NO_PAIR)


def conversation_of(side: str, value: Any, before: list[Message], notes: Notes) -> list[Message]:
    """The conversation of one side: `before` and its answer, or the conversation as it is written.

    Raises UnfitRow for an answer that compares nothing, BadRow for one that cannot be used.
    """
    if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if is_blank(value) or not is_filled(value):
        raise UnfitRow(f"an empty answer ({side})")
    if isinstance(value, str) and before and not spells_messages(value):
        messages = [message("assistant", value)]
    else:
        messages = messages_of(value, notes)
    if messages[-1]["role"] != "assistant":
        raise UnfitRow("an answer that is not the assistant's")
    if is_blank(messages[-1]["content"]):
        raise UnfitRow(f"an empty answer ({side})")
    if messages[0]["role"] == "assistant":
        if not before:
            raise BadRow("answers without a prompt")
        if before[-1]["role"] == "assistant":
            raise BadRow("the prompt ends with an answer")
        return before + messages
    if before and not any(messages[i : i + len(before)] == before for i in range(len(messages))):
        raise UnfitRow("chosen and rejected have different prompts")
    return messages


def split_pair(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """(prompt, better answer, worse answer) of two whole conversations. Raises UnfitRow where they compare nothing."""
    shared = common_length(chosen, rejected)
    answers = chosen[shared:], rejected[shared:]
    if not any(answers):
        raise UnfitRow("chosen and rejected are the same")
    if not all(answers):
        raise UnfitRow("one conversation is only the beginning of the other")
    if any(answer[0]["role"] != "assistant" for answer in answers):
        raise UnfitRow("chosen and rejected have different prompts")
    return chosen[:shared], *answers


def common_length(one: list[Any], other: list[Any]) -> int:
    """Length of the common prefix of two lists."""
    return sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], zip(one, other, strict=False)))
