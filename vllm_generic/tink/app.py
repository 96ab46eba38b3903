# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The web application around a service."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from vllm_generic.tink.auth import InvalidKeyError
from vllm_generic.tink.errors import BusyError, NotFoundError, UserError
from vllm_generic.tink.routes import (
    futures,
    operations,
    page,
    rest,
    sampling,
    sessions,
    texts,
    training,
)
from vllm_generic.tink.service import Service


def _invalid(error: RequestValidationError) -> str:
    """The first thing that is wrong with a body, in one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return f"{where}: {first['msg']}, got {first.get('input')!r:.100}"


def build_app(service: Service) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        engine = service.sampling.sampler.engine
        if engine is not None:
            from vllm_generic.tink import openai_app

            await openai_app.mount(app, engine, service.model_dir, service.model_name)
        yield
        await service.stop()

    app = FastAPI(title="tink", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(operations.router)
    app.include_router(page.router)
    for part in (sessions, training, sampling, futures, rest, texts):
        app.include_router(part.router, prefix="/api/v1")

    @app.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> JSONResponse:
        status = 404 if isinstance(error, NotFoundError) else 400
        return JSONResponse({"detail": str(error)}, status_code=status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": _invalid(error)}, status_code=422)

    @app.exception_handler(BusyError)
    async def busy(request: Request, error: BusyError) -> JSONResponse:
        service.metrics.rejected.inc()
        return JSONResponse(
            {"detail": str(error)}, status_code=429, headers={"Retry-After": "1"}
        )

    @app.exception_handler(InvalidKeyError)
    async def unknown_key(request: Request, error: InvalidKeyError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=401)

    return app
