"""Errors in OpenAI's shape, with the status that its clients expect.

    {"error": {"message", "type", "param", "code"}}

Called by service.py. Read next: middleware.py (the same shape before a request is read).
"""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from serving.middleware import error_body

UNION_TYPES = ("list[", "constrained-", "str", "int")  # how pydantic names the types of a union in a place
MODEL_FAILED = "the model failed on this request; the server's log says why"


class ApiError(Exception):
    """Becomes a response in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.body, self.headers = status, error_body(status, message, param, code), headers

    def response(self) -> Response:
        return Response(self.body, self.status, self.headers, "application/json")


def union_error(errors: Sequence[Any]) -> tuple[str, str]:
    """(field, message) for the errors of a request, of which a field of several types has one for each type.

    The type that got furthest is the one that was meant: one whose rule is broken (a length), not its type, then the
    one with the deepest place. Where the value has none of the types, the message names them all.
    """

    def match_depth(error: Any) -> tuple[bool, int]:
        return not error["type"].endswith("_type"), len(error["loc"])

    furthest = max(match_depth(error) for error in errors)
    meant = [error for error in errors if match_depth(error) == furthest]
    where = _field_path(meant[0])
    messages = dict.fromkeys(error["msg"] for error in meant if _field_path(error) == where)
    first, *others = messages
    return where, " or ".join([first, *(other.removeprefix("Input should be ") for other in others)])


def _field_path(error: Any) -> str:
    """`messages.0.role`: the place without pydantic's names of a union's types."""
    name, *inside = [str(part) for part in error["loc"]] or [""]
    return ".".join([name, *(part for part in inside if part.isdigit() or not part.startswith(UNION_TYPES))])


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"[:500]
        return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def internal_error(_: Request, error: Exception) -> Response:
        return ApiError(500, "internal error of this server; see its log").response()
