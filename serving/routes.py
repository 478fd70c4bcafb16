"""The routes, and their description in /openapi.json.

    GET /v1/models  /v1/models/NAME  /health  /openapi.json
    POST /v1/chat/completions  /v1/completions  /v1/embeddings

A POST route takes the bytes of the body as they are: they are parsed in a worker thread (lanes.py), not in the event
loop. Called by app.py. Read next: service.py, schemas.py.
"""

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from serving import schemas
from serving.embeddings import EmbeddingList, EmbeddingRequest
from serving.models import Served
from serving.schemas import ChatRequest, CompletionRequest
from serving.service import Counter

BODIES = (ChatRequest, CompletionRequest, EmbeddingRequest)
REFERENCE = "#/components/schemas/{model}"


def add_routes(app: FastAPI, counter: Counter) -> None:
    refusals = {400: "wrong request", 401: "no or wrong key", 403: "wrong Host or Origin", 404: "no such model"}
    refusals |= {413: "too large", 415: "no JSON", 429: "no place free", 500: "the model failed"}
    errors: dict[int | str, Any] = {k: {"model": schemas.ErrorBody, "description": v} for k, v in refusals.items()}
    events: dict[str, Any] = {"text/event-stream": {}}

    def posted(body: type, answer: type, description: str, **content: Any) -> dict[str, Any]:
        schema = {"$ref": REFERENCE.format(model=body.__name__)}
        asked = {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}
        responses = {200: {"model": answer, "description": description, **content}, **errors}
        return {"response_class": Response, "responses": responses, "openapi_extra": asked}

    growing = ("the answer, or events of it", {"content": events})

    @app.post("/v1/chat/completions", **posted(ChatRequest, schemas.ChatCompletion, growing[0], **growing[1]))
    async def chat_completions(request: Request) -> Response:
        return await counter.answer(request, ChatRequest)

    @app.post("/v1/completions", **posted(CompletionRequest, schemas.TextCompletion, growing[0], **growing[1]))
    async def completions(request: Request) -> Response:
        return await counter.answer(request, CompletionRequest)

    @app.post("/v1/embeddings", **posted(EmbeddingRequest, EmbeddingList, "one vector per input"))
    async def embeddings(request: Request) -> Response:
        return await counter.embed(request)

    def card(served: Served) -> schemas.ModelCard:
        about: dict[str, Any] = {"stage": served.stage, "parameters": served.model.count_parameters()[0]}
        return schemas.ModelCard(id=served.name, created=served.created, max_model_len=served.limit, **about)

    refused: dict[int | str, Any] = {status: errors[status] for status in (401, 403)}

    @app.get("/v1/models", responses=refused)
    async def models() -> schemas.ModelList:
        return schemas.ModelList(data=[card(served) for served in counter.models.values()])

    @app.get("/v1/models/{name:path}", responses={**refused, 404: errors[404]})
    async def model(name: str) -> schemas.ModelCard:
        return card(counter.find(name))

    @app.get("/health", responses={403: errors[403]})
    async def health() -> schemas.Health:
        return schemas.Health(models=counter.engine.status())

    def description() -> dict[str, Any]:
        """FastAPI's description with the schemas of the bodies, which it does not parse itself."""
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, bodies = models_json_schema([(body, "validation") for body in BODIES], ref_template=REFERENCE)
            found["components"]["schemas"] |= bodies["$defs"]
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = description  # type: ignore[method-assign]
