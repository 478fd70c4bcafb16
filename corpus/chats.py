"""One shape for every chat: a row of whatever file -> [{"role", "content"}, ...].

    conversations / messages   lists of {"role", "content"} or of {"from", "value"} (ShareGPT: human, gpt, ...)
    instruction, input, output [, history, system]         Alpaca
    q, a [, history]  and  question/answer, prompt/response, ...   csv files of minimind v1 and their relatives

`history` may be a list, or text in JSON or Python notation. It is parsed, never evaluated: a data file cannot run code.
A sound chat is an optional system message, then user and assistant in turn. The last turn may lack its answer; who
wants whole turns calls `whole_turns`.

Read next: read.py (files -> rows), pack.py (chats -> tokens).
"""

import ast
import itertools
import json
import warnings
from typing import Any

from corpus.language import is_missing, sound_text
from corpus.report import BadRow

Message = dict[str, str]

LIST_KEYS = ("conversations", "messages", "conversation", "dialogue", "dialog")
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
PAIR_KEYS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("q", "a"),
    ("question", "answer"),
    ("prompt", "response"),
    ("query", "response"),
    ("prompt", "completion"),
    ("input", "target"),
)
ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
}
EXPECTED_CHAT = (
    "a chat row needs conversations or messages (lists of role/content or from/value), instruction/output, q/a, "
    "question/answer or prompt/response"
)


def is_chat(row: Any) -> bool:
    """True when the row has the keys of one of the chat formats (its content may still be bad)."""
    return isinstance(row, dict) and (any(key in row for key in LIST_KEYS) or _pair_keys(row) is not None)


def normalise_chat(row: Any) -> list[Message]:
    """The messages of a row, checked.

    Raises BadRow with the reason when it is no chat, or one that cannot teach: a wrong type, an empty message, an
    unknown role, roles that do not alternate, an assistant that speaks first.
    """
    if not isinstance(row, dict):
        raise BadRow("plain text, not a chat")
    turns: Any = next((row[key] for key in LIST_KEYS if key in row), None)
    pair = _pair_keys(row)
    if not is_missing(turns):
        messages = messages_from_list(turns)
    elif pair:
        messages = _from_pair(row, *pair)
    elif is_chat(row):
        raise BadRow("the list of messages is null")
    else:
        raise BadRow("none of the keys of a chat")
    system = row.get("system")
    if not is_blank(system) and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": sound_text(system, "system")})
    check_turns(messages)
    return messages


def whole_turns(messages: list[Message]) -> list[Message]:
    """The chat up to its last answer: a question that nobody answers at the end is left out. May be empty."""
    end = max((i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    return messages[:end]


def chat_text(messages: list[Message]) -> str:
    """The words of a chat without any marker: what language detection, duplicates and plain-text training look at."""
    return "\n".join(message["content"] for message in messages)


def _pair_keys(row: dict[str, Any]) -> tuple[str, str] | None:
    return next(((ask, answer) for ask, answer in PAIR_KEYS if ask in row and answer in row), None)


def is_blank(value: Any) -> bool:
    """True for null, NaN and text without a letter in it."""
    return is_missing(value) or (isinstance(value, str) and not value.strip())


def messages_from_list(turns: Any) -> list[Message]:
    """The messages of a list, or of text that spells one; each sound by itself. Raises BadRow with the reason."""
    if isinstance(turns, str):  # a csv or parquet cell
        turns = _parse(turns, "the list of messages")
    if not isinstance(turns, (list, tuple)):
        raise BadRow("the messages are not a list")
    if not turns:
        raise BadRow("no messages")
    messages = [message_of(turn) for turn in turns]
    if is_blank(messages[0]["content"]) and messages[0]["role"] == "system":
        del messages[0]  # many files carry an empty system message everywhere: it says nothing
    return [{"role": m["role"], "content": sound_text(m["content"], m["role"] + " message")} for m in messages]


def message_of(turn: Any) -> dict[str, Any]:
    """{"role", "content"} of one entry, whatever its keys are called; the content is not looked at yet."""
    if not isinstance(turn, dict):
        raise BadRow("a message is not an object")
    role = next((turn[key] for key in ROLE_KEYS if key in turn), None)
    content = next((turn[key] for key in CONTENT_KEYS if key in turn), None)
    if not isinstance(role, str):
        raise BadRow("a message without a role")
    if role.strip().lower() not in ROLES:
        raise BadRow(f"unknown role {role[:20]!r}")
    if isinstance(content, list):  # OpenAI's parts: [{"type": "text", "text": "..."}]
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise BadRow("a message with parts that are not text")
        content = "".join(part["text"] for part in content)
    return {"role": ROLES[role.strip().lower()], "content": content}


def _from_pair(row: dict[str, Any], ask: str, answer: str) -> list[Message]:
    question = sound_text(row[ask], ask)
    if not is_blank(row.get("input")):
        question += "\n" + sound_text(row["input"], "input")
    pairs = [*_history(row.get("history")), (question, sound_text(row[answer], answer))]
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _history(value: Any) -> list[tuple[str, str]]:
    """Earlier turns [[question, answer], ...] of a row, given as a list or as text in JSON or Python notation."""
    if is_blank(value):
        return []
    if isinstance(value, str):
        value = _parse(value, "history")
    if not isinstance(value, (list, tuple)):
        raise BadRow("history is not a list")
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        raise BadRow("history is not a list of [question, answer] pairs")
    return [(sound_text(ask, "history"), sound_text(answer, "history")) for ask, answer in value]


def _parse(text: str, field: str) -> Any:
    """The list that `text` spells in JSON or as a Python literal. No name is looked up and nothing is called."""
    for parse in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():  # '\d' inside a Python literal is somebody's text, not our mistake
                warnings.simplefilter("ignore")
                return parse(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    raise BadRow(f"{field} is neither JSON nor a Python list")


def check_turns(messages: list[Message]) -> None:
    """Raises BadRow unless user and assistant speak in turn, after at most one system message."""
    roles = [message["role"] for message in messages]
    if roles and roles[0] == "system":
        roles = roles[1:]
    if not roles:
        raise BadRow("no messages")
    if roles[0] == "assistant":
        raise BadRow("the assistant speaks first")
    if "system" in roles:
        raise BadRow("a system message after the start")
    if any(role == before for before, role in itertools.pairwise(roles)):
        raise BadRow("two messages of one role in a row")
