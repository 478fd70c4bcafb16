"""Parses the answers of a row: the answer of a chat, or the two answers of a preference pair and their prompt.

An answer is text, a number, messages, or a list of answers. The prompt of a pair is the common prefix of both
conversations, compared message by message, not character by character: two answers that begin with the same words are
still two answers.

Read next: row_text.py (the caller).
"""

import itertools
from typing import Any

from corpus.chats import (
    Message,
    RowNotes,
    find_content_key,
    is_blank,
    is_filled,
    make_message,
    parse_messages,
    text_key_roles,
    turn_role,
)
from corpus.language import require_text, stringify_number
from corpus.layouts import COMPARISON_KEYS, RANKING_KEYS, UNORDERED_ANSWER_KEYS
from corpus.row_keys import FieldKeys
from corpus.serialized_chats import is_serialized_messages, is_tool_call, parse_marked_text
from corpus.stats import BadRow, DroppedRow
from corpus.tool_turns import parse_calls

PAIR_SIDES = ("chosen", "rejected")
NO_PAIR_KEYS = "none of the keys of a pair"


def parse_answer_value(given: Any, key: str, notes: RowNotes) -> list[Message]:
    """Parses `given`, the value under `key`, into assistant messages.

    Of several texts under the key `answers` the first is used, and the change is noted. Raises DroppedRow for an empty
    answer, BadRow for an unusable value.
    """
    if isinstance(given, str) and not given.lstrip().startswith("[{"):
        return [make_message("assistant", require_text(given, key))]
    value = unwrap_answer(given)
    if is_text_list(value) and (key == "answers" or isinstance(given, dict)):
        notes.changes[f"with the first of several {key}"] = None
        value = value[0]
    if not is_filled(value):
        raise DroppedRow("an empty answer")
    if is_tool_call(value):
        return [make_message("assistant", "") | {"tool_calls": parse_calls(value)}]
    if isinstance(value, (list, tuple, dict)) or is_serialized_messages(value):
        if is_text_list(value) or (not isinstance(value, str) and is_ranked_list(value)):
            raise BadRow(f"several answers in {key}: data_process.py dpo reads ranked ones")
        if isinstance(value, dict) and turn_role(value) is None and not is_filled(value.get("messages")):
            raise BadRow(f"{key} is an object, not a string")
        return parse_messages(value, notes)
    return [make_message("assistant", require_text(value, key))]


def unwrap_answer(value: Any) -> Any:
    """Unwraps an answer: a number, a list of one text or an object with a content key or ground_truth becomes text.

    Returns any other value unchanged.
    """
    if isinstance(value, dict) and "ground_truth" in value:
        value = value["ground_truth"]  # verl's reward_model
    elif isinstance(value, dict) and (key := find_content_key(value)) and turn_role(value) is None:
        value = value[key]
    if isinstance(value, (list, tuple)) and len(value) == 1 and not isinstance(value[0], (list, dict)):
        value = value[0]
    return stringify_number(value)


def is_text_list(value: Any) -> bool:
    """True for a non-empty list of strings, such as the paragraphs of a context or ranked answers."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(text, str) for text in value)


# ---- pairs -----------------------------------------------------------------------------------------------------------
def find_answer_pair(
    row: dict[str, Any], fields: FieldKeys, sides: tuple[str | None, str | None], used: set[str]
) -> tuple[Any, Any]:
    """Returns (chosen, rejected) from two keys, a ranked list, or two answers and a preference key.

    `sides`: the keys of both answers, if the row has them; their keys are added to `used`. Raises BadRow if there are
    no two answers.
    """
    chosen, rejected = sides
    if chosen is not None and rejected is not None and ("chosen" in fields or "rejected" in fields):
        used.update((chosen, rejected))
        return row[chosen], row[rejected]
    answer_keys = [*fields.get("answer", ()), *fields.get("messages", ())]
    if chosen is None and "rejected" in fields and answer_keys:
        chosen, rejected = answer_keys[0], fields["rejected"][0]
        used.update((chosen, rejected))
        return row[chosen], row[rejected]
    if compared := find_compared_answers(row, used):
        return compared
    for key in fields.get("answer", ()):
        is_list = isinstance(row[key], (list, tuple)) and len(row[key]) > 1
        if is_list and not (key in UNORDERED_ANSWER_KEYS and is_text_list(row[key])):
            used.add(key)
            return best_and_worst_answers(row[key])
    raise BadRow(NO_PAIR_KEYS)


def side_conversation(side: str, value: Any, prompt: list[Message], notes: RowNotes) -> list[Message]:
    """Returns the whole conversation of one side: `prompt` + answer, or the conversation that `value` contains.

    Raises DroppedRow for an empty or foreign answer or another prompt, BadRow for an unusable value.
    """
    value = unwrap_answer(value)
    if is_blank(value) or not is_filled(value):
        raise DroppedRow(f"an empty answer ({side})")
    if isinstance(value, (list, tuple)) and len(value) > 1 and prompt and all(isinstance(text, str) for text in value):
        raise BadRow(f"several answers in {side}: write a row for each")
    if isinstance(value, str) and not is_serialized_messages(value):
        messages = parse_marked_text(value)
        if prompt and not _contains_messages(messages, prompt):
            messages = [make_message("assistant", value)]
        if not messages:
            raise BadRow("answers without a prompt")
    else:
        messages = parse_messages(value, notes)
    if messages[-1]["role"] != "assistant":
        raise DroppedRow("the last message is not an answer")
    if is_blank(messages[-1]["content"]) and not messages[-1].get("tool_calls"):
        raise DroppedRow(f"an empty answer ({side})")
    if messages[0]["role"] == "assistant":
        if not prompt:
            raise BadRow("answers without a prompt")
        if prompt[-1]["role"] == "assistant":
            raise BadRow("the prompt ends with an answer")
        return prompt + messages
    if prompt and not _contains_messages(messages, prompt):
        raise DroppedRow("chosen and rejected have different prompts")
    return messages


def _contains_messages(messages: list[Message], part: list[Message]) -> bool:
    return any(messages[i : i + len(part)] == part for i in range(len(messages)))


def find_compared_answers(row: dict[str, Any], used: set[str]) -> tuple[Any, Any] | None:
    """Returns (better answer, worse answer) of the keys in layouts.COMPARISON_KEYS; None if the row has none of them.

    Raises DroppedRow if neither answer is marked as the better one.
    """
    names = {str(key).strip().lower(): key for key in row}
    for *pair_keys, (first_value, second_value) in COMPARISON_KEYS:
        if all(name.lower() in names for name in pair_keys):
            first, second, winner_key = (names[name.lower()] for name in pair_keys)
            used.update((first, second, winner_key))
            winner = (
                str(stringify_number(row[winner_key])).strip().lower().removeprefix("model_").removeprefix("response_")
            )
            if winner not in (str(first_value), str(second_value)):
                raise DroppedRow(f"no answer is marked as the better one ({winner_key})")
            return (row[first], row[second]) if winner == str(first_value) else (row[second], row[first])
    return None


def split_pair(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Returns (prompt, chosen answer, rejected answer) of two conversations.

    Raises DroppedRow if the conversations are equal, one is a prefix of the other, or their prompts differ.
    """
    prompt_length = common_prefix_length(chosen, rejected)
    answers = chosen[prompt_length:], rejected[prompt_length:]
    if not any(answers):
        raise DroppedRow("chosen and rejected are the same")
    if not all(answers):
        raise DroppedRow("one conversation is a prefix of the other")
    if any(answer[0]["role"] != "assistant" for answer in answers):
        raise DroppedRow("chosen and rejected have different prompts")
    return chosen[:prompt_length], *answers


def common_prefix_length(one: list[Any], other: list[Any]) -> int:
    """Returns the length of the common prefix of two lists."""
    return sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], zip(one, other, strict=False)))


# ---- several answers in one list -------------------------------------------------------------------------------------
def is_ranked_list(value: Any) -> bool:
    """True for a list of answer objects: {"answer": ..., "rank": 1} or {"response": ..., "score": 8.5}."""
    return isinstance(value, (list, tuple)) and bool(value) and all(
        isinstance(answer, dict) and (set(text_key_roles(answer).values()) == {"assistant"} or "text" in answer)
        and not answer.keys() & {"role", "from"} for answer in value
    )  # fmt: skip


def best_and_worst_answers(answers: Any) -> tuple[Any, Any]:
    """Returns the first and last answer, sorted by rank or score if all have one. Raises DroppedRow for equal ones."""
    if not is_ranked_list(answers):
        return answers[0], answers[-1]
    key, sign = next(
        ((key, sign) for key, sign in RANKING_KEYS if all(_is_number(a.get(key)) for a in answers)), ("", 1)
    )
    if key:
        answers = sorted(answers, key=lambda answer: sign * answer[key])
        if answers[0][key] == answers[-1][key]:
            raise DroppedRow(f"no answer is marked as the better one ({key})")
    texts = [answer[next(iter(text_key_roles(answer)), "text")] for answer in (answers[0], answers[-1])]
    return texts[0], texts[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == value
