# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Who reaches vLLM's application through the service's; the rest needs an engine."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_generic.tink.app import build_app
from vllm_generic.tink.openai_app import Guarded
from vllm_generic.tink.settings import Settings


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/models", {"Authorization": "Bearer secret"}, 200),
        ("/v1/models", {"X-API-Key": "secret"}, 200),
        ("/v1/models", {"X-API-Key": "wrong"}, 401),
        ("/v1/models", {}, 401),
        ("/server_info", {"X-API-Key": "secret"}, 404),
        ("/health", {}, 200),
    ],
)
def test_keys_and_paths(path: str, headers: dict[str, str], status: int) -> None:
    inner = FastAPI()
    for own in ("/v1/models", "/server_info", "/health"):
        inner.get(own)(lambda: {"from": "vLLM"})
    settings = Settings(root=Path("unused"), api_keys={"secret": "ann"})
    service = SimpleNamespace(settings=settings, failure=lambda: None)
    app = build_app(service)  # its lifespan, which starts the service, does not run
    app.mount("", Guarded(inner, app))
    answer = TestClient(app).get(path, headers=headers)
    assert answer.status_code == status
    if path == "/health":
        assert answer.json() == {"status": "ok"}
