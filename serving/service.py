"""Process a request: parse and tokenise its body, queue it in a scheduler, and send the response.

    body -> worker thread: prepare -> Scheduler -> inbox of TokenEvents -> JSON response or EventStream

Three kinds of threads. The event loop receives and sends. Worker threads parse and tokenise bodies and build responses,
which keeps the event loop free. One thread steps the schedulers of all models in turn and is the only one that uses
the models; it delivers the events of each step with one call into the event loop.
When a client disconnects, its requests are aborted.
Called by app.py. Read next: requests.py, scheduler.py, responses.py, embeddings.py.
"""

import asyncio
import contextlib
import sys
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from fastapi import Response
from fastapi.responses import StreamingResponse

from serving.chat_schemas import ChatRequest
from serving.config import ServeConfig
from serving.embeddings import EmbeddingRequest, EmbeddingResponse
from serving.errors import MODEL_FAILED, ApiError
from serving.middleware import SMALL_BODY_BYTES
from serving.models import ServedModel
from serving.requests import ignored_fields_header, make_requests, parse_body
from serving.responses import ChatResponse, CompletionResponse, ResponseBuilder, sse_event
from serving.scheduler import QueueFull, Scheduler, TokenEvent, WorkItem, abort
from serving.schemas import CompletionRequest

PAUSE_RATIO = 3
AnyRequest = ChatRequest | CompletionRequest | EmbeddingRequest
Inbox = asyncio.Queue[TokenEvent | None]  # None: the client has disconnected
T = TypeVar("T")


class CompletionService:
    """Processes HTTP requests with one scheduler per model, whose steps one thread runs."""

    def __init__(self, models: dict[str, ServedModel], config: ServeConfig) -> None:
        self.models, self.strict_model_names = models, config.strict_model_names
        self.schedulers = {
            name: Scheduler(served.model, served.tokenizer, config.max_num_seqs, config.max_queue, served.decoder)
            for name, served in models.items()
        }
        self.loop: asyncio.AbstractEventLoop | None = None
        self.work_added = threading.Event()
        self.is_stopping = False
        self.thread = threading.Thread(target=self._run_steps, name="scheduler", daemon=True)
        max_waiting = config.max_num_seqs + config.max_queue
        self.small_bodies, self.large_bodies = WorkerPool(4, max_waiting), WorkerPool(1, max_waiting, PAUSE_RATIO)
        self.response_pool = WorkerPool(2, sys.maxsize)  # the schedulers' queues bound their number

    # ---- the thread that uses the models ----
    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread; it delivers events in `loop`."""
        self.loop = loop
        self.thread.start()

    def stop(self) -> None:
        """End the thread between two steps; unfinished requests get the finish reason "error"."""
        self.is_stopping = True
        self.work_added.set()
        if self.thread.is_alive():
            self.thread.join()
        for pool in (self.small_bodies, self.large_bodies, self.response_pool):
            pool.executor.shutdown(wait=False, cancel_futures=True)

    def _run_steps(self) -> None:
        with next(iter(self.models.values())).autocast():  # the same for all models
            while self._wait_for_work():
                for scheduler in self.schedulers.values():
                    if scheduler.running or scheduler.waiting:
                        self._deliver(scheduler.step())
                    if scheduler.jobs:
                        self._deliver(scheduler.step_job())
        for scheduler in self.schedulers.values():
            self._deliver(scheduler.fail(including_waiting=True))

    def _wait_for_work(self) -> bool:
        """Wait until a scheduler has work; False when the server stops."""
        while not self.is_stopping and not any(scheduler.has_work for scheduler in self.schedulers.values()):
            self.work_added.wait()
            self.work_added.clear()  # before the next check, so that no call of `set` is missed
        return not self.is_stopping

    def _deliver(self, events: list[TokenEvent]) -> None:
        """Put the events into the inboxes of their requests, in the event loop's thread."""
        if events := [event for event in events if not event.request.aborted]:
            with contextlib.suppress(RuntimeError):  # the event loop is closed: no client is left
                assert self.loop is not None
                self.loop.call_soon_threadsafe(lambda: [event.request.inbox.put_nowait(event) for event in events])

    def status(self) -> dict[str, dict[str, int]]:
        """Return per model the running rows, the waiting rows and the limit of each."""
        return {name: scheduler.status() for name, scheduler in self.schedulers.items()}

    # ---- one request ----
    async def respond(self, http_request: HttpRequest, kind: type[AnyRequest]) -> Response:
        """Return the response to a request. Raises ApiError and QueueFull, which app.py turns into responses."""
        raw = b"".join([part async for part in http_request.stream()])
        pool = self.small_bodies if len(raw) <= SMALL_BODY_BYTES else self.large_bodies
        response = await pool.run(self.prepare, raw, kind)
        del raw
        inbox = self.submit(response.served.name, response.work)
        if isinstance(response, ResponseBuilder) and response.stream:
            return EventStream(response, inbox, http_request)
        with abort_on_disconnect(http_request, response.work, inbox):
            async for event in events_until_done(inbox, len(response.work)):
                if event is None:
                    return Response(status_code=499)  # the client has disconnected
                if event.finish_reason == "error":
                    raise ApiError(500, MODEL_FAILED)
            content = await self.response_pool.run(response.body)
            return Response(content, headers=response.headers, media_type="application/json")

    def prepare(self, raw: bytes, kind: type[AnyRequest]) -> ResponseBuilder | EmbeddingResponse:
        """Parse, check and tokenise a request; return its response, not queued yet. Slow for long bodies.

        Raises ApiError; QueueFull without tokenising.
        """
        body = parse_body(raw, kind)
        served, headers = self.select_model(body)
        self.schedulers[served.name].check_capacity()
        if isinstance(body, EmbeddingRequest):
            return EmbeddingResponse(served, headers, body)
        work = make_requests(body, served)
        if isinstance(body, ChatRequest):
            return ChatResponse(served, headers, body, work)
        return CompletionResponse(served, headers, body, work)

    def select_model(self, body: AnyRequest) -> tuple[ServedModel, dict[str, str]]:
        """Return the model for a request and the response headers x-ignored-fields and x-served-model, where needed.

        A server of one model uses it for unknown model names too, unless `strict_model_names` is set.
        """
        headers = ignored_fields_header(body)
        if body.model and body.model not in self.models and len(self.models) == 1 and not self.strict_model_names:
            served = self.find_model(None)
            return served, {**headers, "x-served-model": urllib.parse.quote(served.name)}
        return self.find_model(body.model), headers

    def find_model(self, name: str | None) -> ServedModel:
        name = name or next(iter(self.models))
        if name not in self.models:
            names = ", ".join(self.models)
            raise ApiError(404, f"no model {name[:200]!r} on this server: use {names}", "model", "model_not_found")
        return self.models[name]

    def submit(self, name: str, work: Collection[WorkItem]) -> Inbox:
        """Queue work for a model; return the inbox that receives its events. Raises ApiError 400 and QueueFull."""
        if self.is_stopping:
            raise QueueFull(retry_after=1)
        inbox: Inbox = asyncio.Queue()
        for item in work:
            item.inbox = inbox
        try:
            self.schedulers[name].add(work)
        except ValueError as error:
            raise ApiError(400, str(error), "num_beams" if str(error).startswith("num_beams") else "n") from None
        self.work_added.set()
        return inbox


@contextlib.contextmanager
def abort_on_disconnect(http_request: HttpRequest, work: Collection[WorkItem], inbox: Inbox) -> Iterator[None]:
    """Abort the requests when the client disconnects, with None put into the inbox, and when the block ends."""

    async def wait_for_disconnect() -> None:
        while (await http_request.receive())["type"] != "http.disconnect":
            pass
        abort(work)
        inbox.put_nowait(None)

    watcher = asyncio.ensure_future(wait_for_disconnect())
    try:
        yield
    finally:
        watcher.cancel()
        abort(work)


async def events_until_done(inbox: Inbox, answers: int) -> AsyncIterator[TokenEvent | None]:
    """Yield events until all answers have ended, one has failed, or the client has disconnected (None)."""
    while answers:
        event = await inbox.get()
        yield event
        if event is None or event.finish_reason == "error":
            return
        answers -= bool(event.finish_reason)


class EventStream(StreamingResponse):
    """A streamed response. Its requests are aborted however sending ends, even if it never begins."""

    def __init__(self, builder: ResponseBuilder, inbox: Inbox, http_request: HttpRequest) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **builder.headers}
        super().__init__(self._events(builder, inbox), headers=headers, media_type="text/event-stream")
        self.aborting = abort_on_disconnect(http_request, builder.work, inbox)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self.aborting:
            await super().__call__(scope, receive, send)

    async def _events(self, builder: ResponseBuilder, inbox: Inbox) -> AsyncIterator[str]:
        yield builder.first_event()
        async for event in events_until_done(inbox, len(builder.work)):
            if event is None:
                return
            if event.finish_reason == "error":
                error = {"message": MODEL_FAILED, "type": "server_error", "param": None, "code": None}
                yield sse_event({"error": error})
                return
            if text := builder.event(event):
                yield text
        yield builder.last_events()


class WorkerPool:
    """Worker threads with a bounded queue.

    Four threads parse small bodies and one parses large ones, so a small request never waits behind large ones. Python
    runs one thread at a time (GIL), so parsing many large bodies would starve the schedulers' thread: after each body,
    that thread sleeps `pause` times as long as it has worked.
    """

    def __init__(self, workers: int, max_waiting: int, pause: float = 0) -> None:
        self.executor = ThreadPoolExecutor(workers)
        self.max_waiting, self.waiting, self.pause = max_waiting, 0, pause
        self.ready_at = 0.0  # when the pause ends

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Return the result of the function. Raises ApiError 429 if the queue is full."""
        if self.waiting >= self.max_waiting:
            message = "too many requests are being read: try again in 1 s"
            raise ApiError(429, message, headers={"Retry-After": "1"})
        self.waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.executor, self._run_and_pause, function, arguments)
        finally:
            self.waiting -= 1

    def _run_and_pause(self, function: Callable[..., T], arguments: tuple[object, ...]) -> T:
        time.sleep(max(0.0, self.ready_at - time.monotonic()))
        started = time.thread_time()
        try:
            return function(*arguments)
        finally:
            self.ready_at = time.monotonic() + self.pause * (time.thread_time() - started)
