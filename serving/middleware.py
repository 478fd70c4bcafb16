"""ASGI middleware that checks the headers of a request and limits its body, without buffering streamed responses.

    403 unknown name in the Host header, or a web page whose origin is not in --cors
    401 missing or wrong key (all paths but /health)      415 body is not JSON
    413 body is too large                                 429 bodies are too large together

The content type is checked on 127.0.0.1 too: a browser lets any web page send text/plain to this machine, but sends
JSON only after a CORS preflight.
Called by app.py. Read next: connections.py (limits of connections), app.py.
"""

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.config import ServeConfig
from serving.errors import ApiError

PATHS_WITHOUT_KEY = {"/health"}
SMALL_BODY_BYTES = 2**14  # smaller bodies are not counted: the number of connections bounds their sum


class RequestMiddleware:
    """ASGI middleware around the application. It reads the whole body before the application runs."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self.app, self.config = app, config
        self.valid_authorizations = [f"Bearer {key}".encode() for key in config.api_keys]
        self.hosts = config.accepted_hosts
        self.held_bytes: dict[int, int] = {}  # large bodies that are being read or answered: id of the scope -> bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            headers = Headers(scope=scope)
            self._check_headers(scope, headers)
            body = await self._read_body(id(scope), headers, receive)
            if body is None:
                return  # the client has disconnected
            replayed: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
            del body  # the application frees it

            async def replay() -> Message:
                return replayed.pop() if replayed else await receive()

            await self.app(scope, replay, send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        finally:
            self.held_bytes.pop(id(scope), None)

    def _check_headers(self, scope: Scope, headers: Headers) -> None:
        """Raises ApiError if the host, origin, key or content type is not accepted."""
        if self.hosts is not None:
            host = host_name(headers.get("host", ""))
            if host not in self.hosts:
                advice = f"start with --allowed_hosts {host}" if host else "send a Host header"
                raise ApiError(403, f"the Host header names {host[:200]!r}, not this server: {advice[:200]}")
            self._check_origin(scope, headers.get("origin"))
        if self.valid_authorizations and scope["path"] not in PATHS_WITHOUT_KEY:
            given = headers.get("authorization", "").encode("latin-1")
            matches = [
                hmac.compare_digest(given, expected) for expected in self.valid_authorizations
            ]  # compares with every key, in constant time
            if not any(matches):
                message = "a valid API key is needed: send the header Authorization: Bearer KEY"
                raise ApiError(401, message, headers={"www-authenticate": "Bearer"})
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise ApiError(415, f"the body must be application/json, not {kind[:200] or 'unnamed'}")

    def _check_origin(self, scope: Scope, origin: str | None) -> None:
        """Raises ApiError for a POST from another host's web page; browser extensions are accepted."""
        if scope["method"] != "POST" or origin is None or {origin, "*"} & set(self.config.cors):
            return
        is_page = origin == "null" or origin.lower().startswith(("http://", "https://"))
        if is_page and host_name(origin.partition("://")[2]) not in (self.hosts or ()):
            raise ApiError(403, f"web pages of {origin[:200]} are not allowed: start with --cors {origin[:200]}")

    async def _read_body(self, request: int, headers: Headers, receive: Receive) -> bytes | None:
        """Return the body; None if the client disconnects. Raises ApiError once the body is too large."""
        length = headers.get("content-length", "0")
        expected = int(length) if length.isdigit() and len(length) < 20 else 0
        body, more = bytearray(), True
        while more:
            self._count_bytes(request, max(expected, len(body)), len(body))
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self._count_bytes(request, len(body), len(body))
        return bytes(body)

    def _count_bytes(self, request: int, size: int, num_received: int) -> None:
        """Count a body of `size` bytes, `num_received` of them read. Raises ApiError if it is over a limit."""
        config, close = self.config, {"connection": "close"}  # the rest of the body is not read
        if size > config.max_request_bytes:
            raise ApiError(413, f"the request is larger than {config.max_request_bytes} bytes", headers=close)
        if size > SMALL_BODY_BYTES:
            others = sum(self.held_bytes.values()) - self.held_bytes.get(request, 0)
            if others + size > config.queued_bytes_limit:
                message = "the requests in progress are too large together: try again in 1 s"
                raise ApiError(429, message, headers={"retry-after": "1", **close})
            self.held_bytes[request] = num_received  # bytes received, not the announced size


def host_name(authority: str) -> str:
    """The host of `host:port`, in lower case: "localhost:8000" -> "localhost", "[::1]:8000" -> "::1"; "" if invalid."""
    try:
        return urlsplit(f"//{authority}").hostname or ""
    except ValueError:
        return ""
