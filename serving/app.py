"""FastAPI application: OpenAI's routes behind RequestMiddleware; the engine thread starts and stops with the server.

    make_app(models, limits, autocast_context) -> FastAPI

Errors have OpenAI's shape.
Called by ../serve_openai_api.py. Read next: routes.py, service.py (how a request is processed), middleware.py.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import Any

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from serving.errors import add_error_handlers
from serving.limits import ServerLimits
from serving.middleware import RequestMiddleware
from serving.models import ServedModel
from serving.routes import add_routes
from serving.service import CompletionService


def make_app(
    models: dict[str, ServedModel], limits: ServerLimits, autocast_context: Callable[[], AbstractContextManager[Any]]
) -> FastAPI:
    """Return the application. `autocast_context` returns the context in which the engine computes."""
    service = CompletionService(models, limits, autocast_context)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.loop = asyncio.get_running_loop()
        service.engine.start()
        yield
        await run_in_threadpool(service.engine.stop)
        service.worker_pools.close()

    middleware = [Middleware(RequestMiddleware, limits=limits)]
    if limits.cors:
        allow: dict[str, Any] = {"allow_methods": ["GET", "POST"], "allow_headers": ["authorization", "content-type"]}
        allow["expose_headers"] = ["x-ignored-fields", "x-served-model"]
        middleware.insert(0, Middleware(CORSMiddleware, allow_origins=list(limits.cors), **allow))
    app = FastAPI(title="Mengya", version="1", docs_url=None, redoc_url=None, lifespan=lifespan, middleware=middleware)
    app.state.service = service
    add_routes(app, service)
    add_error_handlers(app)
    return app
