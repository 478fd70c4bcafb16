"""The answer of a chat row, in the ways in which rows write one.

Read next: row_text.py (who calls this), pair_answers.py (two answers to one prompt).
"""

from typing import Any

from corpus.chats import NO_TOOLS, Message, Notes, is_filled, message, messages_of, plain_answer, role_of
from corpus.language import sound_text
from corpus.pair_answers import is_ranked
from corpus.spelled_turns import is_tool_call, spells_messages
from corpus.stats import BadRow, UnfitRow


def answer_of(given: Any, key: str, notes: Notes) -> list[Message]:
    """The answer of a chat row, as `key` gives it: text, a number, a message or messages, or several answers.

    Of several under the key `answers` the first is taken and counted. Raises UnfitRow for an empty answer and a call of
    a tool, BadRow for what cannot be used.
    """
    if isinstance(given, str) and not given.lstrip().startswith("[{"):
        return [message("assistant", sound_text(given, key))]
    value = plain_answer(given)
    if is_texts(value) and (key == "answers" or isinstance(given, dict)):
        notes.changes[f"with the first of several {key}"] = None
        value = value[0]
    if not is_filled(value):
        raise UnfitRow("an empty answer")
    if is_tool_call(value):
        raise UnfitRow(f"{NO_TOOLS} ({key})")
    if isinstance(value, (list, tuple, dict)) or spells_messages(value):
        if is_texts(value) or (not isinstance(value, str) and is_ranked(value)):
            raise BadRow(f"several answers in {key}: data_process.py dpo reads ranked ones")
        if isinstance(value, dict) and role_of(value) is None and not is_filled(value.get("messages")):
            raise BadRow(f"{key} is an object, not a string")
        return messages_of(value, notes)
    return [message("assistant", sound_text(value, key))]


def is_texts(value: Any) -> bool:
    """True for a list of texts that is no chat by itself: the paragraphs of a context, ranked answers."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(text, str) for text in value)
