"""The HTTP routes and their description in /openapi.json.

    GET /v1/models  /v1/models/NAME  /health  /openapi.json
    POST /v1/chat/completions  /v1/completions  /v1/embeddings

A POST route does not declare its body: a worker thread parses it (worker_pools.py), not FastAPI in the event loop.
Called by app.py. Read next: service.py, schemas.py.
"""

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from serving import schemas
from serving.embeddings import EmbeddingList, EmbeddingRequest
from serving.models import ServedModel
from serving.schemas import ChatRequest, CompletionRequest
from serving.service import CompletionService

REQUEST_SCHEMAS = (ChatRequest, CompletionRequest, EmbeddingRequest)
SCHEMA_REFERENCE = "#/components/schemas/{model}"


def add_routes(app: FastAPI, service: CompletionService) -> None:
    error_descriptions = {
        400: "invalid request",
        401: "missing or wrong key",
        403: "Host or Origin not allowed",
        404: "no such model",
    }
    error_descriptions |= {413: "too large", 415: "not JSON", 429: "queue full", 500: "the model failed"}
    errors: dict[int | str, Any] = {
        k: {"model": schemas.ErrorBody, "description": v} for k, v in error_descriptions.items()
    }
    events: dict[str, Any] = {"text/event-stream": {}}

    def post_options(body: type, answer: type, description: str, **content: Any) -> dict[str, Any]:
        schema = {"$ref": SCHEMA_REFERENCE.format(model=body.__name__)}
        request_body = {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}
        responses = {200: {"model": answer, "description": description, **content}, **errors}
        return {"response_class": Response, "responses": responses, "openapi_extra": request_body}

    stream_text, stream_content = "the answer, or its server-sent events", {"content": events}

    @app.post(
        "/v1/chat/completions", **post_options(ChatRequest, schemas.ChatCompletion, stream_text, **stream_content)
    )
    async def chat_completions(request: Request) -> Response:
        return await service.create_completion(request, ChatRequest)

    @app.post(
        "/v1/completions", **post_options(CompletionRequest, schemas.TextCompletion, stream_text, **stream_content)
    )
    async def completions(request: Request) -> Response:
        return await service.create_completion(request, CompletionRequest)

    @app.post("/v1/embeddings", **post_options(EmbeddingRequest, EmbeddingList, "one vector per input"))
    async def embeddings(request: Request) -> Response:
        return await service.create_embeddings(request)

    def model_card(served: ServedModel) -> schemas.ModelCard:
        details: dict[str, Any] = {"stage": served.stage, "parameters": served.model.count_parameters()[0]}
        return schemas.ModelCard(id=served.name, created=served.created, max_model_len=served.max_model_len, **details)

    get_errors: dict[int | str, Any] = {status: errors[status] for status in (401, 403)}

    @app.get("/v1/models", responses=get_errors)
    async def models() -> schemas.ModelList:
        return schemas.ModelList(data=[model_card(served) for served in service.models.values()])

    @app.get("/v1/models/{name:path}", responses={**get_errors, 404: errors[404]})
    async def model(name: str) -> schemas.ModelCard:
        return model_card(service.find_model(name))

    @app.get("/health", responses={403: errors[403]})
    async def health() -> schemas.Health:
        return schemas.Health(models=service.engine.status())

    def openapi_schema() -> dict[str, Any]:
        """FastAPI's description plus the schemas of the request bodies, which FastAPI does not know."""
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, bodies = models_json_schema(
                [(body, "validation") for body in REQUEST_SCHEMAS], ref_template=SCHEMA_REFERENCE
            )
            schema["components"]["schemas"] |= bodies["$defs"]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi_schema  # type: ignore[method-assign]
