"""Turns -> messages: every way in which a row writes a conversation becomes [{"role", "content"}, ...].

    messages_of(value)       a list of messages, of strings, of {human, assistant}, of [question, answer]; text that
                             spells such a list in JSON or Python notation; text marked with Human: and Assistant:
    apply_turn_rules(...)    system first, then user and assistant in turn (layouts.TURN_RULES says what is done)

A message has the keys role and content, and `"weight": 0` where the row excludes it from training. Text that spells a
list is parsed, never evaluated: a data file cannot run code. The last turn may lack its answer; `whole_turns` removes
it.

Read next: layouts.py (keys and roles), row_text.py (rows -> chats), prepare_chats.py (chats -> tokens).
"""

import itertools
import re
from typing import Any

from corpus.language import as_text, is_missing, sound_text
from corpus.layouts import CONTENT_KEYS, HARMLESS, KEYS, ROLE_KEYS, ROLES, THOUGHT_KEYS, TOOL_KEYS, TRAINED_KEYS
from corpus.marked_text import Message, marked_turns, message
from corpus.spelled_turns import parse_list, parsed
from corpus.stats import BadRow, UnfitRow

OPENING = "without the assistant's opening message"
JOINED = "with messages of one role in a row joined"
CUT = "cut before an empty message"
TEXT_PARTS = ("text", "input_text", "output_text")  # OpenAI's types of parts that are text
NO_TOOLS = "tool turns are not trained yet"

_READ_KEYS = frozenset((*ROLE_KEYS, *TOOL_KEYS, *THOUGHT_KEYS, *TRAINED_KEYS, "recipient", "end_turn"))
_TURN_ROLES = {
    **dict.fromkeys((*KEYS["prompt"], *KEYS["context"]), "user"), **dict.fromkeys(KEYS["answer"], "assistant"), **ROLES
}  # fmt: skip


_SPEAKER = re.compile(r"\s*[问答][:：]\s*")  # in front of each text of a list of questions and answers
_MOSS = re.compile(r"<\|(?:Human|MOSS)\|>:[ \t]*")


class Notes:
    """What a row loses on its way to messages: `changes` are reasons, `unused` are keys that have a value."""

    def __init__(self) -> None:
        self.changes: dict[str, None] = {}
        self.unused: dict[str, None] = {}


def whole_turns(messages: list[Message]) -> list[Message]:
    """The chat up to its last answer: a last question without an answer is left out. May be empty."""
    if messages and messages[-1]["role"] == "assistant":
        return messages
    end = max((i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    return messages[:end]


def chat_text(messages: list[Message]) -> str:
    """The words of a chat without any marker: what language detection, duplicates and plain-text training look at."""
    return "\n".join(message["content"] for message in messages)


def is_trained(message: Message) -> bool:
    """True for an answer that the row does not exclude from training."""
    return message["role"] == "assistant" and message.get("weight") != 0


def is_blank(value: Any) -> bool:
    """True for null, NaN and text of white space only."""
    return (not value or value.isspace()) if isinstance(value, str) else is_missing(value)


def is_filled(value: Any) -> bool:
    """False for null, NaN, blank text, empty lists and objects, and text that spells an empty list."""
    if isinstance(value, str):
        return not is_blank(value) and (len(value) > 9 or value.strip() not in ("[]", "{}"))
    return not (is_missing(value) or (isinstance(value, (list, tuple, dict)) and not value))


def is_zero(value: Any) -> bool:
    """True for a weight that excludes what it belongs to: 0, false, or such text, as a csv cell has it."""
    return value in (0, False) or (isinstance(value, str) and value.strip().lower() in ("0", "0.0", "false"))


# ---- a value -> messages ---------------------------------------------------------------------------------------------
def messages_of(value: Any, notes: Notes, field: str = "the list of messages") -> list[Message]:
    """The messages that `value` holds; their text is not checked yet. Raises BadRow, or UnfitRow for tool turns."""
    if isinstance(value, str):
        marked = marked_turns(value)
        if marked:
            return marked
        value = parse_list(value, field)
    if isinstance(value, dict):
        value = _turns_of_object(value)
    if not isinstance(value, (list, tuple)):
        raise BadRow("the messages are not a list")
    if not value:
        raise BadRow("no messages")
    if all(isinstance(turn, str) for turn in value):
        if marked := marked_turns("\n".join(value)):
            return marked
        if all(map(_SPEAKER.match, value)):
            value = [_SPEAKER.sub("", text) for text in value]
        return [message(role, text) for role, text in zip(itertools.cycle(("user", "assistant")), value, strict=False)]
    messages = []
    for turn in value:
        usual = _usual_message(turn)
        messages += [usual] if usual else _messages_of_turn(turn, notes)
    return messages


def _usual_message(turn: Any) -> Message | None:
    """The message of {"role", "content"} or {"from", "value"} with text and nothing else: nearly all turns are such."""
    if not isinstance(turn, dict) or len(turn) != 2:
        return None
    name, content = (turn["role"], turn.get("content")) if "role" in turn else (turn.get("from"), turn.get("value"))
    role = ROLES.get(name) if isinstance(name, str) else None
    if not role or role == "tool" or not isinstance(content, str) or content.startswith("[{"):
        return None
    return {"role": role, "content": content}


def _turns_of_object(value: dict[str, Any]) -> Any:
    """The turns in an object: one message, one {human, assistant}, {"messages": [...]}, {"turn_1": {...}, ...}, or
    {"role": [...], "content": [...]}, as datasets stores a Sequence."""
    inner = next((value[key] for key in KEYS["messages"] if is_filled(value.get(key))), None)
    if inner is not None:
        return inner
    columns = list(value.values())
    if value and all(isinstance(turn, dict) for turn in columns):
        return columns
    if value and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]  # a column for each key
    return [value]


def _messages_of_turn(turn: Any, notes: Notes) -> list[Message]:
    if isinstance(turn, (list, tuple)) and len(turn) == 2:
        role = ROLES.get(turn[0].strip().lower()) if isinstance(turn[0], str) else None
        if role:
            return [message(role, _text_of(turn[1]))]
        return [message("user", as_text(turn[0])), message("assistant", as_text(turn[1]))]
    if not isinstance(turn, dict):
        raise BadRow("a message is not an object")
    role = role_of(turn)
    if role:
        return [_message_of(turn, role, notes)]
    texts = turn_texts(turn)
    if not texts:
        raise BadRow("a message without a role")
    if "tool" in texts.values():
        raise UnfitRow(NO_TOOLS)
    _note_keys(turn, set(texts), notes)
    held = {
        role: [_text_of(turn[key]) for key in texts if texts[key] == role] for role in ("system", "user", "assistant")
    }
    if len(held["user"]) > 1 and all(isinstance(text, str) for text in held["user"]):  # a question and its context
        held["user"] = ["\n".join(held["user"])]
    return [message(role, text) for role, contents in held.items() for text in contents]


def role_of(turn: dict[str, Any]) -> str | None:
    """user, assistant, system or tool; None for an object without a role. Raises BadRow for an unknown role."""
    for key in ROLE_KEYS:
        name = turn.get(key)
        if isinstance(name, str):
            role = ROLES.get(name) or ROLES.get(name.strip().lower())
            if role:
                return role
            if key != "type":
                raise BadRow(f"unknown role {name[:20]!r}")
    return None


def turn_texts(turn: dict[str, Any]) -> dict[str, str]:
    """{key: role} of a turn object without a role, such as {human, assistant}, {q, a} or {user}; a context last."""
    roles = {key: _TURN_ROLES.get(key) or _TURN_ROLES.get(str(key).lower(), "") for key in turn}
    filled = [key for key, role in roles.items() if role and is_filled(turn[key])]
    return {key: roles[key] for key in sorted(filled, key=lambda key: str(key).lower() in KEYS["context"])}


def _message_of(turn: dict[str, Any], role: str, notes: Notes) -> Message:
    call = next((key for key in TOOL_KEYS if is_filled(turn.get(key))), None)
    if role == "tool" or call:
        raise UnfitRow(f"{NO_TOOLS} ({call or 'role ' + str(next(turn[k] for k in ROLE_KEYS if k in turn))})")
    key = content_key_of(turn)
    result = message(role, _text_of(turn[key]) if key else None)
    if len(turn) > 2:
        for thought in THOUGHT_KEYS:
            if is_filled(turn.get(thought)):
                notes.changes[f"without its `{thought}`: thoughts are not trained yet"] = None
        if role == "assistant" and any(is_zero(turn.get(mark)) for mark in TRAINED_KEYS):
            result["weight"] = 0
        _note_keys(turn, {key}, notes)
    return result


def plain_answer(value: Any) -> Any:
    """The text of an answer that is a number, a list of one text, or an object with a text; else the value itself."""
    if isinstance(value, dict) and (key := content_key_of(value)) and role_of(value) is None:
        value = value[key]
    if isinstance(value, (list, tuple)) and len(value) == 1 and not isinstance(value[0], (list, dict)):
        value = value[0]
    return as_text(value)


def content_key_of(turn: dict[str, Any]) -> str | None:
    """The key that holds the text of a message with a role: the first filled one, else the first."""
    present = [key for key in CONTENT_KEYS if key in turn]
    return next((key for key in present if is_filled(turn[key])), present[0] if present else None)


def _note_keys(turn: dict[str, Any], used: set[Any], notes: Notes) -> None:
    for key, value in turn.items():
        if key not in used and key not in _READ_KEYS and key not in HARMLESS and is_filled(value):
            notes.unused[f"messages.{key}"] = None


def _text_of(value: Any) -> Any:
    """The text of a message that may be given in OpenAI's parts: [{"type": "text", "text": "..."}]."""
    if isinstance(value, str):
        if value.startswith("<|") and (moss := _MOSS.match(value)):
            words = value[moss.end() :].rstrip()
            return (words[:-5] if words.endswith(("<eoh>", "<eom>")) else words).rstrip()
        if value.startswith("[{") and "text" in value[:40]:
            parts = parsed(value)
            if isinstance(parts, list) and all(isinstance(p, dict) and p.get("type") in TEXT_PARTS for p in parts):
                return _text_of(parts)
        return value
    parts = [value] if isinstance(value, dict) else value
    if not isinstance(parts, list):
        return as_text(value)
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if all(isinstance(text, str) for text in texts):
        return "".join(map(str, texts))
    raise UnfitRow("a message with parts that are not text")


def history_of(value: Any, notes: Notes) -> list[Message]:
    """Earlier turns: [[question, answer], ...], or messages, as a list or as text in JSON or Python notation."""
    if not is_filled(value):
        return []
    if isinstance(value, str):
        value = marked_turns(value) or parse_list(value, "history")
    if not isinstance(value, (list, tuple)):
        raise BadRow("history is not a list")
    pairs = all(isinstance(turn, dict) or (isinstance(turn, (list, tuple)) and len(turn) == 2) for turn in value)
    strings = len(value) % 2 == 0 and all(isinstance(turn, str) for turn in value)
    if not (pairs or strings):
        raise BadRow("history is not a list of [question, answer] pairs")
    return [
        {**turn, "content": sound_text(turn["content"], "history")} for turn in messages_of(value, notes, "history")
    ]


# ---- the rules of turns ----------------------------------------------------------------------------------------------
def apply_turn_rules(messages: list[Message], notes: Notes, cut: bool = True) -> list[Message]:
    """`messages` with system first, then user and assistant in turn: layouts.TURN_RULES, one after the other.

    `cut`: the chat ends before its first empty message; without it an empty message is an error. Raises BadRow or
    UnfitRow with the reason.
    """
    if not _in_turn(messages):
        messages = _put_in_turn(messages, notes, cut)
    for turn in messages:
        sound_text(turn["content"], turn["role"] + " message")
    return messages


def _in_turn(messages: list[Message]) -> bool:
    """True for a chat that needs no change: an optional system message, then user and assistant, none empty."""
    start = 1 if messages and messages[0]["role"] == "system" else 0
    roles = itertools.cycle(("user", "assistant"))
    return len(messages) > start and all(
        turn["role"] == role for turn, role in zip(messages[start:], roles, strict=False)
    ) and not any(is_blank(turn["content"]) for turn in messages)  # fmt: skip


def _put_in_turn(messages: list[Message], notes: Notes, cut: bool) -> list[Message]:
    runs: list[list[Message]] = []  # of one role each
    for new in messages:
        role, before = new["role"], runs[-1][0]["role"] if runs else ""
        if role == "system" and before not in ("", "system"):
            raise UnfitRow("a system message after the start")
        if role == "tool":
            raise UnfitRow(NO_TOOLS)
        if role == "system" and is_blank(new["content"]):
            continue  # many files carry an empty system message everywhere
        if role == "assistant" and before in ("", "system"):
            notes.changes[OPENING] = None
        elif role == before:
            runs[-1].append(new)
        else:
            runs.append([new])
    kept = [_joined(run, notes) if len(run) > 1 else run[0] for run in runs]
    if not any(turn["role"] == "user" for turn in kept):
        raise UnfitRow("only the assistant speaks") if OPENING in notes.changes else BadRow("no messages")
    empty = next((i for i, turn in enumerate(kept) if is_blank(turn["content"])), None)
    if empty is not None and cut:
        before_it = whole_turns(kept[:empty])
        if not before_it and kept[empty]["role"] == "assistant":
            raise UnfitRow("an empty answer")
        if before_it:
            notes.changes[CUT] = None
            kept = before_it
    return kept


def _joined(run: list[Message], notes: Notes) -> Message:
    """Messages of one role as one; it has weight 0 if any of them has."""
    role = run[0]["role"]
    filled = [turn["content"] for turn in run if not is_blank(turn["content"])]
    if len(filled) > 1:
        notes.changes[JOINED] = None
        filled = ["\n".join(sound_text(text, role + " message") for text in filled)]
    untrained = {"weight": 0} if any(turn.get("weight") == 0 for turn in run) else {}
    return {**message(role, filled[0] if filled else run[0]["content"]), **untrained}
