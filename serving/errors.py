"""Error responses in OpenAI's shape, with the status codes that its clients expect.

    {"error": {"message", "type", "param", "code"}}

Called by service.py. Read next: middleware.py (errors before a request is parsed).
"""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from serving.middleware import error_body

UNION_TYPES = ("list[", "constrained-", "str", "int")  # pydantic's names of the types of a union, in an error's `loc`
MODEL_FAILED = "the model failed on this request; the server's log says why"


class ApiError(Exception):
    """An error that is sent as a response in OpenAI's shape."""

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
    """Return (field, message) for pydantic's errors of a request; a union field has one error per type.

    The reported error is that of the best matching type: an error other than a type error first, then the longest
    `loc`. If the value has none of the types, the message names all of them.
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
    """An error's `loc` as `messages.0.role`, without pydantic's names of the types of a union."""
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
