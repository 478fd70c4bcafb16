"""Edits the texts inside a row without changing its layout, as `clean` does for chats and pairs.

    edit_value(value, edit)    returns `value` with every text that row_text.py reads replaced by edit(text)

Read next: row_text.py (RowReader.edit), ../curation/cleaning.py (the rules).
"""

import json
import re
from collections.abc import Callable
from typing import Any

from corpus.chats import text_key_roles, turn_role
from corpus.layouts import CONTENT_KEYS, THOUGHT_KEYS
from corpus.serialized_chats import edit_marked_text, is_message, is_tool_call, parse_marked_text, parse_serialized_list
from corpus.stats import BadRow

# Of texts that tool_turns.py reads: JSON of calls and tools, and the markers around thoughts and results.
_PARTS = re.compile(r"(<tool_call>.*?</tool_call>|<tools>.*?</tools>|</?(?:think|tool_response)>\s*)", re.DOTALL)


def edit_value(value: Any, edit: Callable[[str], str]) -> Any:
    """Returns `value` with its texts edited. Roles are kept; a list of turns written as text becomes JSON text."""
    if isinstance(value, str) and (is_tool_call(value) or _PARTS.search(value)):
        pieces = [] if is_tool_call(value) else _PARTS.split(value)  # texts and, at odd indices, what stays
        return "".join(piece if i % 2 or not piece.strip() else edit(piece) for i, piece in enumerate(pieces)) or value
    if isinstance(value, str):
        if value.lstrip()[:1] == "[":
            try:
                turns = parse_serialized_list(value, "")
            except BadRow:
                return edit(value)
            if isinstance(turns, list) and turns and all(map(_is_turn, turns)):
                edited = edit_value(turns, edit)
                return value if edited == turns else json.dumps(edited, ensure_ascii=False)
        return edit_marked_text(value, edit) if parse_marked_text(value) else edit(value)
    if isinstance(value, (list, tuple)):
        return [edit_value(inner, edit) for inner in value]
    if isinstance(value, dict):
        return {key: edit_value(inner, edit) if key in _text_keys(value) else inner for key, inner in value.items()}
    return value


def _is_turn(turn: Any) -> bool:
    """False for objects of an answer that is itself JSON."""
    return isinstance(turn, (list, tuple)) or (
        isinstance(turn, dict) and ("text" in turn or is_message(turn) or bool(text_key_roles(turn)))
    )


def _text_keys(turn: dict[str, Any]) -> set[str]:
    """The keys of a turn whose values contain text."""
    try:
        role = turn_role(turn)
    except BadRow:
        role = None
    if role == "call":
        return set()  # JSON
    if role:
        return {key for key in (*CONTENT_KEYS, *THOUGHT_KEYS) if key in turn}
    return {*text_key_roles(turn), *(key for key in turn if key in CONTENT_KEYS or isinstance(turn[key], (dict, list)))}
