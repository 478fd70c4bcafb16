"""Connections of the server: their number, deadlines, and limits of what HTTP itself may hold. uvicorn's h11 protocol.

    waiting for headers  ->  receiving the body            ->  answering  ->  waiting for headers (keep-alive)
    `client_timeout`         as much for each MiB it may have   no limit while the client reads MIN_READ_BYTES by then

At `max_connections` a new connection takes the place of one that waits for its client: first those that have never sent
a request, the oldest first. So idle connections never keep others out, and a request is answered as long as its client
reads.
A header block is bounded by MAX_HEADER_BYTES, the number of pieces of a body by its size: a body of one-byte chunks
costs more time to take apart than to answer.
Called by ../serve_openai_api.py. Read next: middleware.py (what stands before a request).
"""

import asyncio
import contextlib
import socket
import time
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.limits import ServerLimits
from serving.middleware import error_body

MAX_HEADER_BYTES = 2**14
HEADER_SLICE_BYTES = 2**12  # bytes given to the parser at once: it bounds only header blocks that are not complete yet
KEEP_ALIVE_SECONDS = 5  # seconds between two requests of a connection
SEND_BUFFER_BYTES = 2**17  # bytes in the kernel for each connection
MIN_READ_BYTES = 2**15  # bytes that a client reads within `client_timeout`
FREE_CHUNKS = 1024  # pieces of a body, of any size
MIN_CHUNK_BYTES = 256  # that further pieces have on average, at least


class BoundedConnection(h11.Connection):
    """An h11 connection that counts the pieces of a body."""

    chunks = chunk_bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.chunks = self.chunk_bytes = 0
        elif isinstance(event, h11.Data):
            self.chunks += 1
            self.chunk_bytes += len(event.data)
            if self.chunks > FREE_CHUNKS + self.chunk_bytes // MIN_CHUNK_BYTES:
                raise h11.RemoteProtocolError("the pieces of the body are too small")
        return event


class BoundedProtocol(H11Protocol):
    """One connection. `make_server` sets `limits` and `open_connections`, all connections of the server."""

    limits: ServerLimits
    open_connections: set["BoundedProtocol"]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn = BoundedConnection(h11.SERVER, MAX_HEADER_BYTES)
        self.phase = ""  # "headers" or "body" while the server waits for the client to send
        self.phase_started_at = time.monotonic()  # when the phase began
        self.requests = 0
        self.deadline: asyncio.TimerHandle | None = None
        self.read_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.open_connections.add(self)
        with contextlib.suppress(OSError, AttributeError):  # a transport without a socket
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        transport.set_write_buffer_limits(high=0)  # pause_writing is called for any byte that the client does not take
        self._update_deadline()
        if not self._ensure_capacity():
            body = error_body(503, "too many connections: try again in 1 s", code="too_many_connections")
            head = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
            transport.write(f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
            transport.close()

    def data_received(self, data: bytes) -> None:
        while self.conn.their_state is h11.IDLE and len(data) > HEADER_SLICE_BYTES and not self.transport.is_closing():
            first, data = data[:HEADER_SLICE_BYTES], data[HEADER_SLICE_BYTES:]
            super().data_received(first)
        if not self.transport.is_closing():
            super().data_received(data)
        self._update_deadline()

    def on_response_complete(self) -> None:
        self.requests += 1
        super().on_response_complete()
        self._update_deadline()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP. Where a response has begun already, only closing is left."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self.deadline, self.read_deadline):
            if timer is not None:
                timer.cancel()
        self.open_connections.discard(self)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.read_deadline is not None:
            self.read_deadline.cancel()
            self.read_deadline = None

    def _wait_for_reader(self) -> None:
        num_unread = self.transport.get_write_buffer_size()
        self.read_deadline = self.loop.call_later(self.limits.client_timeout, self._check_reader, num_unread)

    def _check_reader(self, num_unread: int) -> None:
        """Abort the connection, and with it the request, unless the client has read enough since the last check."""
        if num_unread - self.transport.get_write_buffer_size() < MIN_READ_BYTES:
            self.transport.abort()
        else:
            self._wait_for_reader()

    def _update_deadline(self) -> None:
        """Start the deadline of a phase that has just begun."""
        state = self.conn.their_state
        phase = "headers" if state is h11.IDLE else "body" if state is h11.SEND_BODY else ""
        if phase == self.phase:
            return
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
        self.phase, self.phase_started_at = phase, time.monotonic()
        if phase and not self.transport.is_closing():
            mebibytes = max(1, self.limits.max_request_bytes // 2**20) if phase == "body" else 1
            self.deadline = self.loop.call_later(self.limits.client_timeout * mebibytes, self.transport.abort)

    def _ensure_capacity(self) -> bool:
        """Close a connection that waits for its client where there are too many; False where there is none."""
        connections = [other for other in self.open_connections if not other.transport.is_closing()]
        if len(connections) <= self.limits.max_connections:
            return True
        waiting = [other for other in connections if other is not self and other.is_waiting_for_client]
        if waiting:
            min(waiting, key=lambda other: other.eviction_rank).transport.abort()
        return bool(waiting)

    @property
    def eviction_rank(self) -> tuple[bool, bool, bool, float]:
        """The lowest is closed first: idle, then sending a body, then not reading; among them unused ones, then old."""
        return self.read_deadline is not None, self.phase == "body", self.requests > 0, self.phase_started_at

    @property
    def is_waiting_for_client(self) -> bool:
        """Nothing is being answered, or the client does not read the answer."""
        return bool(self.phase) or self.read_deadline is not None


def make_server(app: Any, limits: ServerLimits) -> uvicorn.Server:
    """uvicorn with the limits of one server; it logs errors only, since each malformed request is a warning."""
    protocol = type("LimitedProtocol", (BoundedProtocol,), {"limits": limits, "open_connections": set()})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        log_level="error",
        access_log=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=3,
    )
    return uvicorn.Server(config)
