"""Answers as OpenAI's clients read them: whole, or chunk by chunk as server-sent events.

    data: {"id": "chatcmpl-…", "object": "chat.completion.chunk", "choices": [{"delta": {"content": "…"}, …}], …}
    data: [DONE]

`ChatReply` and `TextReply` differ in names, and a text may begin with its prompt (echo.py). Log-probabilities come out
with the text: a token is sent once its first character is, so that tokens after a stop string are not.
Called by service.py. Read next: schemas.py (the shapes), scheduler.py (where the text comes from).
"""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from model.completion import Answer
from model.detokenizer import TextStream, token_bytes
from model.logprobs import TokenProbability
from model.tokenizer import ChatTokenizer
from serving import schemas
from serving.echo import alternatives, echoed_logprobs, echoed_text, token_name
from serving.scheduler import News, Ticket

DONE = "data: [DONE]\n\n"


def event(content: dict[str, Any]) -> str:
    """One server-sent event. ASCII only: no character can end a line for some client."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


class _Told:
    """How much of an answer's log-probabilities has been told, and of how much text."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokens = self.text_sent = 0
        self.text = TextStream(tokenizer)  # of the tokens told, no matter which stop string was found
        self.told_text = 0


class Reply:
    """What is sent for one request, in either way."""

    prefix = kind = chunk_kind = ""

    def __init__(self, model: str, tokenizer: ChatTokenizer, tickets: list[Ticket], wants_usage: bool) -> None:
        self.tokenizer, self.tickets, self.wants_usage = tokenizer, tickets, wants_usage
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self.told = [_Told(tokenizer) for _ in tickets]

    def usage(self) -> schemas.Usage:
        """Prompts count once, however many answers are drawn to each."""
        prompts = {id(ticket.row.prompt): len(ticket.row.prompt) for ticket in self.tickets}
        read, written = sum(prompts.values()), sum(len(ticket.row.answer.ids) for ticket in self.tickets)
        return schemas.Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)

    def whole(self) -> str:
        """The JSON of the finished request."""
        raise NotImplementedError

    def opening(self) -> Iterator[str]:
        """Events before the first token."""
        return iter(())

    def piece(self, news: News) -> Iterator[str]:
        """The events of new text, and of the end if it is the end."""
        raise NotImplementedError

    def closing(self) -> Iterator[str]:
        """Events behind the last answer."""
        if self.wants_usage:
            yield self._chunk([], usage=self.usage().model_dump())
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        if self.wants_usage:
            more = {"usage": None, **more}
        return event({**self.head, "object": self.chunk_kind, "choices": choices, **more})

    def _new_tokens(self, ticket: Ticket, text: str, count: int, ends: bool) -> list[tuple[TokenProbability, int]]:
        """The tokens that `text` brings, each with the number of characters before it. `count`: drawn so far."""
        answer, told = ticket.row.answer, self.told[ticket.index]
        told.text_sent += len(text)
        to_the_end = ends and not ticket.row.text.stopped
        new = []
        while told.tokens < min(count, len(answer.logprobs)) and (to_the_end or told.told_text < told.text_sent):
            token = answer.logprobs[told.tokens]
            new.append((token, told.told_text))
            told.tokens += 1
            told.told_text += len(told.text.push(token.id))
        return new

    def _spelled(self, token_id: int, logprob: float) -> schemas.TokenLogprob:
        spelled = token_bytes(self.tokenizer, token_id)
        return schemas.TokenLogprob(token=spelled.decode(errors="replace"), logprob=logprob, bytes=list(spelled))


class ChatReply(Reply):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self) -> str:
        choices = []
        for ticket in self.tickets:
            answer = ticket.row.answer
            message = schemas.AssistantMessage(content=answer.text)
            logprobs = self._logprobs(ticket, answer.text, len(answer.ids), True)
            choices.append(
                schemas.ChatChoice(index=ticket.index, message=message, logprobs=logprobs, finish_reason=reason(answer))
            )
        return schemas.ChatCompletion(**self.head, choices=choices, usage=self.usage()).model_dump_json()

    def opening(self) -> Iterator[str]:
        for ticket in self.tickets:
            yield self._part(ticket.index, {"role": "assistant", "content": ""}, None, None)

    def piece(self, news: News) -> Iterator[str]:
        logprobs = self._logprobs(news.ticket, news.text, news.tokens, bool(news.finish_reason))
        if news.text or (logprobs and logprobs.content):
            told = logprobs.model_dump() if logprobs else None
            yield self._part(news.ticket.index, {"content": news.text}, told, None)
        if news.finish_reason:
            yield self._part(news.ticket.index, {}, None, news.finish_reason)

    def _part(self, index: int, delta: dict[str, Any], logprobs: Any, finish_reason: str | None) -> str:
        return self._chunk([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}])

    def _logprobs(self, ticket: Ticket, text: str, count: int, ends: bool) -> schemas.ChatLogprobs | None:
        if ticket.row.settings.logprobs is None:
            return None
        content = [
            schemas.ContentLogprob(
                **self._spelled(token.id, token.logprob).model_dump(),
                top_logprobs=[self._spelled(*pair) for pair in token.likeliest],
            )
            for token, _ in self._new_tokens(ticket, text, count, ends)
        ]
        return schemas.ChatLogprobs(content=content)


class TextReply(Reply):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: ChatTokenizer, tickets: list[Ticket], wants_usage: bool) -> None:
        super().__init__(model, tokenizer, tickets, wants_usage)
        self.echoes: dict[int, str] = {}  # prompts that are still to be sent, by the ticket's index
        for ticket in tickets:
            if ticket.echo is not None:
                self.echoes[ticket.index] = text = echoed_text(tokenizer, ticket.echo)
                told = self.told[ticket.index]
                told.told_text = told.text_sent = len(text)  # where the answer's tokens begin

    def whole(self) -> str:
        choices = []
        for ticket in self.tickets:
            answer = ticket.row.answer
            text, logprobs = self._next(ticket, answer.text, len(answer.ids), True)
            choices.append(
                schemas.TextChoice(index=ticket.index, text=text, logprobs=logprobs, finish_reason=reason(answer))
            )
        return schemas.TextCompletion(**self.head, choices=choices, usage=self.usage()).model_dump_json()

    def piece(self, news: News) -> Iterator[str]:
        text, logprobs = self._next(news.ticket, news.text, news.tokens, bool(news.finish_reason))
        if text or news.finish_reason or (logprobs and logprobs.tokens):
            choice = {"index": news.ticket.index, "text": text, "finish_reason": news.finish_reason or None}
            yield self._chunk([{**choice, "logprobs": logprobs.model_dump() if logprobs else None}])

    def _next(self, ticket: Ticket, text: str, count: int, ends: bool) -> tuple[str, schemas.TextLogprobs | None]:
        """New text and its log-probabilities; the first call for a ticket puts an echoed prompt in front of them."""
        logprobs = self._logprobs(ticket, text, count, ends)
        if ticket.echo is None or ticket.index not in self.echoes:
            return text, logprobs
        if logprobs:
            row = ticket.row
            prompt = echoed_logprobs(self.tokenizer, ticket.echo, row.prompt, row.answer.prompt_logprobs)
            logprobs = schemas.TextLogprobs(**{k: v + getattr(logprobs, k) for k, v in prompt.model_dump().items()})
        return self.echoes.pop(ticket.index) + text, logprobs

    def _logprobs(self, ticket: Ticket, text: str, count: int, ends: bool) -> schemas.TextLogprobs | None:
        if ticket.row.settings.logprobs is None:
            return None
        new = self._new_tokens(ticket, text, count, ends)
        closing = ticket.row.answer.stop_logprob
        if ends and closing:  # as OpenAI and vLLM: one more entry, of no text
            new.append((closing, self.told[ticket.index].text_sent))
        return schemas.TextLogprobs(
            tokens=[token_name(self.tokenizer, token.id) for token, _ in new],
            token_logprobs=[token.logprob for token, _ in new],
            top_logprobs=[alternatives(self.tokenizer, token) for token, _ in new],
            text_offset=[characters for _, characters in new],
        )


def reason(answer: Answer) -> schemas.FinishReason:
    return "stop" if answer.finish_reason == "stop" else "length"
