"""Schema of a chat request: messages, tools, tool calls and their results, as in OpenAI's API.

    "tools": [{"type": "function", "function": {"name": "clock", "description": …, "parameters": {JSON schema}}}]
    "tool_choice": "none" | "auto" | "required" | {"type": "function", "function": {"name": "clock"}}
    {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": {"name", "arguments"}}]}
    {"role": "tool", "tool_call_id": "call_1", "content": "12:30"}

`arguments` is JSON text; an object is accepted too. Thoughts are `reasoning_content` of an assistant message.
`enable_thinking`, also in `chat_template_kwargs`, is the field of vLLM and SGLang. OpenAI's older `functions` and
`function_call` are ignored. Read next: messages.py (from these fields to the messages that are rendered).
"""

import contextlib
import itertools
import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from model.answer_parts import MAX_JSON_DEPTH, parse_json_object
from model.chatml import CALL_START
from serving.schemas import GenerationRequest, LenientModel, NumLogprobs, TokenLimit

MAX_MESSAGES = 4096  # of a chat, and parts of a message
MAX_TOOLS = 128  # of a request, and calls of a message; OpenAI's limit of tools
MAX_VALUES = 20_000  # in the tools of a request, and in the arguments of a call
OBJECT_RULE = f"a JSON object of at most {MAX_JSON_DEPTH} levels, with finite numbers and valid Unicode"
CALL_BEGINNING = f'{CALL_START}\n{{"name": "'


def _check_size(value: Any) -> Any:
    """Reject a value of more than MAX_VALUES values before it is copied. Takes constant time for a large one."""
    level, count = [value], 1
    while level and count <= MAX_VALUES:
        child = level.pop()
        children = child.values() if isinstance(child, dict) else child if isinstance(child, list) else ()
        count += len(children)
        level += itertools.islice(children, MAX_VALUES)
    if count > MAX_VALUES:
        raise PydanticCustomError("size", "must have at most {most} values", {"most": MAX_VALUES})
    return value


def _check_object(value: Any) -> dict[str, Any]:
    """The object, given itself or as JSON text; "" is the text of an empty one."""
    parsed = None
    with contextlib.suppress(json.JSONDecodeError, RecursionError):
        value = json.loads(value or "{}") if isinstance(value, str) else value
        parsed = parse_json_object(json.dumps(_check_size(value), ensure_ascii=False))
    if parsed is None:
        raise PydanticCustomError("json_object", "must be {rule}", {"rule": OBJECT_RULE})
    return parsed


def _check_parameters(value: dict[str, Any]) -> dict[str, Any]:
    if value.get("type", "object") != "object":
        raise PydanticCustomError("parameters", 'the type of the parameters must be "object"')
    return _check_object(value)


def _check_names(tools: "list[FunctionTool]") -> "list[FunctionTool]":
    names = [tool.function.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise PydanticCustomError("tool_names", "two tools are called {name}", {"name": name})
    return tools


FunctionName = Annotated[str, Field(min_length=1, max_length=64, pattern="^[a-zA-Z0-9_-]+$")]
Arguments = Annotated[
    dict[str, Any], BeforeValidator(_check_object), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})
]
Parameters = Annotated[
    dict[str, Any],
    AfterValidator(_check_parameters),
    Field(json_schema_extra={"properties": {"type": {"const": "object"}}}),
]


class FunctionDefinition(LenientModel):
    name: FunctionName
    description: str | None = None
    parameters: Parameters | None = Field(None, description="JSON schema of the arguments")


class FunctionTool(LenientModel):
    type: Literal["function"]
    function: FunctionDefinition

    def as_message_tool(self) -> dict[str, Any]:
        """The tool as it is rendered: without fields other than name, description and parameters."""
        written = {"name": self.function.name}
        for name in ("description", "parameters"):
            if (value := getattr(self.function, name)) is not None:
                written[name] = value
        return {"type": "function", "function": written}


class NamedFunction(LenientModel):
    name: FunctionName


class NamedToolChoice(LenientModel):
    type: Literal["function"]
    function: NamedFunction


class CalledFunction(LenientModel):
    name: Annotated[str, Field(min_length=1)]
    arguments: Arguments


class MessageToolCall(LenientModel):
    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(LenientModel):
    type: Literal["text"]
    text: str


class ChatMessage(LenientModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    reasoning_content: str | None = Field(None, description="the thought before an assistant's answer")
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: str | None = Field(None, description="the call that a message of role tool answers")

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatTemplateKwargs(LenientModel):
    enable_thinking: bool | None = None


class ChatRequest(GenerationRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    tools: (
        Annotated[
            list[FunctionTool],
            Field(max_length=MAX_TOOLS, fail_fast=True),
            BeforeValidator(_check_size),
            AfterValidator(_check_names),
        ]
        | None
    ) = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = Field(
        None, description="required, or a named tool: the answer begins with a call (default: auto)"
    )
    parallel_tool_calls: bool | None = Field(None, description="false: the first call only (default: true)")
    enable_thinking: bool | None = Field(None, description="false: an answer without a thought (default: the model's)")
    chat_template_kwargs: ChatTemplateKwargs | None = Field(None, description="another place of enable_thinking")
    max_completion_tokens: TokenLimit = Field(None, description="longest answer (-1, null: the rest of the context)")
    max_tokens: TokenLimit = Field(None, description="older name of max_completion_tokens")
    add_generation_prompt: bool | None = Field(None, description="false: do not open an assistant turn (default: true)")
    continue_final_message: bool | None = Field(
        None, description="continue the last message, which must be the assistant's, instead of opening a new turn"
    )
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None

    @property
    def max_new_tokens(self) -> int | None:
        given = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return None if given == -1 else given

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs or self.top_logprobs else None

    @property
    def num_prompt_logprobs(self) -> None:
        """None: only /v1/completions returns log-probabilities of the prompt."""
        return None

    @property
    def thinking(self) -> bool | None:
        """Of the two places of enable_thinking, the field of the request first."""
        inner = self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None
        return inner if self.enable_thinking is None else self.enable_thinking

    @property
    def offered_tools(self) -> list[FunctionTool]:
        """The tools in the prompt: none with tool_choice "none"."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def has_parts(self) -> bool:
        """Whether the answer is split into a thought, its content and calls. Else all of its text is the content."""
        return bool(self.offered_tools) or self.thinking is not None

    @property
    def opening(self) -> str:
        """The text with which the answer must begin: that of a call where tool_choice asks for one, else ""."""
        if isinstance(self.tool_choice, NamedToolChoice):
            return f'{CALL_BEGINNING}{self.tool_choice.function.name}", "arguments":'
        return CALL_BEGINNING if self.tool_choice == "required" else ""
