"""Errors in OpenAI's shape, with the status that its clients expect.

    {"error": {"message", "type", "param", "code"}}

Called by app.py. Read next: gate.py (the same shape before a request is read).
"""

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from serving.gate import error_body

CANNOT = "the model failed on this request; the server's log says why"


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


def add_error_shapes(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def known(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        # A union reports the errors of every branch; the one that got furthest matches the request best.
        first = max(error.errors(), key=lambda each: len(each["loc"]))
        if first["type"] == "json_invalid":
            return ApiError(
                400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', '')}"[:500]
            ).response()
        where = ".".join(str(part) for part in first["loc"][1:] if not str(part).startswith(("list[", "constrained")))
        return ApiError(400, f"{where or 'body'}: {first['msg']}"[:500], where or None).response()

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"[:500]
        return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> Response:
        return ApiError(500, "internal error of this server; see its log").response()
