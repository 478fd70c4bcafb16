"""Continuous batching: the running sequences of a model are the rows of one batch, and each step adds a token to all.

    waiting  ->  admit: prefill their prompts in one pass  ->  decode: one token per row and step  ->  finished
                 (new requests join between two steps)         (a finished or aborted request frees its rows at once)

Each step reads the weights once for all rows, so throughput grows with the batch size. A beam search takes one row per
beam; its rows share the forward passes with all other rows. Between two steps, a job (embeddings.py) runs one step.
The scheduler starts no thread: service.py calls `step` and `step_job` in a loop, one scheduler per model.
Called by service.py. Read next: ../model/generate.py (DecodeBatch), service.py (the loop).
"""

import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from model.completion import Sequence
from model.decode import DecodeModel
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
    """One answer to generate. `inbox` is for the caller; the scheduler does not use it."""

    sequence: Sequence
    index: int  # index among the answers of one HTTP request
    echo: str | list[int] | None = None  # the prompt, text or ids, if the response repeats it before the answer
    inbox: Any = None
    aborted: bool = False
    started_at: float = 0.0


class Job(Protocol):
    """Work on a model other than decoding (embeddings), in steps short enough to run between two decode steps."""

    inbox: Any
    aborted: bool

    def step(self, model: Transformer) -> bool:
        """Run the next step; return True if the job is complete."""


WorkItem = Request | Job


@dataclass
class TokenEvent:
    """Output of one step for a request. `finish_reason`: "" while it is running, "error" if the model failed."""

    request: Any  # a Request or a Job
    text: str
    finish_reason: str
    num_tokens: int = 0  # generated so far


def count_seqs(work: Iterable[WorkItem]) -> int:
    """Rows that these items take: one per sequence or beam. A job takes no row but counts as one; aborted ones as 0."""
    open_work = (item for item in work if not item.aborted)
    return sum(item.sequence.settings.num_beams if isinstance(item, Request) else 1 for item in open_work)


def abort(work: Collection[WorkItem]) -> None:
    """Abort requests and jobs: the next step frees their rows. A no-op for finished ones."""
    for item in work:
        item.aborted = True


class Scheduler:
    """The requests and jobs of one model: at most `max_num_seqs` rows run, and at most `max_queue` more wait.

    One thread calls `step`, `step_job` and `fail`. `add`, `status` and `abort` may be called from any thread meanwhile.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: ChatTokenizer,
        max_num_seqs: int,
        max_queue: int,
        decoder: DecodeModel | None = None,
    ) -> None:
        self.batch = DecodeBatch(model, tokenizer, decoder)
        self.max_num_seqs, self.max_queue = max_num_seqs, max_queue
        self.running: dict[Sequence, Request] = {}
        self.waiting: deque[Request] = deque()
        self.jobs: deque[Job] = deque()
        self.seconds_per_request = 1.0  # exponential moving average, for Retry-After
        self.lock = threading.RLock()  # guards the three collections; no step holds it while the model computes

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting or self.jobs)

    def status(self) -> dict[str, int]:
        """Return the running rows, the waiting rows and the limit of each."""
        with self.lock:
            running, waiting = count_seqs(self.running.values()), count_seqs([*self.waiting, *self.jobs])
        return {"running": running, "waiting": waiting, "seats": self.max_num_seqs, "queue": self.max_queue}

    def check_capacity(self, num_new: int = 1) -> None:
        """Raise QueueFull if `num_new` more rows do not fit now."""
        now = self.status()
        queued = now["waiting"] + num_new
        if now["running"] + queued > self.max_num_seqs + self.max_queue:
            seconds = math.ceil(queued / self.max_num_seqs * self.seconds_per_request)
            raise QueueFull(min(MAX_RETRY_AFTER, max(1, seconds)))

    def add(self, work: Collection[WorkItem]) -> None:
        """Queue requests or jobs, all or none. A job counts as one row of the queue.

        Raises QueueFull if they do not fit now, ValueError for work that never fits: a beam search of more than
        `max_num_seqs` beams, or more rows than `max_num_seqs + max_queue`.
        """
        capacity, num_new = self.max_num_seqs + self.max_queue, count_seqs(work)
        max_beams = max((count_seqs([item]) for item in work), default=0)
        if max_beams > self.max_num_seqs:
            raise ValueError(f"num_beams {max_beams}: this server decodes at most {self.max_num_seqs} rows at once")
        if num_new > capacity:
            raise ValueError(f"{num_new} answers in one request are too many: at most {capacity} are accepted")
        with self.lock:
            self.check_capacity(num_new)
            self.waiting.extend(item for item in work if isinstance(item, Request))
            self.jobs.extend(item for item in work if not isinstance(item, Request))

    def step(self) -> list[TokenEvent]:
        """Drop aborted requests, admit waiting ones, decode one token per running request."""
        with self.lock:
            aborted = [sequence for sequence, request in self.running.items() if request.aborted]
            for sequence in aborted:
                del self.running[sequence]
            admitted = self._admit()
        try:
            for sequence in aborted:
                self.batch.remove(sequence)
            pieces = self.batch.prefill([request.sequence for request in admitted]) if admitted else []
            pieces += self.batch.decode() if self.batch.sequences else []
        except Exception:  # a bug or out of memory: the running requests fail, the server continues
            traceback.print_exc()
            return self.fail()
        texts: dict[Sequence, str] = {}  # a new sequence has two pieces, one from prefill and one from decode
        for sequence, text in pieces:
            texts[sequence] = texts.get(sequence, "") + text
        return [self._event(sequence, text) for sequence, text in texts.items()]

    def step_job(self) -> list[TokenEvent]:
        """Run one step of the first job; an unfinished job then goes to the end of the queue."""
        with self.lock:
            self.jobs = deque(job for job in self.jobs if not job.aborted)
            if not self.jobs:
                return []
            job = self.jobs[0]
        try:
            finish_reason = "stop" if job.step(self.batch.model) else ""
        except Exception:  # only this job fails
            traceback.print_exc()
            finish_reason = "error"
        with self.lock:
            self.jobs.popleft()
            self.jobs.extend([] if finish_reason else [job])
        return [TokenEvent(job, "", finish_reason)] if finish_reason else []

    def fail(self, including_waiting: bool = False) -> list[TokenEvent]:
        """End the running requests, or all requests and jobs, with finish_reason "error"; start with an empty batch."""
        with self.lock:
            failed: list[WorkItem] = [*self.running.values()]
            self.running.clear()
            if including_waiting:
                failed += [*self.waiting, *self.jobs]
                self.waiting.clear()
                self.jobs.clear()
        self.batch = DecodeBatch(self.batch.model, self.batch.tokenizer, self.batch.decoder)
        return [TokenEvent(item, "", "error") for item in failed]

    def _admit(self) -> list[Request]:
        """Admit waiting requests in order, while rows are free and their padded prompts fit into PREFILL_TOKENS."""
        self.waiting = deque(request for request in self.waiting if not request.aborted)
        admitted: list[Request] = []
        num_running, width = count_seqs(self.running.values()), 0
        while self.waiting and num_running + count_seqs([self.waiting[0]]) <= self.max_num_seqs:
            width = max(width, len(self.waiting[0].sequence.prompt))
            if admitted and width * (len(admitted) + 1) > PREFILL_TOKENS:
                break
            request = self.waiting.popleft()
            request.started_at = time.monotonic()
            self.running[request.sequence] = request
            num_running += count_seqs([request])
            admitted.append(request)
        return admitted

    def _event(self, sequence: Sequence, text: str) -> TokenEvent:
        """Return the event of a sequence's new text; a finished sequence leaves `running`."""
        request, finish_reason = self.running[sequence], sequence.completion.finish_reason
        if finish_reason:
            self.seconds_per_request += 0.1 * (time.monotonic() - request.started_at - self.seconds_per_request)
            with self.lock:
                del self.running[sequence]
        return TokenEvent(request, text, finish_reason, len(sequence.completion.ids))
