"""Parses tools, calls, results and thoughts of any supported layout into the fields of a message.

    parse_tools(value)           OpenAI's tools, bare functions, or either as JSON text  -> [{"type", "function"}, ...]
    parse_calls(value)           OpenAI's tool_calls, {"name", "arguments"}, or JSON text; arguments become an object
    read_markers(messages, …)    <think>, <tool_call>, <tool_response> and <tools> inside contents, as Hermes and Qwen
                                 write them: the same fields, and messages with the role tool

A thought is read at the start of an answer, calls at its end; a marker anywhere else stays text. Where a chat lists
tools, a call that is no JSON raises BadRow.
Read next: chats.py (messages), turn_rules.py, ../model/chatml.py (how they are rendered).
"""

import json
import re
from typing import Any

from corpus.language import is_missing, require_text
from corpus.serialized_chats import make_message, parse_literal
from corpus.stats import BadRow, DroppedRow
from model.chat_template import Message
from model.chatml import CALL_START

FROM_SYSTEM_TEXT = "with the tools in its system message as a list"
THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_RESULTS = re.compile(r"\s*(?:<tool_response>(?:(?!<tool_response>).)*</tool_response>\s*)+", re.DOTALL)
_RESULT = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)
_TOOLS = re.compile(r"<tools>\s*(?=[\[{])(.*?)\s*</tools>", re.DOTALL)
_HEADING = re.compile(r"(?:^|\n)#+ *Tools\s*\n")


def parse_tools(value: Any) -> list[dict[str, Any]]:
    """Parses a list of tools. Raises BadRow if they are not functions with names."""
    tools = _entries(value, "tools")
    return [_parse_tool(parse_literal(tool) if isinstance(tool, str) else tool) for tool in tools]


def _parse_tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise BadRow("a tool is not an object")
    function = tool.get("function", {key: value for key, value in tool.items() if key != "type"})
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise BadRow("a tool without a name")
    return {"type": "function", "function": json_object(function, "a tool")}


def with_tools(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    """The chat with these tools in its system message, unless that has its own; adds one if there is none."""
    has_system = bool(messages) and messages[0]["role"] == "system"
    system = messages[0] if has_system else make_message("system", "")
    return [{**system, "tools": system.get("tools") or tools}, *messages[has_system:]]


def parse_calls(value: Any) -> list[dict[str, Any]]:
    """Parses calls of tools. Raises BadRow for a call without a name, or arguments that are not a JSON object."""
    return [_parse_call(call) for call in _entries(value, "tool calls")]


def _parse_call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise BadRow("a tool call without a name")
    arguments: Any = next(
        (function[key] for key in ("arguments", "parameters") if not is_missing(function.get(key))), {}
    )
    if isinstance(arguments, str):
        arguments = parse_literal(arguments) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise BadRow("the arguments of a tool call are not a JSON object")
    name = require_text(function["name"], "the name of a tool call")
    return {"type": "function", "function": {"name": name, "arguments": json_object(arguments, "a tool call")}}


def _entries(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):
        value = parse_literal(value)
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, (list, tuple)) or not value:
        raise BadRow(f"{name} are not a JSON list")
    return list(value)


def json_object(value: Any, name: str) -> Any:
    """A copy of the value with JSON types only. Raises BadRow if JSON or a tokenizer cannot write it."""
    try:
        return json.loads(require_text(json.dumps(value, ensure_ascii=False, allow_nan=False), name))
    except (TypeError, ValueError, RecursionError):
        raise BadRow(f"{name} is not JSON") from None


def result_text(value: Any) -> str:
    """The content of a tool result: text, "" for null, JSON for any other value."""
    if isinstance(value, str):
        return value
    return "" if is_missing(value) else json.dumps(json_object(value, "a tool result"), ensure_ascii=False)


# ---- markers in contents ---------------------------------------------------------------------------------------------
def read_markers(messages: list[Message], changes: dict[str, None]) -> list[Message]:
    """The messages with the parts that markers enclose as fields. `changes`: notes of the row, which it adds to."""
    if not any(isinstance(message["content"], str) and "<t" in message["content"] for message in messages):
        return messages
    has_tools = any("tools" in message for message in messages)
    read: list[Message] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if not isinstance(content, str) or "<t" not in content:
            read.append(message)
        elif role == "system":
            read.append(system := _read_tools(message, changes))
            has_tools = has_tools or "tools" in system
        elif role == "assistant":
            read.append(_read_answer(message, has_tools))
        elif _RESULTS.fullmatch(content):
            read += [make_message("tool", result.strip("\n")) for result in _RESULT.findall(content)]
        else:
            read.append(message)
    return read


def _read_tools(message: Message, changes: dict[str, None]) -> Message:
    """Moves the tools out of a system message, and drops the instructions for calls around them."""
    content = message["content"]
    found = _TOOLS.search(content)
    if "tools" in message or not found:
        return message
    listed = parse_literal(found[1])
    tools = parse_tools(listed if listed is not None else found[1].splitlines())
    changes[FROM_SYSTEM_TEXT] = None
    before, after = content[: found.start()], content[found.end() :]
    if heading := _HEADING.search(before):
        before = before[: heading.start()]
    elif "<tools>" in before or CALL_START in after:  # the paragraph that introduces them
        before = before[: before.index("<tools>")] if "<tools>" in before else before
        before = before.rpartition("\n\n")[0]
    kept = [before.strip()] if CALL_START in after else [before.strip(), after.strip()]
    return {**message, "content": "\n\n".join(filter(None, kept)), "tools": tools}


def _read_answer(message: Message, has_tools: bool) -> Message:
    """Moves a thought at the start and calls at the end of an answer to their fields."""
    message, content = dict(message), message["content"]
    if "reasoning_content" not in message and (thought := THOUGHT.match(content)):
        message["reasoning_content"], content = thought[1].strip("\n"), content[thought.end() :]
    if "tool_calls" not in message and CALL_START in content:
        first = content.index(CALL_START)
        calls, rest = _CALL.findall(content, first), _CALL.sub("", content[first:])
        if not rest.strip() or has_tools:
            if rest.strip():
                raise DroppedRow("text after a tool call")
            try:
                message["tool_calls"] = [call for text in calls for call in parse_calls(text)]
                content = content[:first].rstrip()
            except BadRow:
                if has_tools:
                    raise
    return {**message, "content": content}
