"""The parts of a generated answer: thought, content and tool calls, whole or while it streams.

    <think>\\n{reasoning}\\n</think>\\n\\n{content}\\n<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>

A thought is at the beginning of an answer; without its end it is the whole answer. A tool call that has no end, is no
JSON object or has no name is part of the content, with its markers. Line ends around the thought, one line end before a
call, and whitespace between calls and after the last one belong to the format, not to the content.
Source of the format: the chat template of Qwen/Qwen3-0.6B. Read next: chatml.py (the same format, written).
"""

import json
import re
from typing import Any, Literal, NamedTuple

from model.chat_template import Message
from model.chatml import CALL_END, CALL_START, THINK_END, THINK_START

MAX_JSON_DEPTH = 32  # of the arguments of a call
_MARKERS = (THINK_START, THINK_END, CALL_START, CALL_END)
_SPLIT = re.compile("(" + "|".join(_MARKERS) + ")")


class ToolCall(NamedTuple):
    """A call of the tool `name`; `arguments`: by parameter."""

    name: str
    arguments: dict[str, Any]


class AnswerParts(NamedTuple):
    """`reasoning` is None without a thought and "" for an empty one."""

    reasoning: str | None
    content: str
    tool_calls: list[ToolCall]


class AnswerDelta(NamedTuple):
    """The next part of an answer: `text` of a thought (possibly "") or of the content, or a whole tool call."""

    kind: Literal["reasoning", "content", "tool_call"]
    text: str = ""
    tool_call: ToolCall | None = None


def parse_answer(text: str) -> AnswerParts:
    """The parts of an answer. Never raises; every text is an answer."""
    stream = AnswerStream()
    deltas = stream.push(text) + stream.finish()
    thoughts = [delta.text for delta in deltas if delta.kind == "reasoning"]
    content = "".join(delta.text for delta in deltas if delta.kind == "content")
    calls = [delta.tool_call for delta in deltas if delta.tool_call]
    return AnswerParts("".join(thoughts) if thoughts else None, content, calls)


def answer_message(text: str) -> Message:
    """The assistant message of an answer, with "reasoning_content" and "tool_calls" where it has them."""
    reasoning, content, calls = parse_answer(text)
    message: Message = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [{"type": "function", "function": call._asdict()} for call in calls]
    return message


def parse_json_object(text: str) -> dict[str, Any] | None:
    """The JSON object of a text. None for anything else and for one that JSON text in UTF-8 cannot hold again.

    These are NaN, infinite and out-of-range numbers, lone surrogates, and more than MAX_JSON_DEPTH levels.
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for each in level for child in _children(each)]
    return value if isinstance(value, dict) and not level else None


def _children(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _parse_call(body: str) -> ToolCall | None:
    """The call between its markers. Its arguments may be JSON text in place of an object, or missing."""
    call = parse_json_object(body) or {}
    name, arguments = call.get("name"), call.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_json_object(arguments)
    return ToolCall(name, arguments) if isinstance(name, str) and name.strip() and isinstance(arguments, dict) else None


class AnswerStream:
    """Splits an answer into its parts while it is generated. However it is cut, the parts are those of `parse_answer`.

    Text is held back while it may belong to a marker, to a call or to the whitespace of the format.
    """

    def __init__(self) -> None:
        self._state: Literal["start", "reasoning", "content", "call"] = "start"  # start: no content so far
        self._has_thought = self._has_call = False  # before the current place
        self._has_text = False  # of the thought
        self._tail = ""  # the beginning of a marker
        self._held: list[str] = []  # whitespace, and after it the beginning of a call
        self._call_start = 0  # index in _held of the JSON text of the call
        self._readers = {
            "start": self._read_start,
            "reasoning": self._read_reasoning,
            "content": self._read_content,
            "call": self._read_call,
        }

    def push(self, piece: str) -> list[AnswerDelta]:
        """Add generated text; returns the parts that no later text can change, possibly []."""
        text = self._tail + piece
        if "<" not in text:
            self._tail = ""
            return self._readers[self._state](text) if text else []
        at = text.rfind("<")
        end = at if any(marker.startswith(text[at:]) for marker in _MARKERS if marker != text[at:]) else len(text)
        self._tail = text[end:]
        return self._read(text[:end])

    def finish(self) -> list[AnswerDelta]:
        """The parts that were held back, after the last piece."""
        deltas, self._tail = self._read(self._tail), ""
        is_format = self._state == "reasoning" or (self._state == "start" and self._has_call)
        return deltas if is_format else deltas + self._release("content")

    def _read(self, text: str) -> list[AnswerDelta]:
        return [delta for part in _SPLIT.split(text) if part for delta in self._readers[self._state](part)]

    def _release(self, kind: Literal["reasoning", "content"], text: str = "") -> list[AnswerDelta]:
        """What is held back, and `text` after it."""
        text, self._held = "".join([*self._held, text]), []
        return [AnswerDelta(kind, text)] if text else []

    def _read_start(self, part: str) -> list[AnswerDelta]:
        """Before the content, after the thought, after a call."""
        if part == THINK_START and not self._has_thought and not self._has_call:
            self._state, self._has_thought, self._held = "reasoning", True, []
            return [AnswerDelta("reasoning")]
        if self._has_thought and not self._has_call and not self._held:
            part = part.lstrip("\n")
        if part and part.strip():
            self._state = "content" if part != CALL_START else self._state
            return self._read_content(part)
        self._held += [part] if part else []
        return []

    def _read_reasoning(self, part: str) -> list[AnswerDelta]:
        if part == THINK_END:
            self._state, self._held = "start", []
            return []
        text = part.rstrip("\n") if self._has_text else part.strip("\n")
        self._has_text = self._has_text or bool(text)
        deltas = self._release("reasoning", text) if text else []
        self._held += [part[len(part.rstrip("\n")) :]] if self._has_text else []
        return deltas

    def _read_content(self, part: str) -> list[AnswerDelta]:
        if part == CALL_START:
            self._state, self._call_start = "call", len(self._held) + 1
            self._held.append(part)
            return []
        text = part.removesuffix("\n")
        deltas = self._release("content", text)
        self._held += [part[len(text) :]]
        return deltas

    def _read_call(self, part: str) -> list[AnswerDelta]:
        self._held.append(part)
        if part != CALL_END:
            return []
        call = _parse_call("".join(self._held[self._call_start : -1]))
        self._state = "start" if call else "content"
        if not call:
            return self._release("content")
        self._has_call, self._held = True, []
        return [AnswerDelta("tool_call", tool_call=call)]
