"""Answers for many at once: one thread that decodes whatever waits, row beside row.

    waiting ->  join: their prompts are read in one pass  ->  step, step, step: one token for every row  ->  done
                      (new ones join between two tokens)            (who ends or leaves frees the place at once)

A weight that was fetched from memory for one row serves all of them: that is where the speed comes from. Each model has
a `Batch` (model/generate.py) with a bounded number of places and a bounded queue; the models take turns, token by
token. A beam search takes a place per beam and is decoded in the same passes as all other rows. A job (embeddings.py)
does one step between two tokens. Knows nothing of HTTP: requests come in by `submit`, and every turn's news goes out in
one call of `deliver`.
Called by service.py. Read next: ../model/generate.py (Batch), service.py (who waits).
"""

import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from model.completion import Row
from model.generate import Batch
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer

PREFILL_TOKENS = 2048  # read in one pass before those who are being answered get their next token
LONGEST_WAIT = 60  # seconds that a client is told to wait, at most


class Full(Exception):
    """The queue has no room. `retry_after`: seconds after which it should."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"all places are taken and the queue is full: try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(eq=False)
class Ticket:
    """One answer that somebody waits for. `inbox` is the caller's own: the engine only carries it along."""

    row: Row
    index: int  # among the answers of its request
    inbox: Any = None
    gone: bool = False  # nobody waits any longer
    started: float = 0.0
    echo: str | list[int] | None = None  # the prompt as it was sent, where the answer is to begin with it


class Job(Protocol):
    """Work on a model other than decoding (embeddings), in steps short enough to run between two tokens."""

    inbox: Any
    gone: bool

    def step(self, model: Transformer) -> bool:
        """Compute the next part, in the engine's thread; returns whether it was the last."""


Work = Ticket | Job


@dataclass
class News:
    """What a turn brought for a ticket. `finish_reason`: "" while it goes on, "error" when the model failed."""

    ticket: Any  # a Ticket or a Job
    text: str
    finish_reason: str
    tokens: int  # of the answer so far


def rows_of(work: Iterable[Work]) -> int:
    """The rows of a batch that answers take: one each, one per beam of a beam search. A job counts as one."""
    return sum(len(item.row.slots) if isinstance(item, Ticket) else 1 for item in work)


class _Table:
    """A model, its batch, and who waits for a place in it."""

    def __init__(self, model: Transformer, tokenizer: ChatTokenizer) -> None:
        self.batch = Batch(model, tokenizer)
        self.seated: dict[Row, Ticket] = {}
        self.waiting: deque[Ticket] = deque()
        self.jobs: deque[Job] = deque()

    @property
    def busy(self) -> bool:
        return bool(self.seated or self.waiting or self.jobs)


class Engine:
    """`seats` rows per model are decoded at once, `queue` more may wait. A beam search counts as one row per beam."""

    def __init__(
        self,
        models: dict[str, tuple[Transformer, ChatTokenizer]],
        seats: int,
        queue: int,
        number_format: Callable[[], AbstractContextManager[Any]],
        deliver: Callable[[list[News]], None],
    ) -> None:
        """`deliver` is called from the engine's thread; `number_format` gives the autocast context to compute in."""
        self.tables = {name: _Table(*pair) for name, pair in models.items()}
        self.seats, self.queue = seats, queue
        self.number_format, self.deliver = number_format, deliver
        self.changed = threading.Condition()
        self.stopping = False
        self.seconds_each = 1.0  # that an answer took, on average of late
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Ends the thread between two tokens; whoever still waits is told "error"."""
        with self.changed:
            self.stopping = True
            self.changed.notify()
        if self.thread.is_alive():
            self.thread.join()

    def check_room(self, name: str) -> None:
        """Raises Full where not one more answer would be accepted: no need to tokenise its prompt."""
        with self.changed:
            self._check_room(self.tables[name], 1)

    def _check_room(self, table: _Table, wanted: int) -> None:
        queued = rows_of(table.waiting) + len(table.jobs) + wanted
        if self.stopping or rows_of(table.seated.values()) + queued > self.seats + self.queue:
            raise Full(min(LONGEST_WAIT, max(1, math.ceil(queued / self.seats * self.seconds_each))))

    def submit(self, name: str, work: Sequence[Work]) -> None:
        """Take a request's answers or jobs in, all or none. A job takes a place in the queue.

        Raises Full when the queue is full, ValueError for a request that never fits: more beams than `seats`, or more
        rows than `seats` and the queue have together.
        """
        table = self.tables[name]
        with self.changed:
            places, wanted = self.seats + self.queue, rows_of(work)
            most_beams = max((rows_of([item]) for item in work), default=0)
            if most_beams > self.seats:
                raise ValueError(f"num_beams {most_beams}: at most {self.seats} rows are decoded at once here")
            if wanted > places:
                raise ValueError(f"{wanted} answers at once are too many: at most {places} are accepted")
            self._check_room(table, wanted)
            table.waiting.extend(item for item in work if isinstance(item, Ticket))
            table.jobs.extend(item for item in work if not isinstance(item, Ticket))
            self.changed.notify()

    def cancel(self, tickets: Sequence[Work]) -> None:
        """Nobody waits for these any longer: their places are free before the next token. Finished ones do not mind."""
        with self.changed:
            for ticket in tickets:
                ticket.gone = True
            for table in self.tables.values():
                if any(ticket.gone for ticket in table.waiting):
                    table.waiting = deque(ticket for ticket in table.waiting if not ticket.gone)
                if any(job.gone for job in table.jobs):
                    table.jobs = deque(job for job in table.jobs if not job.gone)

    def status(self) -> dict[str, dict[str, int]]:
        """Per model: rows being answered, rows waiting, and how many of each there may be."""
        with self.changed:
            return {
                name: {
                    "running": rows_of(ticket for ticket in table.seated.values() if not ticket.gone),
                    "waiting": rows_of(table.waiting) + len(table.jobs),
                    "seats": self.seats,
                    "queue": self.queue,
                }
                for name, table in self.tables.items()
            }

    def _run(self) -> None:
        with self.number_format():
            while self._work_or_stop():
                for table in self.tables.values():
                    if table.seated or table.waiting:
                        self._tell(self._turn(table))
                    if table.jobs:
                        self._tell(self._step_job(table))
            for table in self.tables.values():
                self._tell(self._fail(table, [*table.seated.values(), *table.waiting, *table.jobs]))

    def _work_or_stop(self) -> bool:
        with self.changed:
            self.changed.wait_for(lambda: self.stopping or any(t.busy for t in self.tables.values()))
            return not self.stopping

    def _turn(self, table: _Table) -> list[News]:
        """Let the gone leave and the next ones join; one more token for everybody."""
        with self.changed:
            gone = [ticket for ticket in table.seated.values() if ticket.gone]
            for ticket in gone:
                del table.seated[ticket.row]
            arrived = self._admit(table)
        try:
            for ticket in gone:
                table.batch.leave(ticket.row)
            pieces = table.batch.join([ticket.row for ticket in arrived]) if arrived else []
            pieces += table.batch.step() if table.batch.rows else []
        except Exception:  # a fault of ours, or no memory: the requests fail, the server stays
            traceback.print_exc()
            table.batch = Batch(table.batch.model, table.batch.tokenizer)
            return self._fail(table, list(table.seated.values()))
        return self._news(table, pieces)

    def _step_job(self, table: _Table) -> list[News]:
        """One step of the first job, which then moves to the end of the queue."""
        with self.changed:
            job = table.jobs[0] if table.jobs else None
        if job is None:  # cancelled
            return []
        try:
            ended = "stop" if job.step(table.batch.model) else ""
        except Exception:  # only this job fails
            traceback.print_exc()
            ended = "error"
        with self.changed:
            table.jobs = deque(other for other in table.jobs if other is not job)
            if not ended and not job.gone:
                table.jobs.append(job)
        return [News(job, "", ended, 0)] if ended else []

    def _admit(self, table: _Table) -> list[Ticket]:
        """Those who get a place now: in order, as many as there are places, and not too much to read at once."""
        arrived: list[Ticket] = []
        width = 0
        while table.waiting and rows_of(table.seated.values()) + rows_of([table.waiting[0]]) <= self.seats:
            width = max(width, len(table.waiting[0].row.prompt))
            if arrived and width * (len(arrived) + 1) > PREFILL_TOKENS:
                break
            ticket = table.waiting.popleft()
            ticket.started = time.monotonic()
            table.seated[ticket.row] = ticket
            arrived.append(ticket)
        return arrived

    def _news(self, table: _Table, pieces: list[tuple[Row, str]]) -> list[News]:
        """One entry per row, though one that has just joined has drawn two tokens."""
        texts: dict[Row, str] = {}
        for row, text in pieces:
            texts[row] = texts.get(row, "") + text
        news = []
        for row, text in texts.items():
            ticket, reason = table.seated[row], row.answer.finish_reason
            if reason:
                self.seconds_each += 0.1 * (time.monotonic() - ticket.started - self.seconds_each)
                with self.changed:
                    del table.seated[row]
            news.append(News(ticket, text, reason, len(row.answer.ids)))
        return news

    def _fail(self, table: _Table, tickets: Sequence[Work]) -> list[News]:
        with self.changed:
            table.seated.clear()
            if self.stopping:
                table.waiting.clear()
                table.jobs.clear()
        return [News(ticket, "", "error", 0) for ticket in tickets]

    def _tell(self, news: list[News]) -> None:
        if news:
            self.deliver([item for item in news if not item.ticket.gone])
