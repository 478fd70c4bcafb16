"""chatml with tools, calls, results and thoughts, as Qwen3's published chat template writes them.

    system      <|im_start|>system\\n{content}\\n\\n# Tools … <tools>\\n{a tool as JSON}\\n</tools> …<|im_end|>\\n
    assistant   <|im_start|>assistant\\n<think>\\n{thought}\\n</think>\\n\\n{content}\\n
                <tool_call>\\n{"name": "clock", "arguments": {}}\\n</tool_call><|im_end|>\\n
    tool        <|im_start|>user\\n<tool_response>\\n{result}\\n</tool_response><|im_end|>\\n

Consecutive results share a user turn, each in its own markers.

A turn begins at a user message. Answers of earlier turns are written without their thoughts, so each turn with thoughts
is a training sample of its own (`sample_ends`). Unlike Qwen3's template, a message without `reasoning_content` gets no
empty thought, a call keeps the empty thought that it was generated after, and names of tools are JSON strings.
Source: chat_template in tokenizer_config.json of Qwen/Qwen3-0.6B.
Read next: chat_template.py (the format).
"""

import json
from typing import Any

THINK_START, THINK_END = "<think>", "</think>"
CALL_START, CALL_END = "<tool_call>", "</tool_call>"
RESULT_START, RESULT_END = "<tool_response>", "</tool_response>"
CHAT_MARKERS = (THINK_START, THINK_END, CALL_START, CALL_END, RESULT_START, RESULT_END)
PART_KEYS = ("tools", "reasoning_content", "tool_calls")
TEXT_KEYS = ("content", *PART_KEYS)  # of a message
EMPTY_THOUGHT = f"{THINK_START}\n\n{THINK_END}\n\n"  # the generation prompt ends with it if thinking is off
# The model card's text: models that were trained on it know it, and parsers of servers expect the calls it asks for.
TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    f"{CALL_START}{CALL_END} XML tags:\n"
    f'{CALL_START}\n{{"name": <function-name>, "arguments": <args-json-object>}}\n{CALL_END}'
)


def has_parts(messages: list[dict[str, Any]]) -> bool:
    """Whether a chat has tools, calls, results or thoughts."""
    return any(
        message["role"] == "tool" or (len(message) > 2 and not message.keys().isdisjoint(PART_KEYS))
        for message in messages
    )


def message_texts(message: dict[str, Any]) -> list[str]:
    """All texts of a message: its content, its thought, its tools and its calls as JSON."""
    if len(message) == 2:
        return [message["content"]]
    values = (message.get(key) for key in TEXT_KEYS)
    return [value if isinstance(value, str) else _to_json(value) for value in values if value]


def plain_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chat with all parts written into the contents; a run of results is one user message."""
    last_question = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    plain: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "tool":
            result = f"{RESULT_START}\n{content}\n{RESULT_END}"
            if i and messages[i - 1]["role"] == "tool":
                plain[-1]["content"] += "\n" + result
            else:
                plain.append({"role": "user", "content": result})
            continue
        if role == "system":
            content = _with_tools(content, message.get("tools") or [])
        elif role == "assistant":
            if i > last_question and isinstance(thought := message.get("reasoning_content"), str):
                stripped, content = thought.strip("\n"), content.lstrip("\n")
                content = f"{THINK_START}\n{stripped}\n{THINK_END}\n\n{content}"
            content = _with_calls(content, message["content"], message.get("tool_calls") or [])
        plain.append({**message, "content": content})
    return plain


def answer_text(message: dict[str, Any]) -> str:
    """An answer with its thought and calls, as it is trained."""
    content: str = message["content"] if len(message) == 2 else plain_messages([message])[0]["content"]
    return content


def _with_tools(content: str, tools: list[dict[str, Any]]) -> str:
    if not tools:
        return content
    listed = "".join(f"\n{_to_json(tool)}" for tool in tools)
    return f"{content}\n\n{TOOLS_BEFORE}{listed}{TOOLS_AFTER}" if content else TOOLS_BEFORE + listed + TOOLS_AFTER


def _with_calls(text: str, content: str, calls: list[dict[str, Any]]) -> str:
    """`text` with the calls after it, each on a new line unless it is the first thing of an answer without content."""
    for i, call in enumerate(calls):
        function = call.get("function", call)
        arguments = function["arguments"]
        written = arguments if isinstance(arguments, str) else _to_json(arguments)
        line_end = "\n" if i or content else ""
        text += f'{line_end}{CALL_START}\n{{"name": {_to_json(function["name"])}, "arguments": {written}}}\n{CALL_END}'
    return text


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def sample_ends(messages: list[dict[str, Any]], trained: list[int]) -> list[int]:
    """The ends of the training samples of a chat; the last one is the whole chat. `trained`: indices of its answers.

    A sample ends after each earlier turn with a trained thought, which later samples leave out.
    """
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    with_thought = [i for i in trained if isinstance(messages[i].get("reasoning_content"), str)]
    starts = zip([0, *questions[1:]], questions[1:], strict=False)
    return [*(end for start, end in starts if any(start <= i < end for i in with_thought)), len(messages)]


def _quote(text: str) -> str:
    return json.dumps(text)  # a jinja string literal


CHATML_TEMPLATE = (
    "{%- set ns = namespace(last_question=-1, tools=none) %}"
    "{%- if tools %}{%- set ns.tools = tools %}"
    "{%- elif messages and messages[0].role == 'system' and messages[0].tools %}"
    "{%- set ns.tools = messages[0].tools %}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}{%- set ns.last_question = loop.index0 %}{%- endif %}"
    "{%- endfor %}"
    "{%- if ns.tools %}"
    "{{- '<|im_start|>system\\n' }}"
    "{%- if messages and messages[0].role == 'system' and messages[0].content %}"
    "{{- messages[0].content + '\\n\\n' }}{%- endif %}"
    f"{{{{- {_quote(TOOLS_BEFORE)} }}}}"
    "{%- for tool in ns.tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}"
    f"{{{{- {_quote(TOOLS_AFTER)} + '<|im_end|>\\n' }}}}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- set content = message.content if message.content is string else '' %}"
    "{%- if message.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    f"{{{{- '\\n{RESULT_START}\\n' + content + '\\n{RESULT_END}' }}}}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- elif message.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if message.reasoning_content is string and loop.index0 > ns.last_question %}"
    f"{{{{- '{THINK_START}\\n' + message.reasoning_content.strip('\\n') + '\\n{THINK_END}\\n\\n' }}}}"
    "{{- content.lstrip('\\n') }}"
    "{%- else %}{{- content }}{%- endif %}"
    "{%- if message.tool_calls %}{%- for tool_call in message.tool_calls %}"
    "{%- if content or not loop.first %}{{- '\\n' }}{%- endif %}"
    "{%- set call = tool_call.function if tool_call.function else tool_call %}"
    f"{{{{- '{CALL_START}\\n{{\"name\": ' }}}}{{{{- call.name | tojson }}}}{{{{- ', \"arguments\": ' }}}}"
    "{%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}"
    f"{{{{- '}}\\n{CALL_END}' }}}}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- elif not (ns.tools and loop.first and message.role == 'system') %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    f"{{{{- {_quote(EMPTY_THOUGHT)} }}}}{{%- endif %}}"
    "{%- endif %}"
)
