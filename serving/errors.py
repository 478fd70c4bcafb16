"""Error responses in OpenAI's shape, with the status codes that its clients expect.

    {"error": {"message", "type", "param", "code"}}

Raised by middleware.py, requests.py and service.py; sent by app.py. Read next: middleware.py.
"""

import json

from starlette.responses import Response

MODEL_FAILED = "the model failed on this request; the server's log says why"
ERROR_CODES = {
    401: "invalid_api_key",
    403: "forbidden",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> bytes:
    """An error in OpenAI's shape, as ASCII: a message may quote lone surrogates."""
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


class ApiError(Exception):
    """An error that is sent as a response in OpenAI's shape. `code`: by default that of the status in ERROR_CODES."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = error_body(status, message, param, code or ERROR_CODES.get(status))

    def response(self) -> Response:
        return Response(self.body, self.status, self.headers, "application/json")
