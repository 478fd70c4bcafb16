"""From the text of a chat answer to OpenAI's deltas: thought, content and tool calls, whole or while it streams.

    {"reasoning_content": "…"}   {"content": "…"}
    {"tool_calls": [{"index": 0, "id": "call_…", "type": "function", "function": {"name": "clock", "arguments": ""}}]}
    {"tool_calls": [{"index": 0, "function": {"arguments": "{…}"}}]}

A call is sent when it is complete, so text that turns out to be no call is sent as content.
Called by responses.py. Read next: ../model/answer_parts.py (how the text is split).
"""

import json
import uuid
from typing import Any

from model.answer_parts import AnswerDelta, AnswerStream
from serving.chat_schemas import ChatRequest

Delta = dict[str, Any]


class DeltaReader:
    """Splits one answer into deltas. `opening`: text before the generated one that the answer begins with."""

    def __init__(self, body: ChatRequest) -> None:
        self.stream = AnswerStream(reads_calls=bool(body.offered_tools))
        self.opening, self.num_calls = body.opening, 0
        self.max_calls = 1 if body.parallel_tool_calls is False else None

    def push(self, text: str, is_last: bool) -> list[Delta]:
        """The deltas of new text. After the last one, `num_calls` is the number of calls of the answer."""
        parts = self.stream.push(self.opening + text)
        self.opening = ""
        if is_last:
            parts += self.stream.finish()
        return [delta for part in parts for delta in self._deltas(part)]

    def _deltas(self, part: AnswerDelta) -> list[Delta]:
        if part.kind == "content":
            return [{"content": part.text}]
        if part.kind == "reasoning":
            return [{"reasoning_content": part.text}]
        if part.tool_call is None or self.num_calls == self.max_calls:
            return []
        index = self.num_calls
        self.num_calls += 1
        begun = {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        arguments = json.dumps(part.tool_call.arguments, ensure_ascii=False)
        return [
            {"tool_calls": [{**begun, "function": {"name": part.tool_call.name, "arguments": ""}}]},
            {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]},
        ]


def join_deltas(deltas: list[Delta]) -> Delta:
    """The fields of the message that a client builds from all deltas: content (None if there are only calls), …"""
    calls: list[dict[str, Any]] = []
    for call in (call for delta in deltas for call in delta.get("tool_calls", [])):
        if "id" in call:
            calls.append({**call, "function": dict(call["function"])})
        else:
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    message: Delta = {"content": "".join(delta.get("content", "") for delta in deltas) or (None if calls else "")}
    if thoughts := [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta]:
        message["reasoning_content"] = "".join(thoughts)
    return {**message, "tool_calls": calls} if calls else message
