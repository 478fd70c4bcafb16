"""A conversation with one model or with two side by side, as it grows, whatever draws it on a screen.

    ask -> a reply per side begins        advance, advance, … -> each call draws the next piece of every reply
    stop | answer_again | edit_last | clear

A reply under way is an ordinary object that may be put down and taken up again, by another thread too: a page that is
drawn anew between two pieces goes on where it was. Each side reads its own answers; where it has none (the model joined
later), those of the first side. Nothing here knows of the web.
Called by page.py. Read next: ../model/generate.py (how an answer is drawn).
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from evaluation.qa_data import sound
from model.chat_template import Message
from model.completion import Answer
from model.generate import chat_prompt, stream
from model.sampling import Sampling
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer


@dataclass
class Speaker:
    """A loaded model and how it is addressed."""

    name: str
    model: Transformer
    tokenizer: ChatTokenizer
    chats: bool  # a pretrained model goes on with a text; the others answer

    def prompt(self, messages: list[Message], max_new_tokens: int) -> tuple[list[int], bool]:
        """What the model reads, and whether old turns had to be left out of it."""
        if not self.chats:
            return self.tokenizer.encode_start(messages[-1]["content"]), False
        whole, _ = self.tokenizer.render(messages, add_generation_prompt=True)
        ids = chat_prompt(self.model, self.tokenizer, messages, max_new_tokens)
        return ids, len(ids) < len(whole)


@dataclass
class Reply:
    """One side's answer. `end`: "" while it grows, then stop, length, stopped (by the reader) or error."""

    speaker: str  # its name
    text: str = ""
    tokens: int = 0
    seconds: float = 0.0  # spent computing, the prompt included
    end: str = ""
    problem: str = ""  # of end "error"
    shortened: bool = False  # old turns did not fit into what the model reads

    @property
    def speed(self) -> float:
        """Tokens a second; 0 before the first."""
        return self.tokens / self.seconds if self.seconds else 0.0


class _Growing:
    """A reply under way."""

    def __init__(self, reply: Reply, speaker: Speaker, messages: list[Message], settings: Sampling) -> None:
        self.reply, self.answer = reply, Answer()
        self.pieces: Iterator[str] = iter(())
        started = time.perf_counter()
        try:
            ids, reply.shortened = speaker.prompt(messages, settings.max_new_tokens)
            settings = replace(settings, stop=speaker.tokenizer.stop_strings if speaker.chats else ())
            self.pieces = stream(speaker.model, ids, settings, speaker.tokenizer, self.answer)
        except ValueError as error:  # the question alone is too long for the model
            reply.end, reply.problem = "error", str(error)
        reply.seconds += time.perf_counter() - started

    def advance(self) -> None:
        reply, started = self.reply, time.perf_counter()
        try:
            reply.text += next(self.pieces)
        except StopIteration:
            reply.end = self.answer.finish_reason
        except RuntimeError as error:  # out of memory, most likely: it must not take the page with it
            reply.end, reply.problem = "error", (str(error).splitlines() or [type(error).__name__])[0]
        reply.tokens = len(self.answer.ids)
        reply.seconds += time.perf_counter() - started


@dataclass
class Turn:
    question: str
    replies: list[Reply] = field(default_factory=list)  # one a side
    attempt: int = 0  # how often this question has been answered before


class Conversation:
    """Turns, and the replies of the last one while they grow."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self._growing: list[_Growing] = []
        # A page that lost its browser and got it back may for a moment be drawn by two threads.
        self._lock = threading.RLock()

    @property
    def is_going(self) -> bool:
        return bool(self._growing)

    def ask(
        self, question: str, speakers: list[Speaker], settings: Sampling, system: str = "", attempt: int = 0
    ) -> None:
        """Begin a turn. What still grew is stopped first. Raises UserError for an empty question."""
        self.stop()
        turn = Turn(sound(question, "the question"), attempt=attempt)
        if settings.seed is not None:  # another attempt with the same seed would say the same
            settings = replace(settings, seed=settings.seed + attempt)
        growing = []
        for side, speaker in enumerate(speakers):
            reply = Reply(speaker.name)
            turn.replies.append(reply)
            messages = [*self._history(side, system), {"role": "user", "content": turn.question}]
            growing.append(_Growing(reply, speaker, messages, settings))
        self.turns.append(turn)
        self._growing = [each for each in growing if not each.reply.end]

    def _history(self, side: int, system: str) -> list[Message]:
        messages = [{"role": "system", "content": sound(system, "the system prompt")}] if system.strip() else []
        for turn in self.turns:
            reply = turn.replies[side] if side < len(turn.replies) else turn.replies[0]
            if reply.text:
                messages.append({"role": "user", "content": turn.question})
                messages.append({"role": "assistant", "content": reply.text})
        return messages

    def advance(self) -> bool:
        """Draw the next piece of every reply under way; False when all have ended."""
        with self._lock:
            for growing in self._growing:
                growing.advance()
            self._growing = [growing for growing in self._growing if not growing.reply.end]
            return self.is_going

    def stop(self) -> None:
        """End what grows, and keep what it said."""
        with self._lock:
            for growing in self._growing:
                growing.reply.end = "stopped"
            self._growing = []

    def answer_again(self, speakers: list[Speaker], settings: Sampling, system: str = "") -> None:
        """Draw the answers to the last question anew."""
        if self.turns:
            self.edit_last(self.turns[-1].question, speakers, settings, system)

    def edit_last(self, question: str, speakers: list[Speaker], settings: Sampling, system: str = "") -> None:
        """Put another question in the place of the last one. Raises UserError, changing nothing, for an empty one."""
        self.stop()
        sound(question, "the question")
        last = self.turns.pop()
        self.ask(question, speakers, settings, system, attempt=last.attempt + 1)

    def clear(self) -> None:
        self.stop()
        self.turns = []
