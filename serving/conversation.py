"""State of a conversation with one model or with two side by side, independent of the user interface.

    start_turn -> one streaming reply per side      advance -> generates the next piece of every streaming reply
    stop | regenerate | edit_last_question | clear

A streaming reply can be advanced from any thread, so a page that is redrawn between two pieces continues the same
reply. The history of a side contains its own replies; for turns before its model joined, those of the first side.
Called by page.py. Read next: ../model/generate.py (how a reply is generated).
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from evaluation.qa_data import require_nonempty_text
from model.chat_template import Message
from model.completion import Completion
from model.generate import chat_prompt, stream
from model.sampling import SamplingParams
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer


@dataclass
class PageModel:
    """A loaded model with its tokenizer."""

    name: str
    model: Transformer
    tokenizer: ChatTokenizer
    is_chat_model: bool  # False: a pretrained model, which continues a text

    def build_prompt(self, messages: list[Message], max_new_tokens: int) -> tuple[list[int], bool]:
        """Return (ids, is_truncated): the prompt's token ids, and whether old turns were dropped to fit the context."""
        if not self.is_chat_model:
            return self.tokenizer.encode_document(messages[-1]["content"]), False
        all_ids, _ = self.tokenizer.render(messages, add_generation_prompt=True)
        ids = chat_prompt(self.model, self.tokenizer, messages, max_new_tokens)
        return ids, len(ids) < len(all_ids)


@dataclass
class ChatReply:
    """One side's reply. `stop_reason`: "" while it streams, then stop, length, stopped (by the user) or error."""

    model_name: str
    text: str = ""
    tokens: int = 0
    seconds: float = 0.0  # of prefill and decode
    stop_reason: str = ""
    error: str = ""  # message, where stop_reason is "error"
    is_truncated: bool = False  # old turns did not fit into the model's context

    @property
    def tokens_per_second(self) -> float:
        """0 before the first token."""
        return self.tokens / self.seconds if self.seconds else 0.0


class _StreamingReply:
    """A reply and the generator of its next pieces."""

    def __init__(
        self, reply: ChatReply, page_model: PageModel, messages: list[Message], settings: SamplingParams
    ) -> None:
        self.reply, self.answer = reply, Completion()
        self.pieces: Iterator[str] = iter(())
        started = time.perf_counter()
        try:
            ids, reply.is_truncated = page_model.build_prompt(messages, settings.max_new_tokens)
            settings = replace(settings, stop=page_model.tokenizer.stop_strings if page_model.is_chat_model else ())
            self.pieces = stream(page_model.model, ids, settings, page_model.tokenizer, self.answer)
        except ValueError as error:  # the question alone is too long for the model
            reply.stop_reason, reply.error = "error", str(error)
        reply.seconds += time.perf_counter() - started

    def advance(self) -> None:
        reply, started = self.reply, time.perf_counter()
        try:
            reply.text += next(self.pieces)
        except StopIteration:
            reply.stop_reason = self.answer.finish_reason
        except RuntimeError as error:  # most likely out of memory: the page stays usable
            reply.stop_reason, reply.error = "error", (str(error).splitlines() or [type(error).__name__])[0]
        reply.tokens = len(self.answer.ids)
        reply.seconds += time.perf_counter() - started


@dataclass
class ChatTurn:
    question: str
    replies: list[ChatReply] = field(default_factory=list)  # one per side
    attempt: int = 0  # incremented by regenerate and edit


class Conversation:
    """The turns so far, and the streaming replies of the last one."""

    def __init__(self) -> None:
        self.turns: list[ChatTurn] = []
        self._streaming: list[_StreamingReply] = []
        # After a browser reconnects, two threads may draw the page for a moment.
        self._lock = threading.RLock()

    @property
    def is_streaming(self) -> bool:
        return bool(self._streaming)

    def start_turn(
        self,
        question: str,
        page_models: list[PageModel],
        settings: SamplingParams,
        system: str = "",
        attempt: int = 0,
    ) -> None:
        """Stop streaming replies and begin a turn. Raises UserError if the question is empty."""
        self.stop()
        turn = ChatTurn(require_nonempty_text(question, "the question"), attempt=attempt)
        if settings.seed is not None:  # the same seed would generate the same reply again
            settings = replace(settings, seed=settings.seed + attempt)
        streaming = []
        for side, page_model in enumerate(page_models):
            reply = ChatReply(page_model.name)
            turn.replies.append(reply)
            messages = [*self._history(side, system), {"role": "user", "content": turn.question}]
            streaming.append(_StreamingReply(reply, page_model, messages, settings))
        self.turns.append(turn)
        self._streaming = [each for each in streaming if not each.reply.stop_reason]

    def _history(self, side: int, system: str) -> list[Message]:
        messages = (
            [{"role": "system", "content": require_nonempty_text(system, "the system prompt")}]
            if system.strip()
            else []
        )
        for turn in self.turns:
            reply = turn.replies[side] if side < len(turn.replies) else turn.replies[0]
            if reply.text:
                messages.append({"role": "user", "content": turn.question})
                messages.append({"role": "assistant", "content": reply.text})
        return messages

    def advance(self) -> bool:
        """Generate the next piece of every streaming reply; False when all have ended."""
        with self._lock:
            for streaming in self._streaming:
                streaming.advance()
            self._streaming = [streaming for streaming in self._streaming if not streaming.reply.stop_reason]
            return self.is_streaming

    def stop(self) -> None:
        """End the streaming replies and keep their text."""
        with self._lock:
            for streaming in self._streaming:
                streaming.reply.stop_reason = "stopped"
            self._streaming = []

    def regenerate(self, page_models: list[PageModel], settings: SamplingParams, system: str = "") -> None:
        """Answer the last question again."""
        if self.turns:
            self.edit_last_question(self.turns[-1].question, page_models, settings, system)

    def edit_last_question(
        self, question: str, page_models: list[PageModel], settings: SamplingParams, system: str = ""
    ) -> None:
        """Replace the last question and answer it. Raises UserError, with the turns unchanged, if it is empty."""
        self.stop()
        require_nonempty_text(question, "the question")
        last = self.turns.pop()
        self.start_turn(question, page_models, settings, system, attempt=last.attempt + 1)

    def clear(self) -> None:
        self.stop()
        self.turns = []
