"""FastAPI application: OpenAI's routes behind RequestMiddleware, and their description in /openapi.json.

    GET /v1/models  /v1/models/NAME  /health  /openapi.json
    POST /v1/chat/completions  /v1/completions  /v1/embeddings

A POST route does not declare its body: a worker thread parses it (service.py), not FastAPI in the event loop. The
thread that uses the models starts and stops with the server. Errors have OpenAI's shape.
Called by ../serve_openai_api.py. Read next: service.py (how a request is processed), middleware.py, schemas.py.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from serving import schemas
from serving.chat_schemas import ChatRequest
from serving.config import ServeConfig
from serving.embeddings import EmbeddingList, EmbeddingRequest
from serving.errors import ApiError
from serving.middleware import RequestMiddleware
from serving.models import ServedModel
from serving.scheduler import QueueFull
from serving.schemas import CompletionRequest
from serving.service import CompletionService

SCHEMA_REFERENCE = "#/components/schemas/{model}"
STATUS_TEXTS = {
    400: "invalid request", 401: "missing or wrong key", 403: "Host or Origin not allowed", 404: "no such model",
    413: "too large", 415: "not JSON", 429: "queue full", 500: "the model failed",
}  # fmt: skip
ERRORS: dict[int | str, Any] = {
    status: {"model": schemas.ErrorBody, "description": text} for status, text in STATUS_TEXTS.items()
}


def make_app(models: dict[str, ServedModel], config: ServeConfig) -> FastAPI:
    """Return the application for these models."""
    service = CompletionService(models, config)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start(asyncio.get_running_loop())
        yield
        await run_in_threadpool(service.stop)

    middleware = [Middleware(RequestMiddleware, config=config)]
    if config.cors:
        allow: dict[str, Any] = {"allow_methods": ["GET", "POST"], "allow_headers": ["authorization", "content-type"]}
        allow["expose_headers"] = ["x-ignored-fields", "x-served-model"]
        middleware.insert(0, Middleware(CORSMiddleware, allow_origins=list(config.cors), **allow))
    app = FastAPI(title="Mengya", version="1", docs_url=None, redoc_url=None, lifespan=lifespan, middleware=middleware)
    app.state.service = service
    add_post_routes(app, service)
    add_get_routes(app, service)
    add_error_handlers(app)
    app.openapi = lambda: openapi_schema(app)  # type: ignore[method-assign]
    return app


def add_post_routes(app: FastAPI, service: CompletionService) -> None:
    def post(path: str, body: type, answer: type, description: str, **content: Any) -> Any:
        schema = {"$ref": SCHEMA_REFERENCE.format(model=body.__name__)}
        request_body = {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}
        responses = {200: {"model": answer, "description": description, **content}, **ERRORS}
        return app.post(path, response_class=Response, responses=responses, openapi_extra=request_body)

    text = "the answer, or its server-sent events"
    events: dict[str, Any] = {"content": {"text/event-stream": {}}}

    @post("/v1/chat/completions", ChatRequest, schemas.ChatCompletion, text, **events)
    async def chat_completions(request: Request) -> Response:
        return await service.respond(request, ChatRequest)

    @post("/v1/completions", CompletionRequest, schemas.TextCompletion, text, **events)
    async def completions(request: Request) -> Response:
        return await service.respond(request, CompletionRequest)

    @post("/v1/embeddings", EmbeddingRequest, EmbeddingList, "one vector per input")
    async def embeddings(request: Request) -> Response:
        return await service.respond(request, EmbeddingRequest)


def add_get_routes(app: FastAPI, service: CompletionService) -> None:
    errors: dict[int | str, Any] = {status: ERRORS[status] for status in (401, 403)}

    @app.get("/v1/models", responses=errors)
    async def models() -> schemas.ModelList:
        return schemas.ModelList(data=[served.card() for served in service.models.values()])

    @app.get("/v1/models/{name:path}", responses={**errors, 404: ERRORS[404]})
    async def model(name: str) -> schemas.ModelCard:
        return service.find_model(name).card()

    @app.get("/health", responses={403: ERRORS[403]})
    async def health() -> schemas.Health:
        return schemas.Health(models=service.status())


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(QueueFull)
    async def queue_full(_: Request, error: QueueFull) -> Response:
        return ApiError(429, str(error), headers={"Retry-After": str(error.retry_after)}).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"[:500]
        return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def internal_error(_: Request, error: Exception) -> Response:
        return ApiError(500, "internal error of this server; see its log").response()


def openapi_schema(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description plus the schemas of the request bodies, which FastAPI does not know."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        kinds: list[Any] = [(body, "validation") for body in (ChatRequest, CompletionRequest, EmbeddingRequest)]
        _, bodies = models_json_schema(kinds, ref_template=SCHEMA_REFERENCE)
        schema["components"]["schemas"] |= bodies["$defs"]
        app.openapi_schema = schema
    return app.openapi_schema
