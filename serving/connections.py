"""Limits of HTTP connections: their number, timeouts, header size and chunk size. Extends uvicorn's h11 protocol.

    phase      waiting for headers -> receiving the body -> responding -> waiting for headers (keep-alive)
    timeout    headers: `client_timeout`     body: `client_timeout` per MiB of `max_request_bytes`
               response: aborted if the client reads less than MIN_READ_BYTES within `client_timeout`

At `max_connections` a new connection evicts one that waits for its client: connections without a request so far first,
the oldest first. Idle connections therefore cannot block new ones, and a request is answered as long as its client
reads.
MAX_HEADER_BYTES bounds a header block. The number of chunks of a body is bounded by its size, because a body of
one-byte chunks takes longer to parse than to answer.
Called by ../serve_openai_api.py. Read next: middleware.py (checks of a request).
"""

import asyncio
import contextlib
import socket
import time
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.config import ServeConfig
from serving.errors import error_body

MAX_HEADER_BYTES = 2**14
HEADER_SLICE_BYTES = 2**12  # bytes given to the parser at once: h11 checks the bound only while headers are incomplete
KEEP_ALIVE_SECONDS = 5  # seconds between two requests of a connection
SEND_BUFFER_BYTES = 2**17  # kernel send buffer of each connection
MIN_READ_BYTES = 2**15  # bytes that a client must read within `client_timeout`
FREE_CHUNKS = 1024  # chunks of a body that may have any size
MIN_CHUNK_BYTES = 256  # minimum average size of further chunks


class BoundedConnection(h11.Connection):
    """An h11 connection that limits the number of chunks of a body."""

    chunks = chunk_bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.chunks = self.chunk_bytes = 0
        elif isinstance(event, h11.Data):
            self.chunks += 1
            self.chunk_bytes += len(event.data)
            if self.chunks > FREE_CHUNKS + self.chunk_bytes // MIN_CHUNK_BYTES:
                raise h11.RemoteProtocolError("the chunks of the body are too small")
        return event


class BoundedProtocol(H11Protocol):
    """One connection. `make_server` sets `limits` and `open_connections`, the set of all connections of the server."""

    limits: ServeConfig
    open_connections: set["BoundedProtocol"]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn = BoundedConnection(h11.SERVER, MAX_HEADER_BYTES)
        self.phase = ""  # "headers" or "body" while the server waits for the client to send
        self.phase_started_at = time.monotonic()
        self.requests = 0
        self.deadline: asyncio.TimerHandle | None = None
        self.read_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.open_connections.add(self)
        with contextlib.suppress(OSError, AttributeError):  # a transport without a socket
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        transport.set_write_buffer_limits(high=0)  # pause_writing is called as soon as one byte cannot be sent
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
        """Answer malformed HTTP with 400; close the connection if a response has already begun."""
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
        """Abort the connection and its request if the client read less than MIN_READ_BYTES since the last check."""
        if num_unread - self.transport.get_write_buffer_size() < MIN_READ_BYTES:
            self.transport.abort()
        else:
            self._wait_for_reader()

    def _update_deadline(self) -> None:
        """Start the timeout of a new phase."""
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
        """At `max_connections`, close a connection that waits for its client; False if there is none to close."""
        connections = [other for other in self.open_connections if not other.transport.is_closing()]
        if len(connections) <= self.limits.max_connections:
            return True
        waiting = [other for other in connections if other is not self and other.is_waiting_for_client]
        if waiting:
            min(waiting, key=lambda other: other.eviction_rank).transport.abort()
        return bool(waiting)

    @property
    def eviction_rank(self) -> tuple[bool, bool, bool, float]:
        """Sort key, lowest closed first: idle, then sending a body, then not reading; then unused, then oldest."""
        return self.read_deadline is not None, self.phase == "body", self.requests > 0, self.phase_started_at

    @property
    def is_waiting_for_client(self) -> bool:
        """True while no request is being answered, or while the client does not read the response."""
        return bool(self.phase) or self.read_deadline is not None


def make_server(app: Any, config: ServeConfig) -> uvicorn.Server:
    """Return a uvicorn server with these limits. It logs errors only: uvicorn warns about each malformed request."""
    protocol = type("LimitedProtocol", (BoundedProtocol,), {"limits": config, "open_connections": set()})
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            log_level="error",
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=3,
        )
    )
