"""Editing the texts inside a row without changing its layout: what `clean` does to chats and pairs.

    edit_value(value, edit)    every text in a value that row_text.py reads replaced by edit(text)

Read next: row_text.py (RowReader.edit), ../curation/cleaning.py (the rules).
"""

import json
from collections.abc import Callable
from typing import Any

from corpus.chats import text_key_roles, turn_role
from corpus.layouts import CONTENT_KEYS, THOUGHT_KEYS
from corpus.marked_text import edit_marked_text, parse_marked_text
from corpus.spelled_turns import is_message, parse_list_literal
from corpus.stats import BadRow


def edit_value(value: Any, edit: Callable[[str], str]) -> Any:
    """`value` with its texts edited. Roles stay; text that spells a list of turns is written as JSON again."""
    if isinstance(value, str):
        if value.lstrip()[:1] == "[":
            try:
                spelled = parse_list_literal(value, "")
            except BadRow:
                return edit(value)
            if isinstance(spelled, list) and spelled and all(map(_is_turn, spelled)):
                edited = edit_value(spelled, edit)
                return value if edited == spelled else json.dumps(edited, ensure_ascii=False)
        return edit_marked_text(value, edit) if parse_marked_text(value) else edit(value)
    if isinstance(value, (list, tuple)):
        return [edit_value(inner, edit) for inner in value]
    if isinstance(value, dict):
        return {key: edit_value(inner, edit) if key in _text_keys(value) else inner for key, inner in value.items()}
    return value


def _is_turn(turn: Any) -> bool:
    """False for the objects of an answer that is JSON."""
    return isinstance(turn, (list, tuple)) or (
        isinstance(turn, dict) and ("text" in turn or is_message(turn) or bool(text_key_roles(turn)))
    )


def _text_keys(turn: dict[str, Any]) -> set[str]:
    """The keys of an object inside a list of turns that hold text."""
    try:
        role = turn_role(turn)
    except BadRow:
        role = None
    if role:
        return {key for key in (*CONTENT_KEYS, *THOUGHT_KEYS) if key in turn}
    return {*text_key_roles(turn), *(key for key in turn if key in CONTENT_KEYS or isinstance(turn[key], (dict, list)))}
