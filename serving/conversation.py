"""State of a conversation with one model or with two side by side, independent of the user interface.

    start_turn -> one streaming reply per side      advance -> generates the next piece of every streaming reply
    stop | answer_again (also an edited question) | clear

A streaming reply can be advanced from any thread, so a page that is redrawn between two pieces continues the same
reply. The history of a side contains its own replies; for turns before its model joined, those of the first side.
Called by page.py. Read next: ../evaluation/chat_model.py (how a reply is generated).
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from common.errors import require_nonempty_text
from evaluation.chat_model import ChatModel
from model.chat_template import Message
from model.completion import Completion
from model.sampling import SamplingParams


@dataclass(eq=False)
class ChatReply:
    """One side's reply. `stop_reason`: "" while it streams, then stop, length, stopped (by the user) or error."""

    model_name: str
    text: str = ""
    seconds: float = 0.0  # of prefill and decode
    stop_reason: str = ""
    error: str = ""  # message, where stop_reason is "error"
    is_truncated: bool = False  # old turns did not fit into the model's context
    completion: Completion = field(default_factory=Completion)
    pieces: Iterator[str] = iter(())  # the next pieces of a streaming reply

    @property
    def tokens(self) -> int:
        return len(self.completion.ids)

    @property
    def tokens_per_second(self) -> float:
        """0 before the first token."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def start(self, chat_model: ChatModel, messages: list[Message], settings: SamplingParams) -> None:
        """Begin to stream the reply to the last message. A question that alone is too long ends it with an error."""
        started, tokenizer = time.perf_counter(), chat_model.tokenizer
        try:
            ids = chat_model.prompt_ids(messages, settings.max_new_tokens)
            if chat_model.is_chat_model:
                self.is_truncated = len(ids) < len(tokenizer.render(messages, add_generation_prompt=True)[0])
            settings = replace(settings, stop=chat_model.stop_strings)
            self.pieces = chat_model.stream(ids, settings, self.completion)
        except ValueError as error:
            self.end("error", str(error))
        self.seconds += time.perf_counter() - started

    def advance(self) -> None:
        """Generate the next piece."""
        started = time.perf_counter()
        try:
            self.text += next(self.pieces)
        except StopIteration:
            self.end(self.completion.finish_reason)
        except RuntimeError as error:  # most likely out of memory: the page stays usable
            self.end("error", (str(error).splitlines() or [type(error).__name__])[0])
        self.seconds += time.perf_counter() - started

    def end(self, stop_reason: str, error: str = "") -> None:
        """End the reply and free its KV cache; the text stays."""
        self.stop_reason, self.error, self.pieces = stop_reason, error, iter(())


@dataclass
class ChatTurn:
    question: str
    replies: list[ChatReply] = field(default_factory=list)  # one per side
    attempt: int = 0  # incremented by regenerate and edit


class Conversation:
    """The turns so far, and the streaming replies of the last one."""

    def __init__(self) -> None:
        self.turns: list[ChatTurn] = []
        # After a browser reconnects, two threads may draw the page for a moment.
        self._lock = threading.RLock()

    @property
    def streaming(self) -> list[ChatReply]:
        """The replies of the last turn that have not ended."""
        return [reply for turn in self.turns[-1:] for reply in turn.replies if not reply.stop_reason]

    def start_turn(
        self, question: str, chat_models: list[ChatModel], settings: SamplingParams, system: str = "", attempt: int = 0
    ) -> None:
        """Stop streaming replies and begin a turn. Raises UserError if the question is empty."""
        self.stop()
        turn = ChatTurn(require_nonempty_text(question, "the question"), attempt=attempt)
        if settings.seed is not None:  # the same seed would generate the same reply again
            settings = replace(settings, seed=settings.seed + attempt)
        for side, chat_model in enumerate(chat_models):
            reply = ChatReply(chat_model.name)
            reply.start(chat_model, [*self._history(side, system), user_message(turn.question)], settings)
            turn.replies.append(reply)
        self.turns.append(turn)

    def _history(self, side: int, system: str) -> list[Message]:
        messages: list[Message] = []
        if system.strip():
            messages.append({"role": "system", "content": require_nonempty_text(system, "the system prompt")})
        for turn in self.turns:
            reply = turn.replies[side] if side < len(turn.replies) else turn.replies[0]
            if reply.text:
                messages += [user_message(turn.question), {"role": "assistant", "content": reply.text}]
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
        self, chat_models: list[ChatModel], settings: SamplingParams, system: str = "", question: str | None = None
    ) -> None:
        """Answer the last question again, or `question` instead. An empty one raises UserError; the turns stay."""
        if not self.turns:
            return
        self.stop()
        question = require_nonempty_text(self.turns[-1].question if question is None else question, "the question")
        last = self.turns.pop()
        self.start_turn(question, chat_models, settings, system, attempt=last.attempt + 1)

    def clear(self) -> None:
        self.stop()
        self.turns = []


def user_message(text: str) -> Message:
    return {"role": "user", "content": text}
