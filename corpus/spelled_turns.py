"""Parses lists of turns stored as text in csv or parquet cells: JSON, a Python literal or the output of numpy.

The text is parsed and never evaluated, so a data file cannot run code.

Read next: chats.py (turns -> messages).
"""

import ast
import json
import warnings
from typing import Any

from corpus.layouts import CONTENT_KEYS, ROLE_KEYS, ROLE_NAMES, TOOL_KEYS
from corpus.stats import BadRow


def spells_messages(value: Any) -> bool:
    """True for text that is a list of messages with roles, written as JSON or as a Python literal."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return False
    turns = parse_literal(value)
    return isinstance(turns, list) and all(isinstance(turn, dict) and is_message(turn) for turn in turns)


def is_message(turn: dict[str, Any]) -> bool:
    """True for an object with a known role and with a key for text or for tool calls."""
    has_role = any(isinstance(turn.get(key), str) and turn[key].strip().lower() in ROLE_NAMES for key in ROLE_KEYS)
    return has_role and any(key in turn for key in (*CONTENT_KEYS, *TOOL_KEYS))


def is_tool_call(value: Any) -> bool:
    """True for text that is a list of function calls, [{"name": ..., "arguments": ...}]."""
    calls = parse_literal(value) if isinstance(value, str) and value.startswith("[{") and "arguments" in value else None
    return isinstance(calls, list) and all(isinstance(c, dict) and {"name", "arguments"} <= c.keys() for c in calls)


def parse_list_literal(text: str, field: str) -> Any:
    """Parses `text` as JSON or as a Python literal. Raises BadRow if it is neither."""
    value = parse_literal(text)
    if value is None:
        raise BadRow(f"{field} is neither JSON nor a Python list")
    return value


def parse_literal(text: str) -> Any:
    """Parses `text` as JSON, as a Python literal or as numpy output; returns None if all fail."""
    for parse in (json.loads, ast.literal_eval, _parse_numpy_list):
        try:
            with warnings.catch_warnings():  # data with invalid escapes such as '\d' would print a SyntaxWarning
                warnings.simplefilter("ignore")
                return parse(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


def _parse_numpy_list(text: str) -> Any:
    """Parses numpy's text for an array of objects, which has no commas; pandas writes lists to csv like this."""
    if "}\n {" not in text:
        raise ValueError
    return ast.literal_eval(text.replace("}\n {", "}, {"))
