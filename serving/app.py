"""The HTTP application: OpenAI's routes, the middleware around them, and the engine that runs while the server does.

    make_app(models, limits, number_format) -> FastAPI

Errors have OpenAI's shape.
Called by ../serve_openai_api.py. Read next: routes.py, service.py (a request's way), middleware.py.
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

from serving.errors import add_error_shapes
from serving.limits import Limits
from serving.middleware import Gate
from serving.models import Served
from serving.routes import add_routes
from serving.service import Counter


def make_app(
    models: dict[str, Served], limits: Limits, number_format: Callable[[], AbstractContextManager[Any]]
) -> FastAPI:
    """The application; its engine runs while the server does."""
    counter = Counter(models, limits, number_format)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        counter.loop = asyncio.get_running_loop()
        counter.engine.start()
        yield
        await run_in_threadpool(counter.engine.stop)
        counter.lanes.close()

    middleware = [Middleware(Gate, limits=limits)]
    if limits.cors:
        allow: dict[str, Any] = {"allow_methods": ["GET", "POST"], "allow_headers": ["authorization", "content-type"]}
        allow["expose_headers"] = ["x-ignored-fields", "x-served-model"]
        middleware.insert(0, Middleware(CORSMiddleware, allow_origins=list(limits.cors), **allow))
    app = FastAPI(title="Mengya", version="1", docs_url=None, redoc_url=None, lifespan=lifespan, middleware=middleware)
    app.state.counter = counter
    add_routes(app, counter)
    add_error_shapes(app)
    return app
