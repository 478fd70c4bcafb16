"""Continuous batching: one engine thread decodes all running requests of a model as rows of one batch.

    waiting  ->  admit: prefill their prompts in one pass  ->  decode: one token per row and step  ->  finished
                 (new requests join between two steps)         (a finished or aborted request frees its rows at once)

Each step reads the weights once for all rows, so throughput grows with the batch size. Each model has a `DecodeBatch`
(model/generate.py) of at most `max_num_seqs` rows and a queue of at most `max_queue`. The thread runs one step of each
model in turn. A beam search takes one row per beam; its rows share the forward passes with all other rows. Between two
decode steps, a job (embeddings.py) runs one step. The engine does not depend on HTTP. `add_requests` queues requests;
after each step, one call of `on_events` delivers all its events.
Called by service.py. Read next: ../model/generate.py (DecodeBatch), service.py (the caller).
"""

import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from model.completion import Sequence
from model.generate import DecodeBatch
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer

# Limit of padded prompt tokens per prefill pass, since it delays the running requests. A single prompt may be longer.
PREFILL_TOKENS = 2048
MAX_RETRY_AFTER = 60  # upper bound of Retry-After, in seconds


class QueueFull(Exception):
    """The queue is full. `retry_after`: estimated seconds until a slot is free."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full: try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(eq=False)
class Request:
    """One answer to generate. `inbox` is for the caller; the engine does not use it."""

    sequence: Sequence
    index: int  # index among the answers of one HTTP request
    inbox: Any = None
    aborted: bool = False
    started_at: float = 0.0
    echo: str | list[int] | None = None  # the prompt, text or ids, if the response repeats it before the answer


class EngineJob(Protocol):
    """Work on a model other than decoding (embeddings), in steps short enough to run between two decode steps."""

    inbox: Any
    aborted: bool

    def step(self, model: Transformer) -> bool:
        """Run the next step, in the engine thread; return True if the job is complete."""


WorkItem = Request | EngineJob


@dataclass
class TokenEvent:
    """Output of one step for a request. `finish_reason`: "" while it is running, "error" if the model failed."""

    request: Any  # a Request or an EngineJob
    text: str
    finish_reason: str
    num_tokens: int  # generated so far


def count_seqs(work: Iterable[WorkItem]) -> int:
    """Return the number of batch rows of these items, one per request or beam. A job takes no row but counts as one."""
    return sum(item.sequence.settings.num_beams if isinstance(item, Request) else 1 for item in work)


class Scheduler:
    """The batch, the running and waiting requests and the jobs of one model."""

    def __init__(self, model: Transformer, tokenizer: ChatTokenizer) -> None:
        self.batch = DecodeBatch(model, tokenizer)
        self.running: dict[Sequence, Request] = {}
        self.waiting: deque[Request] = deque()
        self.jobs: deque[EngineJob] = deque()

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting or self.jobs)


class InferenceEngine:
    """Decodes the requests of all models. Per model, at most `max_num_seqs` rows run and `max_queue` more rows wait."""

    def __init__(
        self,
        models: dict[str, tuple[Transformer, ChatTokenizer]],
        max_num_seqs: int,
        max_queue: int,
        autocast_context: Callable[[], AbstractContextManager[Any]],
        on_events: Callable[[list[TokenEvent]], None],
    ) -> None:
        """`on_events` is called in the engine thread, which runs inside the context that `autocast_context` returns."""
        self.schedulers = {name: Scheduler(*pair) for name, pair in models.items()}
        self.max_num_seqs, self.max_queue = max_num_seqs, max_queue
        self.autocast_context, self.on_events = autocast_context, on_events
        self.changed = threading.Condition()
        self.is_stopping = False
        self.seconds_per_request = 1.0  # exponential moving average
        self.thread = threading.Thread(target=self._run_loop, name="engine", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """End the thread between two steps; unfinished requests get the finish reason "error"."""
        with self.changed:
            self.is_stopping = True
            self.changed.notify()
        if self.thread.is_alive():
            self.thread.join()

    def check_capacity(self, name: str) -> None:
        """Raise QueueFull if the queue is full. A caller can thus reject a request before tokenising its prompt."""
        with self.changed:
            self._check_capacity(self.schedulers[name], 1)

    def _check_capacity(self, scheduler: Scheduler, num_new: int) -> None:
        queued = count_seqs(scheduler.waiting) + len(scheduler.jobs) + num_new
        if self.is_stopping or count_seqs(scheduler.running.values()) + queued > self.max_num_seqs + self.max_queue:
            raise QueueFull(
                min(MAX_RETRY_AFTER, max(1, math.ceil(queued / self.max_num_seqs * self.seconds_per_request)))
            )

    def add_requests(self, name: str, work: Collection[WorkItem]) -> None:
        """Queue requests or jobs, all or none. A job counts as one row of the queue.

        Raises QueueFull if the queue is full, ValueError for work that never fits: a beam search of more than
        `max_num_seqs` beams, or more rows than `max_num_seqs + max_queue`.
        """
        scheduler = self.schedulers[name]
        with self.changed:
            capacity, num_new = self.max_num_seqs + self.max_queue, count_seqs(work)
            max_beams = max((count_seqs([item]) for item in work), default=0)
            if max_beams > self.max_num_seqs:
                raise ValueError(f"num_beams {max_beams}: this server decodes at most {self.max_num_seqs} rows at once")
            if num_new > capacity:
                raise ValueError(f"{num_new} answers in one request are too many: at most {capacity} are accepted")
            self._check_capacity(scheduler, num_new)
            scheduler.waiting.extend(item for item in work if isinstance(item, Request))
            scheduler.jobs.extend(item for item in work if not isinstance(item, Request))
            self.changed.notify()

    def abort(self, requests: Collection[WorkItem]) -> None:
        """Abort requests and jobs; the next step frees their rows first. A no-op for finished ones."""
        with self.changed:
            for request in requests:
                request.aborted = True
            for scheduler in self.schedulers.values():
                if any(request.aborted for request in scheduler.waiting):
                    scheduler.waiting = deque(request for request in scheduler.waiting if not request.aborted)
                if any(job.aborted for job in scheduler.jobs):
                    scheduler.jobs = deque(job for job in scheduler.jobs if not job.aborted)

    def status(self) -> dict[str, dict[str, int]]:
        """Return per model the running rows, the waiting rows and the limit of each."""
        with self.changed:
            return {
                name: {
                    "running": count_seqs(request for request in scheduler.running.values() if not request.aborted),
                    "waiting": count_seqs(scheduler.waiting) + len(scheduler.jobs),
                    "seats": self.max_num_seqs,
                    "queue": self.max_queue,
                }
                for name, scheduler in self.schedulers.items()
            }

    def _run_loop(self) -> None:
        with self.autocast_context():
            while self._wait_for_work():
                for scheduler in self.schedulers.values():
                    if scheduler.running or scheduler.waiting:
                        self._emit(self._step(scheduler))
                    if scheduler.jobs:
                        self._emit(self._step_job(scheduler))
            for scheduler in self.schedulers.values():
                self._emit(
                    self._fail_all(scheduler, [*scheduler.running.values(), *scheduler.waiting, *scheduler.jobs])
                )

    def _wait_for_work(self) -> bool:
        with self.changed:
            self.changed.wait_for(
                lambda: self.is_stopping or any(scheduler.has_work for scheduler in self.schedulers.values())
            )
            return not self.is_stopping

    def _step(self, scheduler: Scheduler) -> list[TokenEvent]:
        """Drop aborted requests, admit waiting ones, decode one token per running request."""
        with self.changed:
            aborted = [request for request in scheduler.running.values() if request.aborted]
            for request in aborted:
                del scheduler.running[request.sequence]
            admitted = self._admit(scheduler)
        try:
            for request in aborted:
                scheduler.batch.remove(request.sequence)
            pieces = scheduler.batch.prefill([request.sequence for request in admitted]) if admitted else []
            pieces += scheduler.batch.decode() if scheduler.batch.sequences else []
        except Exception:  # a bug or out of memory: the running requests fail, the server continues
            traceback.print_exc()
            scheduler.batch = DecodeBatch(scheduler.batch.model, scheduler.batch.tokenizer)
            return self._fail_all(scheduler, list(scheduler.running.values()))
        return self._collect_events(scheduler, pieces)

    def _step_job(self, scheduler: Scheduler) -> list[TokenEvent]:
        """Run one step of the first job; an unfinished job then goes to the end of the queue."""
        with self.changed:
            job = scheduler.jobs[0] if scheduler.jobs else None
        if job is None:  # aborted
            return []
        try:
            finish_reason = "stop" if job.step(scheduler.batch.model) else ""
        except Exception:  # only this job fails
            traceback.print_exc()
            finish_reason = "error"
        with self.changed:
            scheduler.jobs = deque(other for other in scheduler.jobs if other is not job)
            if not finish_reason and not job.aborted:
                scheduler.jobs.append(job)
        return [TokenEvent(job, "", finish_reason, 0)] if finish_reason else []

    def _admit(self, scheduler: Scheduler) -> list[Request]:
        """Admit waiting requests in order, while rows are free and their padded prompts fit into PREFILL_TOKENS."""
        admitted: list[Request] = []
        width = 0
        while (
            scheduler.waiting
            and count_seqs(scheduler.running.values()) + count_seqs([scheduler.waiting[0]]) <= self.max_num_seqs
        ):
            width = max(width, len(scheduler.waiting[0].sequence.prompt))
            if admitted and width * (len(admitted) + 1) > PREFILL_TOKENS:
                break
            request = scheduler.waiting.popleft()
            request.started_at = time.monotonic()
            scheduler.running[request.sequence] = request
            admitted.append(request)
        return admitted

    def _collect_events(self, scheduler: Scheduler, pieces: list[tuple[Sequence, str]]) -> list[TokenEvent]:
        """Return one event per sequence. A new sequence has two pieces, one from prefill and one from decode."""
        texts: dict[Sequence, str] = {}
        for sequence, text in pieces:
            texts[sequence] = texts.get(sequence, "") + text
        events = []
        for sequence, text in texts.items():
            request, finish_reason = scheduler.running[sequence], sequence.completion.finish_reason
            if finish_reason:
                self.seconds_per_request += 0.1 * (time.monotonic() - request.started_at - self.seconds_per_request)
                with self.changed:
                    del scheduler.running[sequence]
            events.append(TokenEvent(request, text, finish_reason, len(sequence.completion.ids)))
        return events

    def _fail_all(self, scheduler: Scheduler, requests: Collection[WorkItem]) -> list[TokenEvent]:
        with self.changed:
            scheduler.running.clear()
            if self.is_stopping:
                scheduler.waiting.clear()
                scheduler.jobs.clear()
        return [TokenEvent(request, "", "error", 0) for request in requests]

    def _emit(self, events: list[TokenEvent]) -> None:
        if events:
            self.on_events([item for item in events if not item.request.aborted])
