"""Parses the answer of a chat row: text, a number, messages, or a list of answers.

Read next: row_text.py (the caller), pair_answers.py (two answers to one prompt).
"""

from typing import Any

from corpus.chats import (
    TOOLS_UNSUPPORTED,
    Message,
    RowNotes,
    is_filled,
    make_message,
    parse_messages,
    turn_role,
    unwrap_answer,
)
from corpus.language import require_text
from corpus.pair_answers import is_ranked_list
from corpus.spelled_turns import is_tool_call, spells_messages
from corpus.stats import BadRow, DroppedRow


def parse_answer(given: Any, key: str, notes: RowNotes) -> list[Message]:
    """Parses `given`, the value under `key`, into assistant messages.

    Of several texts under the key `answers` the first is used, and the change is noted. Raises DroppedRow for an empty
    answer or a tool call, BadRow for an unusable value.
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
        raise DroppedRow(f"{TOOLS_UNSUPPORTED} ({key})")
    if isinstance(value, (list, tuple, dict)) or spells_messages(value):
        if is_text_list(value) or (not isinstance(value, str) and is_ranked_list(value)):
            raise BadRow(f"several answers in {key}: data_process.py dpo reads ranked ones")
        if isinstance(value, dict) and turn_role(value) is None and not is_filled(value.get("messages")):
            raise BadRow(f"{key} is an object, not a string")
        return parse_messages(value, notes)
    return [make_message("assistant", require_text(value, key))]


def is_text_list(value: Any) -> bool:
    """True for a non-empty list of strings, such as the paragraphs of a context or ranked answers."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(text, str) for text in value)
