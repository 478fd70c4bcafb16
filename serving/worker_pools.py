"""Worker threads: four parse, render and tokenise small bodies, one does so for large bodies, two build responses.

The event loop stays free, at most one large body is parsed at a time, and a small request never waits behind large
ones. Python runs one thread at a time (GIL), so parsing many large bodies would starve the engine thread: after each
body the thread for large bodies sleeps PAUSE_RATIO times as long as it has worked.
Called by service.py. Read next: requests.py (parsing a body).
"""

import asyncio
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from serving.errors import ApiError
from serving.middleware import SMALL_BODY_BYTES

PAUSE_RATIO = 3
T = TypeVar("T")


class WorkerPool:
    """Worker threads with a bounded queue."""

    def __init__(self, workers: int, max_waiting: int, pause: float = 0) -> None:
        self.executor = ThreadPoolExecutor(workers)
        self.max_waiting, self.waiting, self.pause = max_waiting, 0, pause
        self.ready_at = 0.0  # when the pause ends

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Return the result of the function. Raises ApiError 429 if the queue is full."""
        if self.waiting >= self.max_waiting:
            message = "too many requests are being read: try again in 1 s"
            raise ApiError(429, message, None, "rate_limit_exceeded", {"Retry-After": "1"})
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self.executor, self._run_and_pause, function, arguments
            )
        finally:
            self.waiting -= 1

    def _run_and_pause(self, function: Callable[..., T], arguments: tuple[object, ...]) -> T:
        time.sleep(max(0.0, self.ready_at - time.monotonic()))
        started = time.thread_time()
        try:
            return function(*arguments)
        finally:
            self.ready_at = time.monotonic() + self.pause * (time.thread_time() - started)


class WorkerPools:
    """The worker pools of a server: small bodies, large bodies, responses."""

    def __init__(self, max_waiting: int) -> None:
        self.small, self.large = WorkerPool(4, max_waiting), WorkerPool(1, max_waiting, PAUSE_RATIO)
        self.responses = WorkerPool(2, sys.maxsize)  # the engine's queue bounds their number

    def for_body(self, body: bytes) -> WorkerPool:
        return self.small if len(body) <= SMALL_BODY_BYTES else self.large

    def close(self) -> None:
        for worker_pool in (self.small, self.large, self.responses):
            worker_pool.executor.shutdown(wait=False, cancel_futures=True)
