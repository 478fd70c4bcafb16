"""ASGI middleware that checks the headers of a request and limits its body, without buffering streamed responses.

    403 unknown name in the Host header, or a web page whose origin is not in --cors
    401 missing or wrong key (all paths but /health)      415 body is not JSON
    413 body is too large                                 429 bodies are too large together

The content type is checked on 127.0.0.1 too: a browser lets any web page send text/plain to this machine, but sends
JSON only after a CORS preflight.
Called by app.py. Read next: connections.py (limits of connections), app.py.
"""

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.limits import ServerLimits

PATHS_WITHOUT_KEY = {"/health"}
SMALL_BODY_BYTES = 2**14  # smaller bodies are not counted: the number of connections bounds their sum
ERROR_CODES = {
    401: "invalid_api_key",
    403: "forbidden",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> bytes:
    """An error in OpenAI's shape, as ASCII: a message may quote lone surrogates."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    kind = "rate_limit_error" if status == 429 else kind
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


class RequestRejected(Exception):
    """Raised to answer a request with an error before it reaches the application."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class RequestMiddleware:
    """ASGI middleware around the application. It reads the whole body before the application runs."""

    def __init__(self, app: ASGIApp, limits: ServerLimits) -> None:
        self.app, self.limits = app, limits
        self.valid_authorizations = [f"Bearer {key}".encode() for key in limits.api_keys]
        self.hosts = None if limits.allowed_hosts is None else {name.lower() for name in limits.allowed_hosts}
        self.held_bytes = 0  # bytes of the large bodies that are being read or answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        body = bytearray()
        counted_bytes = [0]  # this request's part of `held_bytes`
        try:
            self._check_headers(scope, headers)
            if not await self._read_body(headers, receive, body, counted_bytes):
                return  # the client has disconnected
            replayed: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]
            body.clear()

            async def replay() -> MutableMapping[str, Any]:
                return replayed.pop() if replayed else await receive()

            await self.app(scope, replay, send)
        except RequestRejected as rejected:
            await reject_request(send, rejected.status, rejected.message)
        finally:
            self.held_bytes -= counted_bytes[0]

    def _check_headers(self, scope: Scope, headers: Headers) -> None:
        """Raises RequestRejected if the host, origin, key or content type is not accepted."""
        if self.hosts is not None:
            host = host_name(headers.get("host", ""))
            if host not in self.hosts:
                advice = f"start with --allowed_hosts {host}" if host else "send a Host header"
                raise RequestRejected(403, f"the Host header names {host[:200]!r}, not this server: {advice[:200]}")
            self._check_origin(scope, headers.get("origin"))
        if self.valid_authorizations and scope["path"] not in PATHS_WITHOUT_KEY:
            given = headers.get("authorization", "").encode("latin-1")
            matches = [
                hmac.compare_digest(given, expected) for expected in self.valid_authorizations
            ]  # compares with every key, in constant time
            if not any(matches):
                raise RequestRejected(401, "a valid API key is needed: send the header Authorization: Bearer KEY")
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise RequestRejected(415, f"the body must be application/json, not {kind[:200] or 'unnamed'}")

    def _check_origin(self, scope: Scope, origin: str | None) -> None:
        """Raises RequestRejected for a POST from another host's web page; browser extensions are accepted."""
        if scope["method"] != "POST" or origin is None or {origin, "*"} & set(self.limits.cors):
            return
        is_page = origin == "null" or origin.lower().startswith(("http://", "https://"))
        if is_page and host_name(origin.partition("://")[2]) not in (self.hosts or ()):
            raise RequestRejected(403, f"web pages of {origin[:200]} are not allowed: start with --cors {origin[:200]}")

    async def _read_body(self, headers: Headers, receive: Receive, body: bytearray, counted_bytes: list[int]) -> bool:
        """Read into `body`; False if the client disconnects. Raises RequestRejected once the body is too large."""
        length = headers.get("content-length", "0")
        expected = int(length) if length.isdigit() and len(length) < 20 else 0
        more = True
        while more:
            self._count_bytes(max(expected, len(body)), len(body), counted_bytes)
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self._count_bytes(len(body), len(body), counted_bytes)
        return True

    def _count_bytes(self, size: int, num_received: int, counted_bytes: list[int]) -> None:
        """Count a body of `size` bytes, `num_received` of them read. Raises RequestRejected if it is over a limit."""
        limits = self.limits
        if size > limits.max_request_bytes:
            raise RequestRejected(413, f"the request is larger than {limits.max_request_bytes} bytes")
        if size > SMALL_BODY_BYTES:
            if self.held_bytes - counted_bytes[0] + size > limits.max_queued_bytes:
                raise RequestRejected(429, "the requests in progress are too large together: try again in 1 s")
            self.held_bytes += num_received - counted_bytes[0]  # bytes received, not the announced size
            counted_bytes[0] = num_received


def host_name(authority: str) -> str:
    """The host of `host:port`, in lower case: "localhost:8000" -> "localhost", "[::1]:8000" -> "::1"; "" if invalid."""
    try:
        return urlsplit(f"//{authority}").hostname or ""
    except ValueError:
        return ""


async def reject_request(send: Callable[[Message], Awaitable[None]], status: int, message: str) -> None:
    body = error_body(status, message, code=ERROR_CODES[status])
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 429:
        headers.append((b"retry-after", b"1"))
    if status in (413, 429):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
