"""From the messages of a chat request to the messages that are rendered (model/chat_template.py).

    "developer" -> "system"; leading system messages -> one      tools -> the system message
    tool_calls -> name and arguments (an object)                  results -> in the order of the calls they answer

Every call must have one result, in a message of role tool directly after the assistant's; a wrong or missing
`tool_call_id` is one error 400 that names it. Called by models.py. Read next: chat_schemas.py (the fields).
"""

import json

from model.chat_template import Message
from serving.chat_schemas import ChatMessage, ChatRequest, NamedToolChoice
from serving.errors import ApiError

MAX_IDS_SHOWN = 5  # in an error message


def utf8_size(text: str) -> int:
    """Bytes in UTF-8; a lone surrogate counts as one."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which JSON can contain and UTF-8 cannot, by "?"."""
    return text.encode("utf-8", "replace").decode()


def message_size(message: Message, with_thought: bool) -> int:
    """UTF-8 bytes of a message's content, tools, calls and, if it is rendered, thought."""
    structures = [message[key] for key in ("tools", "tool_calls") if key in message]
    texts = [message["content"], *(json.dumps(structure, ensure_ascii=False) for structure in structures)]
    return sum(map(utf8_size, texts)) + (utf8_size(message.get("reasoning_content", "")) if with_thought else 0)


def rendered_messages(body: ChatRequest) -> list[Message]:
    """The messages of a request in the form that is rendered. Raises ApiError 400 for results without their calls."""
    check_tool_choice(body)
    ordered = results_in_order(body.messages)
    roles = ["system" if message.role == "developer" else message.role for message in ordered]
    written = [_message(role, message, body.thinking) for role, message in zip(roles, ordered, strict=True)]
    first = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
    if first > 1:
        joined = "\n\n".join(message["content"] for message in written[:first])
        written[:first] = [{"role": "system", "content": joined}]
    if body.offered_tools:
        if not first:
            written.insert(0, {"role": "system", "content": ""})
        tools = json.dumps([tool.as_message_tool() for tool in body.offered_tools], ensure_ascii=False)
        written[0]["tools"] = json.loads(replace_surrogates(tools))
    return written


def _message(role: str, message: ChatMessage, thinking: bool | None) -> Message:
    """With `thinking` off, an answer without a thought has the empty one that its prompt ended with."""
    written: Message = {"role": role, "content": replace_surrogates(message.text)}
    thought = "" if message.reasoning_content is None and thinking is False else message.reasoning_content
    if role == "assistant" and thought is not None:
        written["reasoning_content"] = replace_surrogates(thought)
    if role == "assistant" and message.tool_calls:
        functions = [call.function for call in message.tool_calls]
        written["tool_calls"] = [
            {"type": "function", "function": {"name": f.name, "arguments": f.arguments}} for f in functions
        ]
    return written


def check_tool_choice(body: ChatRequest) -> None:
    """Raises ApiError 400 for a tool_choice that the tools or other fields exclude."""
    choice, names = body.tool_choice, [tool.function.name for tool in body.offered_tools]
    if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
        problem = f"{choice.function.name} is no tool of this request"
    elif choice == "required" and not names:
        problem = "required needs at least one tool in tools"
    elif body.opening and (body.continue_final_message or body.add_generation_prompt is False):
        problem = "the answer would begin with a call: leave out continue_final_message and add_generation_prompt"
    else:
        return
    raise ApiError(400, f"tool_choice: {problem}", "tool_choice")


def results_in_order(messages: list[ChatMessage]) -> list[ChatMessage]:
    """The messages, with consecutive results in the order of the calls that they answer.

    Raises ApiError 400 for a result that answers no call of the message before, and for a call without a result.
    """
    results: dict[int, ChatMessage] = {}  # by the index at which they are returned
    waiting: dict[str, int] = {}  # the same index, by the id of a call without a result
    for i, message in enumerate(messages):
        if message.role == "tool":
            if message.tool_call_id not in waiting:
                raise _wrong_result(i, message.tool_call_id, list(waiting))
            results[waiting.pop(message.tool_call_id)] = message
            continue
        if waiting:
            raise _missing_result(i, next(iter(waiting)))
        calls = message.tool_calls or [] if message.role == "assistant" else []
        waiting = {call.id: index for index, call in enumerate(calls, i + 1)}
        if len(waiting) < len(calls):
            raise ApiError(400, f"messages.{i}.tool_calls: two calls have the same id", f"messages.{i}.tool_calls")
    if waiting:
        raise _missing_result(len(messages), next(iter(waiting)))
    return [results.get(i, message) for i, message in enumerate(messages)]


def _missing_result(index: int, call: str) -> ApiError:
    where, advice = f"messages.{index}", "a message of role tool with this tool_call_id must follow it"
    return ApiError(400, f"{where}: the call {_quoted(call)} has no result: {advice}", where)


def _wrong_result(index: int, given: str | None, waiting: list[str]) -> ApiError:
    """The error of a message of role tool that answers no call."""
    where = f"messages.{index}.tool_call_id"
    ids = ", ".join(_quoted(name) for name in waiting[:MAX_IDS_SHOWN])
    expected = f"the calls without a result are {ids}" if ids else "the message before has no call without a result"
    problem = "is missing" if given is None else f"{_quoted(given)} answers no call"
    return ApiError(400, f"{where}: {problem}; {expected}", where)


def _quoted(name: str) -> str:
    return repr(name[:80])
