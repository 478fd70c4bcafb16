"""Responses in OpenAI's format: one JSON body, or chunks as server-sent events.

    data: {"id": "chatcmpl-…", "object": "chat.completion.chunk", "choices": [{"delta": {"content": "…"}, …}], …}
    data: [DONE]

Chat and text responses differ in field names. A token's log-probabilities are sent with its first character, so tokens
after a stop string are never sent. A text may begin with its prompt (`echo`), which scores a given text, as in
lm-evaluation-harness' `local-completions` (echo, logprobs 1, max_tokens 1, lists of token ids):

    tokens          "The"   " sky"   ...
    token_logprobs  null    -2.31    ...     null for the first token, which has no context
    top_logprobs    null    {" sky": -2.31, " cat": -1.97}    the most likely tokens, and the token itself
    text_offset     0       3        ...     characters before the token

Called by service.py. Read next: schemas.py (the fields), scheduler.py (where the text comes from),
../model/logprobs.py (how the numbers are computed).
"""

import json
import time
import uuid
from typing import Any

from model.detokenizer import IncrementalDetokenizer, token_bytes
from model.logprobs import TokenLogprob
from model.tokenizer import ChatTokenizer
from serving import schemas
from serving.answer_deltas import Delta, DeltaReader, join_deltas
from serving.chat_schemas import ChatRequest
from serving.messages import replace_surrogates
from serving.models import ServedModel
from serving.scheduler import Request, TokenEvent

Prompt = str | list[int]  # as in the request


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
    """Builds the response of one HTTP request: `body`, or `first_event`, `event` and `last_events` of a stream."""

    id_prefix = chunk_type = ""
    response_type: type[schemas.ChatCompletion] | type[schemas.TextCompletion]

    def __init__(
        self, served: ServedModel, headers: dict[str, str], body: schemas.GenerationRequest, work: list[Request]
    ) -> None:
        self.served, self.headers, self.work, self.stream = served, headers, work, bool(body.stream)
        self.tokenizer, self.wants_usage = served.tokenizer, body.wants_usage
        self.common_fields: dict[str, Any] = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": served.name,
        }
        self.cursors = [_LogprobCursor(served.tokenizer) for _ in work]
        self.echoes: dict[int, str] = {}  # prompts not sent yet, by the request's index
        for request, cursor in zip(work, self.cursors, strict=True):
            if request.echo is not None:
                self.echoes[request.index] = text = echoed_text(self.tokenizer, request.echo)
                cursor.text_emitted = cursor.text_sent = len(text)  # offset of the answer's first token

    def usage(self) -> schemas.Usage:
        """Token counts; a prompt counts once, independent of `n`."""
        prompts = {id(request.sequence.prompt): len(request.sequence.prompt) for request in self.work}
        read, written = sum(prompts.values()), sum(len(request.sequence.completion.ids) for request in self.work)
        return schemas.Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)

    def body(self) -> str:
        """The JSON response of a finished request."""
        choices: Any = []
        for request in self.work:
            answer = request.sequence.completion
            text, logprobs = self._next_text(request, answer.text, len(answer.ids), True)
            reason = "stop" if answer.finish_reason == "stop" else "length"
            choice = {"index": request.index, "logprobs": logprobs, "finish_reason": reason}
            choices.append({**choice, **self._answer_fields(request, text, reason)})
        return self.response_type(**self.common_fields, choices=choices, usage=self.usage()).model_dump_json()

    def _answer_fields(self, request: Request, text: str, finish_reason: str) -> dict[str, Any]:
        """The fields of a choice that contain a finished answer; they may replace the finish reason."""
        raise NotImplementedError

    def first_event(self) -> str:
        """Events before the first token."""
        return ""

    def event(self, event: TokenEvent) -> str:
        """Events of new text, and of the finish reason if the answer has ended; "" without any."""
        raise NotImplementedError

    def last_events(self) -> str:
        """Events after the last answer: usage if requested, and [DONE]."""
        usage = self._chunk_event([], usage=self.usage().model_dump()) if self.wants_usage else ""
        return f"{usage}data: [DONE]\n\n"

    def _next_text(self, request: Request, text: str, count: int, is_last: bool) -> tuple[str, Any]:
        """The text to send next and its log-probabilities (None without). `count`: tokens sampled so far."""
        raise NotImplementedError

    def _chunk_event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        if self.wants_usage:
            more = {"usage": None, **more}
        return sse_event({**self.common_fields, "object": self.chunk_type, "choices": choices, **more})

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


class ChatResponse(ResponseBuilder):
    id_prefix, chunk_type, response_type = "chatcmpl", "chat.completion.chunk", schemas.ChatCompletion

    def __init__(self, served: ServedModel, headers: dict[str, str], body: ChatRequest, work: list[Request]) -> None:
        super().__init__(served, headers, body, work)
        has_parts = body.has_parts and served.has_answer_parts
        self.readers = {request.index: DeltaReader(body) for request in work} if has_parts else {}

    def _deltas(self, request: Request, text: str, is_last: bool) -> list[Delta]:
        """The deltas of new text; if the answer is not split into parts, all of it is content."""
        if reader := self.readers.get(request.index):
            return reader.push(text, is_last)
        return [{"content": text}] if text else []

    def _finish_reason(self, request: Request, finish_reason: str) -> str:
        """An answer with calls has the reason "tool_calls"; one that was cut keeps "length"."""
        reader = self.readers.get(request.index)
        return "tool_calls" if reader and reader.num_calls and finish_reason == "stop" else finish_reason

    def _answer_fields(self, request: Request, text: str, finish_reason: str) -> dict[str, Any]:
        message = join_deltas(self._deltas(request, text, True))
        return {"message": message, "finish_reason": self._finish_reason(request, finish_reason)}

    def first_event(self) -> str:
        start = {"role": "assistant", "content": None if self.readers else ""}
        return "".join(self._choice_event(request.index, start, None, None) for request in self.work)

    def event(self, event: TokenEvent) -> str:
        is_last, index = bool(event.finish_reason), event.request.index
        text, logprobs = self._next_text(event.request, event.text, event.num_tokens, is_last)
        deltas, sent = self._deltas(event.request, text, is_last), logprobs and logprobs.model_dump()
        if not deltas and logprobs and logprobs.content:
            deltas = [{} if self.readers else {"content": ""}]
        events = [self._choice_event(index, delta, None if i else sent, None) for i, delta in enumerate(deltas)]
        if is_last:
            events.append(self._choice_event(index, {}, None, self._finish_reason(event.request, event.finish_reason)))
        return "".join(events)

    def _choice_event(self, index: int, delta: dict[str, Any], logprobs: Any, finish_reason: str | None) -> str:
        return self._chunk_event(
            [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}]
        )

    def _next_text(self, request: Request, text: str, count: int, is_last: bool) -> tuple[str, Any]:
        if request.sequence.settings.logprobs is None:
            return text, None
        content = [
            schemas.ContentLogprob(
                **self._top_logprob(token.id, token.logprob).model_dump(),
                top_logprobs=[self._top_logprob(*pair) for pair in token.top_logprobs],
            )
            for token, _ in self._new_tokens(request, text, count, is_last)
        ]
        return text, schemas.ChatLogprobs(content=content)

    def _top_logprob(self, token_id: int, logprob: float) -> schemas.TopLogprob:
        piece = token_bytes(self.tokenizer, token_id)
        return schemas.TopLogprob(token=piece.decode(errors="replace"), logprob=logprob, bytes=list(piece))


class CompletionResponse(ResponseBuilder):
    id_prefix, chunk_type, response_type = "cmpl", "text_completion", schemas.TextCompletion

    def _answer_fields(self, request: Request, text: str, finish_reason: str) -> dict[str, Any]:
        return {"text": text}

    def event(self, event: TokenEvent) -> str:
        is_last = bool(event.finish_reason)
        text, logprobs = self._next_text(event.request, event.text, event.num_tokens, is_last)
        if not (text or is_last or (logprobs and logprobs.tokens)):
            return ""
        choice = {"index": event.request.index, "text": text, "finish_reason": event.finish_reason or None}
        return self._chunk_event([{**choice, "logprobs": logprobs and logprobs.model_dump()}])

    def _next_text(self, request: Request, text: str, count: int, is_last: bool) -> tuple[str, Any]:
        """The first call for a request prepends an echoed prompt."""
        echo = self.echoes.pop(request.index, None)
        if request.sequence.settings.logprobs is None:
            return (echo or "") + text, None
        new: list[tuple[TokenLogprob, int]] = self._new_tokens(request, text, count, is_last)
        stop_logprob = request.sequence.completion.stop_logprob
        if is_last and stop_logprob:  # one more entry without text, as in OpenAI and vLLM
            new.append((stop_logprob, self.cursors[request.index].text_sent))
        logprobs = schemas.TextLogprobs(
            tokens=[token_name(self.tokenizer, token.id) for token, _ in new],
            token_logprobs=[token.logprob for token, _ in new],
            top_logprobs=[named_top_logprobs(self.tokenizer, token) for token, _ in new],
            text_offset=[characters for _, characters in new],
        )
        if echo is not None and request.echo is not None:
            sequence = request.sequence
            prompt = echoed_logprobs(self.tokenizer, request.echo, sequence.prompt, sequence.completion.prompt_logprobs)
            logprobs = schemas.TextLogprobs(**{k: v + getattr(logprobs, k) for k, v in prompt.model_dump().items()})
        return (echo or "") + text, logprobs


# ---- echoed prompts and names of tokens ----
def echoed_text(tokenizer: ChatTokenizer, prompt: Prompt) -> str:
    """The prompt as text: as in the request, or its ids decoded, special tokens included."""
    return replace_surrogates(prompt) if isinstance(prompt, str) else tokenizer.decode(prompt)


def echoed_logprobs(
    tokenizer: ChatTokenizer, prompt: Prompt, ids: list[int], logprobs: list[TokenLogprob]
) -> schemas.TextLogprobs:
    """The `logprobs` field of an echoed prompt. `ids`: the prompt's tokens; `logprobs`: those of all but the first."""
    added = tokenizer.special_ids if isinstance(prompt, str) else frozenset()  # a bos, which has no characters
    text, offsets, characters = IncrementalDetokenizer(tokenizer), [], 0
    for i in ids:
        offsets.append(characters + len(text.completed_by(i)))
        characters += 0 if i in added else len(text.push(i))
    return schemas.TextLogprobs(
        tokens=[token_name(tokenizer, i) for i in ids],
        token_logprobs=[None, *(token.logprob for token in logprobs)],
        top_logprobs=[None, *(named_top_logprobs(tokenizer, token) for token in logprobs)],
        text_offset=offsets,
    )


def named_top_logprobs(tokenizer: ChatTokenizer, token: TokenLogprob) -> dict[str, float]:
    """{name: logprob} of the most likely tokens and of the token itself; of two with the same name, the likelier."""
    named: dict[str, float] = {}
    for i, logprob in [*token.top_logprobs, (token.id, token.logprob)]:
        named.setdefault(token_name(tokenizer, i), logprob)
    return named


def token_name(tokenizer: ChatTokenizer, token_id: int) -> str:
    """The token's text; its bytes where it is part of a character, which keeps the names of such tokens distinct."""
    spelled = token_bytes(tokenizer, token_id)
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
