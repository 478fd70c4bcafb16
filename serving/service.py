"""Process a request: parse and tokenise its body, queue it in the engine, and send the response.

    body -> worker thread: PreparedRequest -> engine -> inbox of TokenEvents -> JSON response or EventStream

Parsing runs in a worker thread, which keeps the event loop free. When a client disconnects, its requests are aborted.
Called by app.py and routes.py. Read next: worker_pools.py, schemas.py, scheduler.py, responses.py, embeddings.py.
"""

import asyncio
import contextlib
import urllib.parse
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response
from fastapi.responses import StreamingResponse

from common.errors import UserError
from model.completion import Completion, Sequence
from serving.embeddings import EmbeddingRequest, embedding_json, make_embedding_job
from serving.errors import MODEL_FAILED, ApiError
from serving.limits import ServerLimits
from serving.models import PromptTooLong, ServedModel
from serving.requests import parse_body
from serving.responses import ChatResponse, CompletionResponse, ResponseBuilder, sse_event
from serving.scheduler import InferenceEngine, QueueFull, Request, TokenEvent, WorkItem
from serving.schemas import ChatRequest, CompletionRequest
from serving.settings import make_sampling_params
from serving.worker_pools import WorkerPools

MAX_IGNORED_SHOWN = 20  # names in the header x-ignored-fields
UNSUPPORTED_DEFAULTS: tuple[Any, ...] = (None, "", [], {}, {"type": "text"})  # default values of unsupported fields
AnyRequest = ChatRequest | CompletionRequest | EmbeddingRequest


@dataclass
class PreparedRequest:
    """A request that is ready for the engine."""

    served: ServedModel
    headers: dict[str, str]  # of the response
    work: list[Any]  # Requests, or one EmbeddingJob
    body: Any = None  # set for embeddings only
    wants_usage: bool = False
    stream: bool = False


class CompletionService:
    """Processes HTTP requests with one inference engine."""

    def __init__(
        self,
        models: dict[str, ServedModel],
        limits: ServerLimits,
        autocast_context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.models, self.strict_model_names = models, limits.strict_model_names
        self.loop: asyncio.AbstractEventLoop | None = None
        pairs = {name: (served.model, served.tokenizer) for name, served in models.items()}
        self.engine = InferenceEngine(
            pairs, limits.max_num_seqs, limits.max_queue, autocast_context, self._deliver_events
        )
        self.worker_pools = WorkerPools(limits.max_num_seqs + limits.max_queue)

    def _deliver_events(self, events: list[TokenEvent]) -> None:
        """Called in the engine thread: put events into their inboxes, in the event loop's thread."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed: no client is left
            assert self.loop is not None
            self.loop.call_soon_threadsafe(lambda: [event.request.inbox.put_nowait(event) for event in events])

    def find_model(self, name: str | None) -> ServedModel:
        name = name or next(iter(self.models))
        if name not in self.models:
            names = ", ".join(self.models)
            raise ApiError(404, f"no model {name[:200]!r} on this server: use {names}", "model", "model_not_found")
        return self.models[name]

    def select_model(self, body: AnyRequest) -> tuple[ServedModel, dict[str, str]]:
        """Return the model for a request and the response headers x-ignored-fields and x-served-model, where needed.

        A server of one model uses it for unknown model names too, unless `strict_model_names` is set.
        """
        headers = ignored_fields_header(body)
        if body.model and body.model not in self.models and len(self.models) == 1 and not self.strict_model_names:
            served = self.find_model(None)
            return served, {**headers, "x-served-model": urllib.parse.quote(served.name)}
        return self.find_model(body.model), headers

    def prepare_completion(self, raw: bytes, kind: type[ChatRequest] | type[CompletionRequest]) -> PreparedRequest:
        """Parse, check and tokenise a request. Slow for long bodies, so it runs in a worker thread.

        Raises ApiError; if the queue is full, 429 without tokenising.
        """
        body = parse_body(raw, kind)
        served, headers = self.select_model(body)
        self.check_capacity(served)
        options = {"wants_usage": body.wants_usage, "stream": bool(body.stream)}
        return PreparedRequest(served, headers, self.make_requests(body, served), **options)

    def prepare_embeddings(self, raw: bytes) -> PreparedRequest:
        body = parse_body(raw, EmbeddingRequest)
        served, headers = self.select_model(body)
        self.check_capacity(served)
        return PreparedRequest(served, headers, [make_embedding_job(body, served)], body)

    def check_capacity(self, served: ServedModel) -> None:
        """Raises ApiError 429 if the model's queue is full."""
        with reject_when_full():
            self.engine.check_capacity(served.name)

    def make_requests(self, body: ChatRequest | CompletionRequest, served: ServedModel) -> list[Request]:
        """Check and tokenise the prompts; return one Request per answer, not queued yet. Raises ApiError 400."""
        param = "messages" if isinstance(body, ChatRequest) else "prompt"
        try:
            if isinstance(body, ChatRequest):
                if served.chat_unavailable:
                    raise ApiError(400, served.chat_unavailable, "model")
                prompts = [served.chat_ids(body)]
                echoes: list[Any] = [None]
            else:
                if body.max_tokens == 0 and not body.echo:
                    raise ApiError(400, "max_tokens: 0 is allowed only with echo", "max_tokens")
                given = split_prompts(body)
                prompts = [served.text_ids(prompt, with_answer=body.max_tokens != 0) for prompt in given]
                echoes = given if body.echo else [None] * len(given)
            settings = make_sampling_params(body, served)
            model, tokenizer = served.model, served.tokenizer
            wanted = [pair for pair in zip(prompts, echoes, strict=True) for _ in range(body.n or 1)]
            sequences = [
                Sequence(model, tokenizer, prompt, settings, Completion(), i) for i, (prompt, _) in enumerate(wanted)
            ]
        except PromptTooLong as error:
            raise ApiError(400, str(error), param, "context_length_exceeded") from None
        except (UserError, ValueError) as error:
            raise ApiError(400, str(error), param) from None
        return [
            Request(sequence, i, echo=echo)
            for i, (sequence, (_, echo)) in enumerate(zip(sequences, wanted, strict=True))
        ]

    async def create_completion(
        self, http_request: HttpRequest, kind: type[ChatRequest] | type[CompletionRequest]
    ) -> Response:
        prepared = await self.run_in_worker(http_request, self.prepare_completion, kind)
        inbox = self.submit_work(prepared.served, prepared.work)
        builder_class = ChatResponse if kind is ChatRequest else CompletionResponse
        builder = builder_class(
            prepared.served.name, prepared.served.tokenizer, list(prepared.work), prepared.wants_usage
        )
        if prepared.stream:
            return EventStream(self, http_request, builder, inbox, prepared.headers)
        with self.abort_on_disconnect(http_request, builder.requests, inbox):
            async for event in events_until_done(inbox, len(builder.requests)):
                if event is None:
                    return Response(status_code=499)  # the client has disconnected
                if event.finish_reason == "error":
                    raise ApiError(500, MODEL_FAILED)
            content = await self.worker_pools.responses.run(builder.body)
            return Response(content, headers=prepared.headers, media_type="application/json")

    async def create_embeddings(self, http_request: HttpRequest) -> Response:
        prepared = await self.run_in_worker(http_request, self.prepare_embeddings)
        inbox = self.submit_work(prepared.served, prepared.work)
        with self.abort_on_disconnect(http_request, prepared.work, inbox):
            event = await inbox.get()
        if event is None:
            return Response(status_code=499)
        if event.finish_reason == "error":
            raise ApiError(500, MODEL_FAILED)
        content = await self.worker_pools.responses.run(
            embedding_json, prepared.body, prepared.served, prepared.work[0]
        )
        return Response(content, headers=prepared.headers, media_type="application/json")

    async def run_in_worker(
        self, http_request: HttpRequest, prepare: Callable[..., PreparedRequest], *more: Any
    ) -> PreparedRequest:
        """Run `prepare` on the body in the worker pool for its size. The bytes are not kept afterwards."""
        raw = b"".join([part async for part in http_request.stream()])
        return await self.worker_pools.for_body(raw).run(prepare, raw, *more)

    def submit_work(self, served: ServedModel, work: Collection[WorkItem]) -> "asyncio.Queue[TokenEvent | None]":
        """Queue work in the engine; return the inbox that receives its events. Raises ApiError 400 or 429."""
        inbox: asyncio.Queue[TokenEvent | None] = asyncio.Queue()
        for work_item in work:
            work_item.inbox = inbox
        try:
            with reject_when_full():
                self.engine.add_requests(served.name, work)
        except ValueError as error:
            raise ApiError(400, str(error), "num_beams" if str(error).startswith("num_beams") else "n") from None
        return inbox

    @contextlib.contextmanager
    def abort_on_disconnect(
        self, http_request: HttpRequest, requests: Collection[WorkItem], inbox: "asyncio.Queue[TokenEvent | None]"
    ) -> Any:
        """Abort the requests when the client disconnects, with None put into the inbox, and when the block ends."""

        async def wait_for_disconnect() -> None:
            while (await http_request.receive())["type"] != "http.disconnect":
                pass
            self.engine.abort(requests)
            inbox.put_nowait(None)

        watcher = asyncio.ensure_future(wait_for_disconnect())
        try:
            yield
        finally:
            watcher.cancel()
            self.engine.abort(requests)


@contextlib.contextmanager
def reject_when_full() -> Any:
    """Turn the engine's QueueFull into ApiError 429."""
    try:
        yield
    except QueueFull as error:
        headers = {"Retry-After": str(error.retry_after)}
        raise ApiError(429, str(error), None, "rate_limit_exceeded", headers) from None


async def events_until_done(
    inbox: "asyncio.Queue[TokenEvent | None]", answers: int
) -> AsyncIterator[TokenEvent | None]:
    """Yield events until all answers have ended, one has failed, or the client has disconnected (None)."""
    while answers:
        event = await inbox.get()
        yield event
        if event is None or event.finish_reason == "error":
            return
        answers -= bool(event.finish_reason)


class EventStream(StreamingResponse):
    """A streamed response. Its requests are aborted however sending ends, even if it never begins."""

    def __init__(
        self,
        service: CompletionService,
        http_request: HttpRequest,
        builder: ResponseBuilder,
        inbox: "asyncio.Queue[TokenEvent | None]",
        headers: Any,
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(self._events(builder, inbox), headers=headers, media_type="text/event-stream")
        self.abort_on_disconnect = lambda: service.abort_on_disconnect(http_request, builder.requests, inbox)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self.abort_on_disconnect():
            await super().__call__(scope, receive, send)

    async def _events(self, builder: ResponseBuilder, inbox: "asyncio.Queue[TokenEvent | None]") -> AsyncIterator[str]:
        yield "".join(builder.first_events())
        async for event in events_until_done(inbox, len(builder.requests)):
            if event is None:
                return
            if event.finish_reason == "error":
                yield sse_event(
                    {"error": {"message": MODEL_FAILED, "type": "server_error", "param": None, "code": None}}
                )
                return
            if text := "".join(builder.events(event)):
                yield text
        yield "".join(builder.last_events())


def split_prompts(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts as a list; the field `prompt` is a text, several, token ids, or several lists of them."""
    prompt: Any = body.prompt
    is_list = isinstance(prompt, list) and not isinstance(prompt[0], int)
    return prompt if is_list else [prompt]


def ignored_fields_header(body: AnyRequest) -> dict[str, str]:
    """The header x-ignored-fields: names of unsupported fields whose value is not a default."""
    unsupported = [name for name, value in (body.model_extra or {}).items() if value not in UNSUPPORTED_DEFAULTS]
    names = [name for name in unsupported if name.isascii() and name.replace("-", "_").isidentifier()]
    return {"x-ignored-fields": ", ".join(names[:MAX_IGNORED_SHOWN])[:1000]} if names else {}
