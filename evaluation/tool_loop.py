"""The loop of a reply with tools and thoughts: call -> result -> answer. One loop for terminal, page and questions.

    question -> answer with calls -> run_tool for each call -> results in the prompt -> next answer -> …

A reply ends at an answer without calls, at one that is cut off, or at a call beyond `max_tool_calls`. Its messages have
the form of training data: a saved chat can be trained on.
Called by terminal_chat.py, qa.py and ../serving/conversation.py. Read next: tools.py, ../model/answer_parts.py.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from common.errors import UserError
from evaluation.chat_model import ChatModel
from evaluation.tools import Tool, run_tool
from model.answer_parts import AnswerDelta, AnswerStream, ToolCall, answer_message
from model.chat_template import Message
from model.chatml import THINK_START
from model.completion import Completion
from model.sampling import SamplingParams


@dataclass(frozen=True)
class ToolOptions:
    """`max_tool_calls`: calls that run in one reply. `enable_thinking`: see `ChatTokenizer.render`.

    `lookup_file`: the facts of the tool lookup, if it is chosen later.
    """

    tools: tuple[Tool, ...] = ()
    max_tool_calls: int = 4
    enable_thinking: bool | None = None
    lookup_file: str = ""

    def check(self, chat_model: ChatModel) -> None:
        """Raises UserError if there are tools and the model's chat format has none."""
        if not self.tools:
            return
        if not chat_model.is_chat_model:
            raise UserError(f"{chat_model.path} cannot call tools: it continues a text; use a model of a chat stage")
        try:
            chat_model.tokenizer.render(self.add_tools([{"role": "user", "content": "?"}]), True)
        except UserError as error:
            raise UserError(f"{chat_model.path} cannot call tools: {error}") from None

    def add_tools(self, messages: list[Message]) -> list[Message]:
        """The chat with the tools in its system message."""
        if not self.tools:
            return messages
        has_system = messages[:1] and messages[0]["role"] == "system"
        system, others = (messages[0], messages[1:]) if has_system else ({"role": "system", "content": ""}, messages)
        return [{**system, "tools": [tool.schema for tool in self.tools]}, *others]


NO_TOOLS = ToolOptions()


class ReplyPart(NamedTuple):
    """A part of a reply while it is generated: the next text of a thought or answer, a whole call, or its result."""

    kind: Literal["reasoning", "content", "tool_call", "tool_result"]
    text: str


@dataclass
class Reply:
    """A reply to the last message of a chat. `messages`: its answers and results so far.

    `has_parts`: whether thoughts and calls are read in its answers (ChatModel.has_answer_parts).
    `completions`: one per answer; the last one may still be running. `prompt_tokens`: of the first prompt.
    `opening`: the beginning of a thought at the end of the last prompt, which some imported templates write.
    """

    options: ToolOptions = NO_TOOLS
    has_parts: bool = True
    messages: list[Message] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    prompt_tokens: int = 0
    opening: str = ""
    num_calls: int = 0
    finish_reason: str = ""  # that of the last completion, or tool_calls: more of them than allowed; "" while it runs

    @property
    def text(self) -> str:
        """The content of the last answer; "" if the reply ends with a result."""
        return str(self.messages[-1]["content"]) if self.messages and self.messages[-1]["role"] == "assistant" else ""

    @property
    def num_tokens(self) -> int:
        return sum(len(completion.ids) for completion in self.completions)

    def next_prompt(self, chat_model: ChatModel, messages: list[Message], max_new_tokens: int) -> list[int]:
        """The prompt of the next answer to `messages`, which include the tools."""
        messages = [*messages, *self.messages]
        prompt = chat_model.prompt_ids(messages, max_new_tokens, self.options.enable_thinking)
        self.prompt_tokens = self.prompt_tokens or len(prompt)
        is_open = self.has_parts and chat_model.tokenizer.decode(prompt[-16:]).rstrip().endswith(THINK_START)
        self.opening = THINK_START if is_open else ""
        return prompt

    def add_answer(self, completion: Completion) -> list[str]:
        """Add a completed answer, run its calls, add their results and return them."""
        message: Message = {"role": "assistant", "content": completion.text}
        if self.has_parts:
            message = answer_message(self.opening + completion.text)
            if self.options.enable_thinking is False:
                message.setdefault("reasoning_content", "")  # the empty thought at the end of the prompt
        self.messages.append(message)
        calls = [ToolCall(**call["function"]) for call in message.get("tool_calls", ())] if self.options.tools else []
        if not calls or completion.finish_reason != "stop":
            self.finish_reason = completion.finish_reason or "stop"
            return []
        limit = self.options.max_tool_calls
        left = limit - self.num_calls
        if left <= 0:
            self.finish_reason = "tool_calls"
        self.num_calls += min(len(calls), left)
        results = [
            run_tool(call, self.options.tools) if i < left else f"error: the limit of {limit} calls is reached"
            for i, call in enumerate(calls)
        ]
        self.messages += [{"role": "tool", "content": result} for result in results]
        return results

    def stop(self) -> None:
        """End a reply that is not read any further; the text of the running answer stays."""
        num_answers = sum(message["role"] == "assistant" for message in self.messages)
        for completion in self.completions[num_answers:]:
            completion.finish_reason = "stopped"
            if completion.text:
                self.add_answer(completion)
        self.finish_reason = self.finish_reason or "stopped"


def stream_reply(
    chat_model: ChatModel, messages: list[Message], settings: SamplingParams, reply: Reply
) -> Iterator[ReplyPart]:
    """Return an iterator over the parts of the reply to `messages`, which fills `reply`; any thread may advance it.

    Raises ValueError, at the call, for a prompt that is empty or too long; results that do not fit end the reply.
    """
    messages = reply.options.add_tools(messages)

    def start_answer() -> Iterator[str]:
        prompt, completion = reply.next_prompt(chat_model, messages, settings.max_new_tokens), Completion()
        pieces = chat_model.stream(prompt, settings, completion)
        reply.completions.append(completion)
        return pieces

    return _stream_parts(reply, start_answer(), start_answer)


def complete_replies(
    chat_model: ChatModel, chats: list[list[Message]], settings: SamplingParams, options: ToolOptions
) -> list[Reply]:
    """The replies to many chats; their answers are generated in batches. A chat longer than the model ends there.

    Raises ValueError for a chat that is too long from the beginning.
    """
    replies = [Reply(options, chat_model.has_answer_parts) for _ in chats]
    running = list(zip(replies, map(options.add_tools, chats), strict=True))
    while running:
        prompts = [reply.next_prompt(chat_model, messages, settings.max_new_tokens) for reply, messages in running]
        for (reply, _), prompt in zip(running, prompts, strict=True):
            if reply.messages and len(prompt) > chat_model.model.config.max_seq_len:
                reply.finish_reason = "length"  # the results do not fit
        prompts = [prompt for (reply, _), prompt in zip(running, prompts, strict=True) if not reply.finish_reason]
        running = [(reply, messages) for reply, messages in running if not reply.finish_reason]
        for (reply, _), completion in zip(running, chat_model.generate(prompts, settings), strict=True):
            reply.completions.append(completion)
            reply.add_answer(completion)
        running = [(reply, messages) for reply, messages in running if not reply.finish_reason]
    return replies


def _stream_parts(
    reply: Reply, pieces: Iterator[str], start_answer: Callable[[], Iterator[str]]
) -> Iterator[ReplyPart]:
    """Read answers until the reply has ended. Each piece gives a part, possibly "": the reader may stop at any."""
    while True:
        stream = AnswerStream()
        stream.push(reply.opening)
        for piece in pieces:
            deltas = stream.push(piece) if reply.has_parts else [AnswerDelta("content", piece)]
            yield from map(_reply_part, deltas or [AnswerDelta("content")])
        yield from map(_reply_part, stream.finish())
        for result in reply.add_answer(reply.completions[-1]):
            yield ReplyPart("tool_result", result)
        if reply.finish_reason:
            return
        try:
            pieces = start_answer()
        except ValueError:  # the results do not fit
            reply.finish_reason = "length"
            return


def _reply_part(delta: AnswerDelta) -> ReplyPart:
    if not delta.tool_call:
        return ReplyPart(delta.kind, delta.text)
    return ReplyPart("tool_call", f"{delta.tool_call.name} {json.dumps(delta.tool_call.arguments, ensure_ascii=False)}")
