"""State of a conversation with one model or with two side by side, independent of the user interface.

    start_turn -> one streaming reply per side      advance -> generates the next piece of every streaming reply
    stop | answer_again (also an edited question)

A streaming reply can be advanced from any thread, so a page that is redrawn between two pieces continues the same
reply. The history of a side contains its own replies; for turns before its model joined, those of the first side.
Called by page.py. Read next: ../evaluation/tool_loop.py (how a reply is generated), history.py (saved conversations).
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from common.errors import require_nonempty_text
from evaluation.chat_model import ChatModel
from evaluation.tool_loop import NO_TOOLS, Reply, ReplyPart, ToolOptions, stream_reply
from model.chat_template import Message
from model.sampling import SamplingParams


@dataclass(eq=False)
class ChatReply:
    """One side's reply. `stop_reason`: "" while it streams, then that of `Reply`, stopped (by the user) or error."""

    model_name: str
    parts: list[ReplyPart] = field(default_factory=list)  # thoughts, answers, calls and results so far
    tokens: int = 0  # generated so far
    seconds: float = 0.0  # of prefill, decode and tools
    stop_reason: str = ""
    error: str = ""  # message, where stop_reason is "error"
    is_truncated: bool = False  # old turns did not fit into the model's context
    reply: Reply = field(default_factory=Reply)
    next_parts: Iterator[ReplyPart] = iter(())  # of a streaming reply

    @property
    def text(self) -> str:
        """The answer so far, without thoughts; "" after a call until the next answer begins."""
        return self.parts[-1].text if self.parts and self.parts[-1].kind == "content" else ""

    @property
    def tokens_per_second(self) -> float:
        """0 before the first token."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def start(self, chat_model: ChatModel, messages: list[Message], settings: SamplingParams) -> None:
        """Begin to stream the reply to the last message. A question that alone is too long ends it with an error."""
        started, options = time.perf_counter(), self.reply.options
        try:
            settings = replace(settings, stop=chat_model.stop_strings)
            self.next_parts = stream_reply(chat_model, messages, settings, self.reply)
            if chat_model.is_chat_model:
                whole = chat_model.tokenizer.render(options.add_tools(messages), True, options.enable_thinking)[0]
                self.is_truncated = self.reply.prompt_tokens < len(whole)
        except ValueError as error:
            self.end("error", str(error))
        self.seconds += time.perf_counter() - started

    def advance(self) -> None:
        """Generate the next part."""
        started = time.perf_counter()
        try:
            self._add(next(self.next_parts))
        except StopIteration:
            self.end(self.reply.finish_reason)
        except RuntimeError as error:  # most likely out of memory: the page stays usable
            self.end("error", (str(error).splitlines() or [type(error).__name__])[0])
        self.tokens = self.reply.num_tokens
        self.seconds += time.perf_counter() - started

    def _add(self, part: ReplyPart) -> None:
        last = self.parts[-1] if self.parts else None
        if last and last.kind == part.kind and part.kind in ("reasoning", "content"):
            self.parts[-1] = ReplyPart(part.kind, last.text + part.text)
        elif part.text:
            self.parts.append(part)

    def end(self, stop_reason: str, error: str = "") -> None:
        """End the reply and free its KV cache; the text stays."""
        self.reply.stop()
        self.stop_reason, self.error, self.next_parts = stop_reason, error, iter(())


@dataclass
class ChatTurn:
    question: str
    replies: list[ChatReply] = field(default_factory=list)  # one per side
    attempt: int = 0  # incremented by regenerate and edit


class Conversation:
    """The turns so far, and the streaming replies of the last one. `saved_…`: of its file (history.py)."""

    def __init__(self) -> None:
        self.turns: list[ChatTurn] = []
        self.saved_id = ""
        self.saved_version: tuple[int, int] | None = (
            None  # of the file that this conversation was read from or written to
        )
        # After a browser reconnects, two threads may draw the page for a moment.
        self._lock = threading.RLock()

    @property
    def streaming(self) -> list[ChatReply]:
        """The replies of the last turn that have not ended."""
        return [reply for turn in self.turns[-1:] for reply in turn.replies if not reply.stop_reason]

    def start_turn(
        self,
        question: str,
        chat_models: list[ChatModel],
        settings: SamplingParams,
        system: str = "",
        attempt: int = 0,
        options: ToolOptions = NO_TOOLS,
    ) -> None:
        """Stop streaming replies and begin a turn.

        Raises UserError for an empty question, and for tools if the chat format of a model has none.
        """
        self.stop()
        for chat_model in chat_models:
            options.check(chat_model)
        turn = ChatTurn(require_nonempty_text(question, "the question"), attempt=attempt)
        if settings.seed is not None:  # the same seed would generate the same reply again
            settings = replace(settings, seed=settings.seed + attempt)
        for side, chat_model in enumerate(chat_models):
            reply = ChatReply(chat_model.name, reply=Reply(options, chat_model.has_answer_parts))
            history = self._history(side, system, chat_model.has_answer_parts)
            reply.start(chat_model, [*history, user_message(turn.question)], settings)
            turn.replies.append(reply)
        self.turns.append(turn)

    def _history(self, side: int, system: str, has_parts: bool) -> list[Message]:
        """The turns so far; without `has_parts` only questions and answers."""
        messages: list[Message] = []
        if system.strip():
            messages.append({"role": "system", "content": require_nonempty_text(system, "the system prompt")})
        for turn in self.turns:
            reply = turn.replies[side] if side < len(turn.replies) else turn.replies[0]
            answers = reply.reply.messages
            if not has_parts and answers:
                answers = [{"role": "assistant", "content": reply.reply.text}] if reply.reply.text else []
            messages += [user_message(turn.question), *answers] if answers else []
        return messages

    def advance(self) -> bool:
        """Generate the next piece of every streaming reply; False when all have ended."""
        with self._lock:
            for reply in self.streaming:
                reply.advance()
            return bool(self.streaming)

    def stop(self) -> None:
        """End the streaming replies and keep their text."""
        with self._lock:
            for reply in self.streaming:
                reply.end("stopped")

    def answer_again(
        self,
        chat_models: list[ChatModel],
        settings: SamplingParams,
        system: str = "",
        question: str | None = None,
        options: ToolOptions = NO_TOOLS,
    ) -> None:
        """Answer the last question again, or `question` instead. An empty one raises UserError; the turns stay."""
        if not self.turns:
            return
        self.stop()
        question = require_nonempty_text(self.turns[-1].question if question is None else question, "the question")
        last = self.turns.pop()
        self.start_turn(question, chat_models, settings, system, last.attempt + 1, options)


def user_message(text: str) -> Message:
    return {"role": "user", "content": text}
