"""What stands before every request: the key, the kind of content, the size. Plain ASGI, so that streams stay streams.

    401 without the key (all but /health)      415 a body that is not JSON      413 a body that is too large

Content types matter on 127.0.0.1 too: a web page may send text/plain to any address unasked, but not JSON.
Called by app.py. Read next: app.py.
"""

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = {"/health"}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> bytes:
    """An error in OpenAI's shape. ASCII: a message may quote half characters."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    kind = "rate_limit_error" if status == 429 else kind
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


class Gate:
    """ASGI middleware around the application."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes
        self.expected = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal:
            return await refuse(send, *refusal)
        body = await self._read(headers, receive)
        if body is None:
            return await refuse(send, 413, f"the request is larger than {self.max_bytes} bytes")
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> MutableMapping[str, Any]:
            return first.pop() if first else await receive()

        await self.app(scope, replay, send)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        if self.expected is not None and scope["path"] not in OPEN_PATHS:
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self.expected):
                return 401, "a valid API key is needed: send the header Authorization: Bearer KEY"
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            return 415, f"the body must be application/json, not {kind or 'unnamed'}"
        return None

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body, or None as soon as it is known to be too large."""
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.max_bytes:
            return None
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                return None
            if not message.get("more_body"):
                return bytes(body)


async def refuse(send: Callable[[Message], Awaitable[None]], status: int, message: str) -> None:
    code = {401: "invalid_api_key", 413: "request_too_large", 415: "unsupported_media_type"}[status]
    body = error_body(status, message, code=code)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 413:
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
