"""Converts conversations of any supported layout into messages: [{"role", "content"}, ...].

    parse_messages(value)    parses a list of messages, strings, {human, assistant} objects or [question, answer] pairs,
                             the same list written as JSON or Python text, or text with Human: and Assistant: markers

A message has the keys role and content, and `"weight": 0` if the row excludes it from training. An answer may have
reasoning_content and tool_calls, a system message tools (model/chat_template.py). Lists written as text are parsed and
never evaluated, so a data file cannot run code.

Read next: layouts.py (keys and roles), turn_rules.py (order of the roles), row_text.py (rows -> chats).
"""

import itertools
import json
import re
from typing import Any

from corpus.language import is_missing, require_text, stringify_number
from corpus.layouts import (
    CONTENT_KEYS,
    FIELD_KEYS,
    METADATA_KEYS,
    ROLE_KEYS,
    ROLE_NAMES,
    THOUGHT_KEYS,
    TOOL_KEYS,
    TRAINING_FLAG_KEYS,
)
from corpus.serialized_chats import make_message, parse_literal, parse_marked_text, parse_serialized_list
from corpus.stats import BadRow, DroppedRow
from corpus.tool_turns import THOUGHT, parse_calls, parse_tools, result_text
from model.chat_template import Message

TEXT_PART_TYPES = ("text", "input_text", "output_text")  # text types of OpenAI's content parts

_READ_KEYS = frozenset((*ROLE_KEYS, *TRAINING_FLAG_KEYS, "recipient", "end_turn", "tool_call_id"))
_TURN_ROLES = {
    **dict.fromkeys((*FIELD_KEYS["prompt"], *FIELD_KEYS["context"]), "user"),
    **dict.fromkeys(FIELD_KEYS["answer"], "assistant"),
    **ROLE_NAMES,
}
_QA_PREFIX = re.compile(r"\s*[问答][:：]\s*")  # prefix of each text in a list of questions and answers
_MOSS = re.compile(r"<\|(?:Human|MOSS)\|>:[ \t]*")


class RowNotes:
    """Notes on the parsing of a row: descriptions of edits, and filled keys that are ignored."""

    def __init__(self) -> None:
        self.changes: dict[str, None] = {}
        self.unused: dict[str, None] = {}


def chat_text(messages: list[Message]) -> str:
    """Joins the messages without role markers, for language detection, deduplication and pretraining."""
    return "\n".join(map(message_text, messages))


def message_text(message: Message) -> str:
    """The thought, content and calls of a message. Tools are left out: they repeat in every chat of a dataset."""
    if len(message) == 2:
        return message["content"]
    calls = json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else ""
    return "\n".join(filter(None, (message.get("reasoning_content"), message["content"], calls)))


def is_trained(message: Message) -> bool:
    """True for an assistant message whose weight is not 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def is_blank(value: Any) -> bool:
    """True for null, NaN, and empty or white-space text."""
    return (not value or value.isspace()) if isinstance(value, str) else is_missing(value)


def is_filled(value: Any) -> bool:
    """False for null, NaN, blank text, empty lists and objects, and the texts "[]" and "{}"."""
    if isinstance(value, str):
        return not is_blank(value) and (len(value) > 9 or value.strip() not in ("[]", "{}"))
    return not (is_missing(value) or (isinstance(value, (list, tuple, dict)) and not value))


def is_zero_weight(value: Any) -> bool:
    """True for a weight that excludes a message or row from training: 0, false, or either as text (csv)."""
    return value in (0, False) or (isinstance(value, str) and value.strip().lower() in ("0", "0.0", "false"))


# ---- a value -> messages ---------------------------------------------------------------------------------------------
def parse_messages(value: Any, notes: RowNotes, name: str = "the list of messages") -> list[Message]:
    """Parses `value` into messages with unchecked content. Raises BadRow or DroppedRow."""
    if isinstance(value, str):
        marked = parse_marked_text(value)
        if marked:
            return marked
        value = parse_serialized_list(value, name)
    if isinstance(value, dict):
        value = _object_turns(value)
    if not isinstance(value, (list, tuple)):
        raise BadRow("the messages are not a list")
    if not value:
        raise BadRow("no messages")
    if all(isinstance(turn, str) for turn in value):
        if marked := parse_marked_text("\n".join(value)):
            return marked
        if all(map(_QA_PREFIX.match, value)):
            value = [_QA_PREFIX.sub("", text) for text in value]
        roles = itertools.cycle(("user", "assistant"))
        return [make_message(role, text) for role, text in zip(roles, value, strict=False)]
    messages = []
    for turn in value:
        simple = _simple_message(turn)
        messages += [simple] if simple else _parse_turn(turn, notes)
    return messages


def _simple_message(turn: Any) -> Message | None:
    """Fast path for {"role", "content"} and {"from", "value"} with plain text; None for any other turn."""
    if not isinstance(turn, dict) or len(turn) != 2:
        return None
    name, content = (turn["role"], turn.get("content")) if "role" in turn else (turn.get("from"), turn.get("value"))
    role = ROLE_NAMES.get(name) if isinstance(name, str) else None
    if not role or role in ("tool", "call") or not isinstance(content, str) or content.startswith("[{"):
        return None
    return {"role": role, "content": content}


def _object_turns(value: dict[str, Any]) -> Any:
    """Returns the turns of an object: one message, one {human, assistant}, {"messages": [...]}, {"turn_1": {...}, ...}
    or one list per key, {"role": [...], "content": [...]}, as a `datasets` Sequence stores them."""
    inner = next((value[key] for key in FIELD_KEYS["messages"] if is_filled(value.get(key))), None)
    if inner is not None:
        return inner
    columns = list(value.values())
    if value and all(isinstance(turn, dict) for turn in columns):
        return columns
    if value and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]  # one list per key
    return [value]


def _parse_turn(turn: Any, notes: RowNotes) -> list[Message]:
    if isinstance(turn, (list, tuple)) and len(turn) == 2:
        role = ROLE_NAMES.get(turn[0].strip().lower()) if isinstance(turn[0], str) else None
        if role:
            return [_parse_message({"role": turn[0], "content": turn[1]}, role, notes)]
        return [make_message("user", stringify_number(turn[0])), make_message("assistant", stringify_number(turn[1]))]
    if not isinstance(turn, dict):
        raise BadRow("a message is not an object")
    role = turn_role(turn)
    if role:
        return [_parse_message(turn, role, notes)]
    texts = text_key_roles(turn)
    if not texts:
        raise BadRow("a message without a role")
    if not {"tool", "call"}.isdisjoint(texts.values()):
        raise BadRow("a tool turn without a role key")
    _note_unused_keys(turn, set(texts), notes)
    messages = []
    for role in ("system", "user", "assistant"):
        contents = [_message_text(turn[key]) for key in texts if texts[key] == role]
        if role == "user" and len(contents) > 1 and all(isinstance(text, str) for text in contents):
            contents = ["\n".join(contents)]  # a question and its context
        messages += [make_message(role, content) for content in contents]
    return messages


def turn_role(turn: dict[str, Any]) -> str | None:
    """Returns user, assistant, system, tool or call; None without a role key. Raises BadRow for an unknown role."""
    for key in ROLE_KEYS:
        name = turn.get(key)
        if isinstance(name, str):
            role = ROLE_NAMES.get(name) or ROLE_NAMES.get(name.strip().lower())
            if role:
                return role
            if key != "type":
                raise BadRow(f"unknown role {name[:20]!r}")
    return None


def text_key_roles(turn: dict[str, Any]) -> dict[str, str]:
    """Returns {key: role} of a turn without a role key, such as {human, assistant} or {q, a}; context keys are last."""
    roles = {key: _TURN_ROLES.get(key) or _TURN_ROLES.get(str(key).lower(), "") for key in turn}
    filled = [key for key, role in roles.items() if role and is_filled(turn[key])]
    return {key: roles[key] for key in sorted(filled, key=lambda key: str(key).lower() in FIELD_KEYS["context"])}


def _parse_message(turn: dict[str, Any], role: str, notes: RowNotes) -> Message:
    key = find_content_key(turn)
    value = turn[key] if key else None
    if role == "call":
        return _parse_call_turn(_message_text(value))
    if role == "tool":
        result = make_message(role, result_text(value))
    else:
        call = next((name for name in TOOL_KEYS if is_filled(turn.get(name))), None)
        is_bare_call = call and (is_missing(value) or value == [])
        result = make_message(role, "" if is_bare_call else _message_text(value))
        if call and role != "assistant":
            raise BadRow(f"{call} in a {role} message")
        if role == "assistant" and len(turn) > 2:
            result |= _parse_thought(turn)
        if call:
            result["tool_calls"] = parse_calls(turn[call])
            result["content"] = result["content"] if not is_blank(result["content"]) else ""
    if len(turn) > 2:
        if is_filled(turn.get("tools")):
            if role != "system":
                raise BadRow(f"tools in a {role} message")
            result["tools"] = parse_tools(turn["tools"])
        if role == "assistant" and any(is_zero_weight(turn.get(flag)) for flag in TRAINING_FLAG_KEYS):
            result["weight"] = 0
        read = {key, "tools", *TOOL_KEYS, *(THOUGHT_KEYS if role == "assistant" else ())}
        _note_unused_keys(turn, read | {"name"} if role == "tool" else read, notes)
    return result


def _parse_call_turn(text: Any) -> Message:
    """A turn that is a call, as ShareGPT's function_call; a thought may come first."""
    thought, end = None, 0
    if isinstance(text, str) and (found := THOUGHT.match(text)):
        thought, end = found[1].strip("\n"), found.end()
    message = make_message("assistant", "")
    if thought is not None:
        message["reasoning_content"] = thought
    return {**message, "tool_calls": parse_calls(text[end:] if isinstance(text, str) else text)}


def _parse_thought(turn: dict[str, Any]) -> Message:
    """{"reasoning_content": …} of an answer, or {}.

    An empty reasoning_content is an empty thought, unless the turn has other empty keys: then all turns have all keys.
    """
    thought = next((name for name in THOUGHT_KEYS if is_filled(turn.get(name))), None)
    if thought is not None:
        return {"reasoning_content": require_text(turn[thought], thought)}
    has_placeholders = any(name in turn and not is_filled(turn[name]) for name in ("tools", *TOOL_KEYS))
    is_empty = turn.get("reasoning_content") == "" and not has_placeholders
    return {"reasoning_content": ""} if is_empty else {}


def find_content_key(turn: dict[str, Any]) -> str | None:
    """Returns the first content key that is filled, else the first that is present, else None."""
    present = [key for key in CONTENT_KEYS if key in turn]
    return next((key for key in present if is_filled(turn[key])), present[0] if present else None)


def _note_unused_keys(turn: dict[str, Any], used: set[Any], notes: RowNotes) -> None:
    for key, value in turn.items():
        if key not in used and key not in _READ_KEYS and key not in METADATA_KEYS and is_filled(value):
            notes.unused[f"messages.{key}"] = None


def _message_text(value: Any) -> Any:
    """Returns the text of a message. Joins the content parts of OpenAI: [{"type": "text", "text": "..."}]."""
    if isinstance(value, str):
        if value.startswith("<|") and (moss := _MOSS.match(value)):
            words = value[moss.end() :].rstrip()
            return (words[:-5] if words.endswith(("<eoh>", "<eom>")) else words).rstrip()
        if value.startswith("[{") and "text" in value[:40]:
            parts = parse_literal(value)
            if isinstance(parts, list) and all(isinstance(p, dict) and p.get("type") in TEXT_PART_TYPES for p in parts):
                return _message_text(parts)
        return value
    parts = [value] if isinstance(value, dict) else value
    if not isinstance(parts, list):
        return stringify_number(value)
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if all(isinstance(text, str) for text in texts):
        return "".join(map(str, texts))
    raise DroppedRow("a message with parts that are not text")


def parse_history(value: Any, notes: RowNotes) -> list[Message]:
    """Parses earlier turns, [[question, answer], ...] or messages, from a list or from JSON or Python text."""
    if not is_filled(value):
        return []
    if isinstance(value, str):
        value = parse_marked_text(value) or parse_serialized_list(value, "history")
    if not isinstance(value, (list, tuple)):
        raise BadRow("history is not a list")
    pairs = all(isinstance(turn, dict) or (isinstance(turn, (list, tuple)) and len(turn) == 2) for turn in value)
    strings = len(value) % 2 == 0 and all(isinstance(turn, str) for turn in value)
    if not (pairs or strings):
        raise BadRow("history is not a list of [question, answer] pairs")
    turns = parse_messages(value, notes, "history")
    return [{**turn, "content": require_text(turn["content"], "history")} for turn in turns]
