"""What a request's body becomes: token ids in the engine's queue, and its answer, whole or as a stream.

A request is parsed, checked and turned into token ids (in a worker thread: the event loop stays free), handed to the
engine, and answered from its inbox, whole or as a stream. A client that hangs up frees its place at once.
Called by app.py and routes.py. Read next: lanes.py, schemas.py, scheduler.py, responses.py, embeddings.py.
"""

import asyncio
import contextlib
import urllib.parse
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from common.errors import UserError
from model.completion import Answer, Row
from serving.embeddings import EmbeddingRequest, embedding_job, embedding_list
from serving.errors import CANNOT, ApiError
from serving.lanes import Lanes
from serving.limits import Limits
from serving.models import Served, TooLong
from serving.requests import parse
from serving.responses import ChatReply, Reply, TextReply, event
from serving.scheduler import Engine, Full, News, Ticket, Work
from serving.schemas import ChatRequest, CompletionRequest
from serving.settings import sampling

NAMES_SHOWN = 20  # of ignored fields, in the header
DEFAULTS: tuple[Any, ...] = (None, "", [], {}, {"type": "text"})  # of fields that are not supported
AnyRequest = ChatRequest | CompletionRequest | EmbeddingRequest


@dataclass
class Prepared:
    """A request that can go to the engine."""

    served: Served
    headers: dict[str, str]  # of the response
    work: Sequence[Any]  # tickets, or one job
    body: Any = None  # of embeddings
    wants_usage: bool = False
    stream: bool = False


class Counter:
    """Where requests are taken in and answers handed out."""

    def __init__(
        self, models: dict[str, Served], limits: Limits, number_format: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.models, self.strict_model_names = models, limits.strict_model_names
        self.loop: asyncio.AbstractEventLoop | None = None
        pairs = {name: (served.model, served.tokenizer) for name, served in models.items()}
        self.engine = Engine(pairs, limits.seats, limits.queue, number_format, self._deliver)
        self.lanes = Lanes(limits.seats + limits.queue)

    def _deliver(self, news: list[News]) -> None:
        """From the engine's thread into the inboxes, which belong to the loop's."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody is there any more
            assert self.loop is not None
            self.loop.call_soon_threadsafe(lambda: [item.ticket.inbox.put_nowait(item) for item in news])

    def find(self, name: str | None) -> Served:
        name = name or next(iter(self.models))
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(404, f"there is no model {name[:200]!r} here: use {known}", "model", "model_not_found")
        return self.models[name]

    def choose(self, body: AnyRequest) -> tuple[Served, dict[str, str]]:
        """The model that answers a request, and the response headers that name ignored fields and another model.

        A server with one model answers unknown model names with it, unless names are strict.
        """
        headers = ignored(body)
        if body.model and body.model not in self.models and len(self.models) == 1 and not self.strict_model_names:
            served = self.find(None)
            return served, {**headers, "x-served-model": urllib.parse.quote(served.name)}
        return self.find(body.model), headers

    def prepare(self, raw: bytes, kind: type[ChatRequest] | type[CompletionRequest]) -> Prepared:
        """Parsed, checked and tokenised. Slow for long bodies: it runs in a lane.

        Raises ApiError, 429 before it tokenises where the queue is full.
        """
        body = parse(raw, kind)
        served, headers = self.choose(body)
        self.check_room(served)
        options = {"wants_usage": body.wants_usage, "stream": bool(body.stream)}
        return Prepared(served, headers, self.tickets(body, served), **options)

    def prepare_embeddings(self, raw: bytes) -> Prepared:
        body = parse(raw, EmbeddingRequest)
        served, headers = self.choose(body)
        self.check_room(served)
        return Prepared(served, headers, [embedding_job(body, served)], body)

    def check_room(self, served: Served) -> None:
        """Raises ApiError 429 where the queue of a model is full."""
        with refused_when_full():
            self.engine.check_room(served.name)

    def tickets(self, body: ChatRequest | CompletionRequest, served: Served) -> list[Ticket]:
        """Checked and tokenised, not yet waiting."""
        param = "messages" if isinstance(body, ChatRequest) else "prompt"
        try:
            if isinstance(body, ChatRequest):
                if served.why_no_chat:
                    raise ApiError(400, served.why_no_chat, "model")
                prompts = [served.chat_ids(body)]
                echoes: list[Any] = [None]
            else:
                if body.max_tokens == 0 and not body.echo:
                    raise ApiError(400, "max_tokens: 0 is only for requests with echo", "max_tokens")
                given = prompts_of(body)
                prompts = [served.text_ids(prompt, answered=body.max_tokens != 0) for prompt in given]
                echoes = given if body.echo else [None] * len(given)
            settings = sampling(body, served)
            model, tokenizer = served.model, served.tokenizer
            wanted = [pair for pair in zip(prompts, echoes, strict=True) for _ in range(body.n or 1)]
            rows = [Row(model, tokenizer, prompt, settings, Answer(), i) for i, (prompt, _) in enumerate(wanted)]
        except TooLong as error:
            raise ApiError(400, str(error), param, "context_length_exceeded") from None
        except (UserError, ValueError) as error:
            raise ApiError(400, str(error), param) from None
        return [Ticket(row, i, echo=echo) for i, (row, (_, echo)) in enumerate(zip(rows, wanted, strict=True))]

    async def answer(self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        ready = await self.in_lane(request, self.prepare, kind)
        inbox = self.submit(ready.served, ready.work)
        shape = ChatReply if kind is ChatRequest else TextReply
        reply = shape(ready.served.name, ready.served.tokenizer, list(ready.work), ready.wants_usage)
        if ready.stream:
            return EventStream(self, request, reply, inbox, ready.headers)
        with self.watched(request, reply.tickets, inbox):
            async for news in finished(inbox, len(reply.tickets)):
                if news is None:
                    return Response(status_code=499)  # nobody reads it
                if news.finish_reason == "error":
                    raise ApiError(500, CANNOT)
            whole = await self.lanes.responses.run(reply.whole)
            return Response(whole, headers=ready.headers, media_type="application/json")

    async def embed(self, request: Request) -> Response:
        ready = await self.in_lane(request, self.prepare_embeddings)
        inbox = self.submit(ready.served, ready.work)
        with self.watched(request, ready.work, inbox):
            news = await inbox.get()
        if news is None:
            return Response(status_code=499)
        if news.finish_reason == "error":
            raise ApiError(500, CANNOT)
        whole = await self.lanes.responses.run(embedding_list, ready.body, ready.served, ready.work[0])
        return Response(whole, headers=ready.headers, media_type="application/json")

    async def in_lane(self, request: Request, prepare: Callable[..., Prepared], *more: Any) -> Prepared:
        """What `prepare` makes of the body, in the worker thread for bodies of its size. The bytes are not kept."""
        raw = b"".join([part async for part in request.stream()])
        return await self.lanes.for_body(raw).run(prepare, raw, *more)

    def submit(self, served: Served, work: Sequence[Work]) -> "asyncio.Queue[News | None]":
        """Hand work to the engine; returns the inbox that its news comes into."""
        inbox: asyncio.Queue[News | None] = asyncio.Queue()
        for item in work:
            item.inbox = inbox
        try:
            with refused_when_full():
                self.engine.submit(served.name, work)
        except ValueError as error:
            raise ApiError(400, str(error), "num_beams" if str(error).startswith("num_beams") else "n") from None
        return inbox

    @contextlib.contextmanager
    def watched(self, request: Request, tickets: Sequence[Work], inbox: "asyncio.Queue[News | None]") -> Any:
        """Inside, a client that hangs up frees its places, and None comes into the inbox. Behind it they are free."""

        async def wait_for_the_end() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.engine.cancel(tickets)
            inbox.put_nowait(None)

        watcher = asyncio.ensure_future(wait_for_the_end())
        try:
            yield
        finally:
            watcher.cancel()
            self.engine.cancel(tickets)


@contextlib.contextmanager
def refused_when_full() -> Any:
    """Turn the engine's Full into ApiError 429."""
    try:
        yield
    except Full as full:
        headers = {"Retry-After": str(full.retry_after)}
        raise ApiError(429, str(full), None, "rate_limit_exceeded", headers) from None


async def finished(inbox: "asyncio.Queue[News | None]", answers: int) -> AsyncIterator[News | None]:
    """The news until all answers have ended, one has failed, or nobody reads them any more."""
    while answers:
        news = await inbox.get()
        yield news
        if news is None or news.finish_reason == "error":
            return
        answers -= bool(news.finish_reason)


class EventStream(StreamingResponse):
    """An answer as it grows. The places are freed however the sending ends, even if it never begins."""

    def __init__(
        self, counter: Counter, request: Request, reply: Reply, inbox: "asyncio.Queue[News | None]", headers: Any
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(self._events(reply, inbox), headers=headers, media_type="text/event-stream")
        self.watched = lambda: counter.watched(request, reply.tickets, inbox)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self.watched():
            await super().__call__(scope, receive, send)

    async def _events(self, reply: Reply, inbox: "asyncio.Queue[News | None]") -> AsyncIterator[str]:
        yield "".join(reply.opening())
        async for news in finished(inbox, len(reply.tickets)):
            if news is None:
                return
            if news.finish_reason == "error":
                yield event({"error": {"message": CANNOT, "type": "server_error", "param": None, "code": None}})
                return
            if text := "".join(reply.piece(news)):
                yield text
        yield "".join(reply.closing())


def prompts_of(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts one by one: a text, several, token ids, or several lists of them."""
    prompt: Any = body.prompt
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    return prompt if several else [prompt]


def ignored(body: AnyRequest) -> dict[str, str]:
    """A header that names the fields that are not supported; those at their default value are left out."""
    asked = [name for name, value in (body.model_extra or {}).items() if value not in DEFAULTS]
    names = [name for name in asked if name.isascii() and name.replace("-", "_").isidentifier()]
    return {"x-ignored-fields": ", ".join(names[:NAMES_SHOWN])[:1000]} if names else {}
