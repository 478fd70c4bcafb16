"""Responses in OpenAI's format: one JSON body, or chunks as server-sent events.

    data: {"id": "chatcmpl-…", "object": "chat.completion.chunk", "choices": [{"delta": {"content": "…"}, …}], …}
    data: [DONE]

Chat and text responses differ in field names; a text may begin with its prompt (echo.py). A token's log-probabilities
are sent with its first character, so tokens after a stop string are never sent.
Called by service.py. Read next: schemas.py (the fields), scheduler.py (where the text comes from).
"""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from model.completion import Completion
from model.detokenizer import IncrementalDetokenizer, token_bytes
from model.logprobs import TokenLogprob
from model.tokenizer import ChatTokenizer
from serving import schemas
from serving.echo import echoed_logprobs, echoed_text, named_top_logprobs, token_name
from serving.scheduler import Request, TokenEvent

DONE_EVENT = "data: [DONE]\n\n"


def sse_event(content: dict[str, Any]) -> str:
    """One server-sent event. ASCII only, because some clients treat certain Unicode characters as line ends."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


class _LogprobCursor:
    """How many tokens' log-probabilities of an answer have been sent, and how much text."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokens = self.text_sent = 0
        self.text = IncrementalDetokenizer(tokenizer)  # of the sent tokens, without stop strings
        self.text_emitted = 0  # characters of `text`


class ResponseBuilder:
    """Builds the response of one HTTP request: `body`, or `first_events`, `events` and `last_events` of a stream."""

    id_prefix = object_type = chunk_object_type = ""

    def __init__(self, model: str, tokenizer: ChatTokenizer, requests: list[Request], wants_usage: bool) -> None:
        self.tokenizer, self.requests, self.wants_usage = tokenizer, requests, wants_usage
        self.common_fields: dict[str, Any] = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self.cursors = [_LogprobCursor(tokenizer) for _ in requests]

    def usage(self) -> schemas.Usage:
        """Token counts; a prompt counts once, independent of `n`."""
        prompts = {id(request.sequence.prompt): len(request.sequence.prompt) for request in self.requests}
        read, written = sum(prompts.values()), sum(len(request.sequence.completion.ids) for request in self.requests)
        return schemas.Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)

    def body(self) -> str:
        """The JSON response of a finished request."""
        raise NotImplementedError

    def first_events(self) -> Iterator[str]:
        """Events before the first token."""
        return iter(())

    def events(self, event: TokenEvent) -> Iterator[str]:
        """Events of new text, and of the finish reason if the answer has ended."""
        raise NotImplementedError

    def last_events(self) -> Iterator[str]:
        """Events after the last answer: usage if requested, and [DONE]."""
        if self.wants_usage:
            yield self._chunk_event([], usage=self.usage().model_dump())
        yield DONE_EVENT

    def _chunk_event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        if self.wants_usage:
            more = {"usage": None, **more}
        return sse_event({**self.common_fields, "object": self.chunk_object_type, "choices": choices, **more})

    def _new_tokens(self, request: Request, text: str, count: int, is_last: bool) -> list[tuple[TokenLogprob, int]]:
        """The tokens to send with `text`, each with the number of characters before it. `count`: sampled so far."""
        answer, cursor = request.sequence.completion, self.cursors[request.index]
        cursor.text_sent += len(text)
        flush = is_last and not request.sequence.detokenizer.stopped
        new = []
        while cursor.tokens < min(count, len(answer.logprobs)) and (flush or cursor.text_emitted < cursor.text_sent):
            token = answer.logprobs[cursor.tokens]
            new.append((token, cursor.text_emitted))
            cursor.tokens += 1
            cursor.text_emitted += len(cursor.text.push(token.id))
        return new

    def _top_logprob(self, token_id: int, logprob: float) -> schemas.TopLogprob:
        piece = token_bytes(self.tokenizer, token_id)
        return schemas.TopLogprob(token=piece.decode(errors="replace"), logprob=logprob, bytes=list(piece))


class ChatResponse(ResponseBuilder):
    id_prefix, object_type, chunk_object_type = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def body(self) -> str:
        choices = []
        for request in self.requests:
            answer = request.sequence.completion
            message = schemas.AssistantMessage(content=answer.text)
            logprobs = self._logprobs(request, answer.text, len(answer.ids), True)
            choices.append(
                schemas.ChatChoice(
                    index=request.index, message=message, logprobs=logprobs, finish_reason=api_finish_reason(answer)
                )
            )
        return schemas.ChatCompletion(**self.common_fields, choices=choices, usage=self.usage()).model_dump_json()

    def first_events(self) -> Iterator[str]:
        for request in self.requests:
            yield self._choice_event(request.index, {"role": "assistant", "content": ""}, None, None)

    def events(self, event: TokenEvent) -> Iterator[str]:
        logprobs = self._logprobs(event.request, event.text, event.num_tokens, bool(event.finish_reason))
        if event.text or (logprobs and logprobs.content):
            content_logprobs = logprobs.model_dump() if logprobs else None
            yield self._choice_event(event.request.index, {"content": event.text}, content_logprobs, None)
        if event.finish_reason:
            yield self._choice_event(event.request.index, {}, None, event.finish_reason)

    def _choice_event(self, index: int, delta: dict[str, Any], logprobs: Any, finish_reason: str | None) -> str:
        return self._chunk_event(
            [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}]
        )

    def _logprobs(self, request: Request, text: str, count: int, is_last: bool) -> schemas.ChatLogprobs | None:
        if request.sequence.settings.logprobs is None:
            return None
        content = [
            schemas.ContentLogprob(
                **self._top_logprob(token.id, token.logprob).model_dump(),
                top_logprobs=[self._top_logprob(*pair) for pair in token.top_logprobs],
            )
            for token, _ in self._new_tokens(request, text, count, is_last)
        ]
        return schemas.ChatLogprobs(content=content)


class CompletionResponse(ResponseBuilder):
    id_prefix, object_type, chunk_object_type = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: ChatTokenizer, requests: list[Request], wants_usage: bool) -> None:
        super().__init__(model, tokenizer, requests, wants_usage)
        self.echoes: dict[int, str] = {}  # prompts not sent yet, by the request's index
        for request in requests:
            if request.echo is not None:
                self.echoes[request.index] = text = echoed_text(tokenizer, request.echo)
                cursor = self.cursors[request.index]
                cursor.text_emitted = cursor.text_sent = len(text)  # offset of the answer's first token

    def body(self) -> str:
        choices = []
        for request in self.requests:
            answer = request.sequence.completion
            text, logprobs = self._next_text(request, answer.text, len(answer.ids), True)
            choices.append(
                schemas.TextChoice(
                    index=request.index, text=text, logprobs=logprobs, finish_reason=api_finish_reason(answer)
                )
            )
        return schemas.TextCompletion(**self.common_fields, choices=choices, usage=self.usage()).model_dump_json()

    def events(self, event: TokenEvent) -> Iterator[str]:
        text, logprobs = self._next_text(event.request, event.text, event.num_tokens, bool(event.finish_reason))
        if text or event.finish_reason or (logprobs and logprobs.tokens):
            choice = {"index": event.request.index, "text": text, "finish_reason": event.finish_reason or None}
            yield self._chunk_event([{**choice, "logprobs": logprobs.model_dump() if logprobs else None}])

    def _next_text(
        self, request: Request, text: str, count: int, is_last: bool
    ) -> tuple[str, schemas.TextLogprobs | None]:
        """New text and its log-probabilities; the first call for a request prepends an echoed prompt."""
        logprobs = self._logprobs(request, text, count, is_last)
        if request.echo is None or request.index not in self.echoes:
            return text, logprobs
        if logprobs:
            sequence = request.sequence
            prompt = echoed_logprobs(self.tokenizer, request.echo, sequence.prompt, sequence.completion.prompt_logprobs)
            logprobs = schemas.TextLogprobs(**{k: v + getattr(logprobs, k) for k, v in prompt.model_dump().items()})
        return self.echoes.pop(request.index) + text, logprobs

    def _logprobs(self, request: Request, text: str, count: int, is_last: bool) -> schemas.TextLogprobs | None:
        if request.sequence.settings.logprobs is None:
            return None
        new = self._new_tokens(request, text, count, is_last)
        stop_logprob = request.sequence.completion.stop_logprob
        if is_last and stop_logprob:  # one more entry without text, as in OpenAI and vLLM
            new.append((stop_logprob, self.cursors[request.index].text_sent))
        return schemas.TextLogprobs(
            tokens=[token_name(self.tokenizer, token.id) for token, _ in new],
            token_logprobs=[token.logprob for token, _ in new],
            top_logprobs=[named_top_logprobs(self.tokenizer, token) for token, _ in new],
            text_offset=[characters for _, characters in new],
        )


def api_finish_reason(answer: Completion) -> schemas.FinishReason:
    return "stop" if answer.finish_reason == "stop" else "length"
