"""A row's two answers to one prompt: each side as a whole conversation, and the prompt that both share.

The prompt is the common beginning of both conversations in whole messages, never in characters: two answers that begin
with the same words are still two answers.

Called by row_text.py. Read next: preferences.py (pairs -> documents).
"""

import itertools
from typing import Any

from corpus.chats import (
    Message,
    Notes,
    is_blank,
    is_filled,
    message,
    messages_of,
    plain_answer,
    turn_texts,
)
from corpus.language import as_text
from corpus.layouts import COMPARISONS, SCORES
from corpus.marked_text import marked_turns
from corpus.spelled_turns import spells_messages
from corpus.stats import BadRow, UnfitRow

SIDES = ("chosen", "rejected")
NO_PAIR = "none of the keys of a pair"


def conversation_of(side: str, value: Any, before: list[Message], notes: Notes) -> list[Message]:
    """The conversation of one side: `before` and its answer, or the conversation as it is written.

    Raises UnfitRow for an answer that compares nothing, BadRow for one that cannot be used.
    """
    value = plain_answer(value)
    if is_blank(value) or not is_filled(value):
        raise UnfitRow(f"an empty answer ({side})")
    if isinstance(value, (list, tuple)) and len(value) > 1 and before and all(isinstance(text, str) for text in value):
        raise BadRow(f"several answers in {side}: write a row for each")
    if isinstance(value, str) and not spells_messages(value):
        messages = marked_turns(value)
        if before and not _contains(messages, before):
            messages = [message("assistant", value)]
        if not messages:
            raise BadRow("answers without a prompt")
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
    if before and not _contains(messages, before):
        raise UnfitRow("chosen and rejected have different prompts")
    return messages


def _contains(messages: list[Message], part: list[Message]) -> bool:
    return any(messages[i : i + len(part)] == part for i in range(len(messages)))


def compared_sides(row: dict[str, Any], used: set[str]) -> tuple[Any, Any] | None:
    """The better and the worse of two answers beside each other (layouts.COMPARISONS); None where there are none.

    Raises UnfitRow where none of the two is marked as the better one.
    """
    names = {str(key).strip().lower(): key for key in row}
    for *three, (one, other) in COMPARISONS:
        if all(name.lower() in names for name in three):
            first, second, mark = (names[name.lower()] for name in three)
            used.update((first, second, mark))
            said = str(as_text(row[mark])).strip().lower().removeprefix("model_").removeprefix("response_")
            if said not in (str(one), str(other)):
                raise UnfitRow(f"no answer is marked as the better one ({mark})")
            return (row[first], row[second]) if said == str(one) else (row[second], row[first])
    return None


# ---- several answers in one list -------------------------------------------------------------------------------------
def is_ranked(value: Any) -> bool:
    """True for a list of answers as objects: {"answer": ..., "rank": 1}, {"response": ..., "score": 8.5}."""
    return isinstance(value, (list, tuple)) and bool(value) and all(
        isinstance(answer, dict) and (set(turn_texts(answer).values()) == {"assistant"} or "text" in answer)
        and not answer.keys() & {"role", "from"} for answer in value
    )  # fmt: skip


def best_and_worst(answers: Any) -> tuple[Any, Any]:
    """The first and the last answer, by rank or score where all have one. Raises UnfitRow where these are equal."""
    if not is_ranked(answers):
        return answers[0], answers[-1]
    key, sign = next(((key, sign) for key, sign in SCORES if all(_is_number(a.get(key)) for a in answers)), ("", 1))
    if key:
        answers = sorted(answers, key=lambda answer: sign * answer[key])
        if answers[0][key] == answers[-1][key]:
            raise UnfitRow(f"no answer is marked as the better one ({key})")
    texts = [answer[next(iter(turn_texts(answer)), "text")] for answer in (answers[0], answers[-1])]
    return texts[0], texts[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == value


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
