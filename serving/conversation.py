"""A conversation with one model or with two side by side, as it grows, whatever draws it on a screen.

    start_turn -> a reply per side begins        advance, advance, … -> each call draws the next piece of every reply
    stop | regenerate | edit_last_question | clear

A reply under way is an ordinary object that may be put down and taken up again, by another thread too: a page that is
drawn anew between two pieces goes on where it was. Each side reads its own answers; where it has none (the model joined
later), those of the first side. Nothing here knows of the web.
Called by page.py. Read next: ../model/generate.py (how an answer is drawn).
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
    """A loaded model and how it is addressed."""

    name: str
    model: Transformer
    tokenizer: ChatTokenizer
    is_chat_model: bool  # a pretrained model goes on with a text; the others answer

    def build_prompt(self, messages: list[Message], max_new_tokens: int) -> tuple[list[int], bool]:
        """What the model reads, and whether old turns had to be left out of it."""
        if not self.is_chat_model:
            return self.tokenizer.encode_document(messages[-1]["content"]), False
        all_ids, _ = self.tokenizer.render(messages, add_generation_prompt=True)
        ids = chat_prompt(self.model, self.tokenizer, messages, max_new_tokens)
        return ids, len(ids) < len(all_ids)


@dataclass
class ChatReply:
    """One side's answer. `stop_reason`: "" while it grows, then stop, length, stopped (by the reader) or error."""

    model_name: str
    text: str = ""
    tokens: int = 0
    seconds: float = 0.0  # spent computing, the prompt included
    stop_reason: str = ""
    error: str = ""  # of stop_reason "error"
    is_truncated: bool = False  # old turns did not fit into what the model reads

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second; 0 before the first."""
        return self.tokens / self.seconds if self.seconds else 0.0


class _StreamingReply:
    """A reply under way."""

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
        except RuntimeError as error:  # out of memory, most likely: it must not take the page with it
            reply.stop_reason, reply.error = "error", (str(error).splitlines() or [type(error).__name__])[0]
        reply.tokens = len(self.answer.ids)
        reply.seconds += time.perf_counter() - started


@dataclass
class ChatTurn:
    question: str
    replies: list[ChatReply] = field(default_factory=list)  # one a side
    attempt: int = 0  # how often this question has been answered before


class Conversation:
    """Turns, and the replies of the last one while they grow."""

    def __init__(self) -> None:
        self.turns: list[ChatTurn] = []
        self._streaming: list[_StreamingReply] = []
        # A page that lost its browser and got it back may for a moment be drawn by two threads.
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
        """Begin a turn. What still grew is stopped first. Raises UserError for an empty question."""
        self.stop()
        turn = ChatTurn(require_nonempty_text(question, "the question"), attempt=attempt)
        if settings.seed is not None:  # another attempt with the same seed would say the same
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
        """Draw the next piece of every reply under way; False when all have ended."""
        with self._lock:
            for streaming in self._streaming:
                streaming.advance()
            self._streaming = [streaming for streaming in self._streaming if not streaming.reply.stop_reason]
            return self.is_streaming

    def stop(self) -> None:
        """End what grows, and keep what it said."""
        with self._lock:
            for streaming in self._streaming:
                streaming.reply.stop_reason = "stopped"
            self._streaming = []

    def regenerate(self, page_models: list[PageModel], settings: SamplingParams, system: str = "") -> None:
        """Draw the answers to the last question anew."""
        if self.turns:
            self.edit_last_question(self.turns[-1].question, page_models, settings, system)

    def edit_last_question(
        self, question: str, page_models: list[PageModel], settings: SamplingParams, system: str = ""
    ) -> None:
        """Put another question in the place of the last one. Raises UserError, changing nothing, for an empty one."""
        self.stop()
        require_nonempty_text(question, "the question")
        last = self.turns.pop()
        self.start_turn(question, page_models, settings, system, attempt=last.attempt + 1)

    def clear(self) -> None:
        self.stop()
        self.turns = []
