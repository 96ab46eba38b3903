# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's own API, `/v1`, on the port of the service and with its engine."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_generic.tink.checkpoints import confined
from vllm_generic.tink.errors import UserError
from vllm_generic.tink.routes.common import user_of_request
from vllm_generic.tink.settings import Settings

PATHS = ("/v1/", "/tokenize", "/detokenize", "/version")


async def mount(app: FastAPI, engine: Any, folder: Path, name: str) -> None:
    """Answer vLLM's paths by vLLM's application; those of ``app`` come first.

    Adapters that are loaded by `/v1/load_lora_adapter` lie below the adapters'
    directory, and all users may sample from them.
    """
    # where all supported releases have them; vLLM 0.32 has moved them
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.entrypoints.openai.api_server import build_app, init_app_state
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(
        ["--model", str(folder), "--served-model-name", name]
    )
    tasks = await engine.get_supported_tasks()
    inner = build_app(arguments, tasks, engine.model_config)
    await init_app_state(engine, inner.state, arguments, tasks)
    _add_adapter_routes(app, inner)
    app.mount("", Guarded(inner, app))


class Guarded:
    """vLLM's application for those who have a key, and for its inference alone."""

    def __init__(self, inner: ASGIApp, outer: FastAPI) -> None:
        self._inner = inner
        self._outer = outer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PATHS):
            answer = JSONResponse({"detail": "Not Found"}, status_code=404)
            await answer(scope, receive, send)
            return
        scope["app"] = self._outer
        user_of_request(Request(scope))  # the outer application answers a wrong key
        await self._inner(scope, receive, send)


def _add_adapter_routes(app: FastAPI, inner: FastAPI) -> None:
    """As vLLM's, but files of adapters lie below the adapters' directory."""
    from vllm.entrypoints.serve.lora.protocol import (
        LoadLoRAAdapterRequest,
        UnloadLoRAAdapterRequest,
    )

    models = inner.state.openai_serving_models
    settings: Settings = app.state.service.settings

    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadLoRAAdapterRequest, request: Request) -> Response:
        user_of_request(request)
        folder = confined(settings.adapters_root, body.lora_path)
        if not folder.is_dir():
            raise UserError(f"LoRA path does not exist: {body.lora_path!r}")
        return _answer(
            await models.load_lora_adapter(
                body.model_copy(update={"lora_path": str(folder)})
            )
        )

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadLoRAAdapterRequest, request: Request) -> Response:
        user_of_request(request)
        return _answer(await models.unload_lora_adapter(body))


def _answer(result: Any) -> Response:
    if isinstance(result, str):
        return Response(result)
    return JSONResponse(result.model_dump(), status_code=result.error.code)
