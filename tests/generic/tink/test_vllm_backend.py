# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The functions for vLLM servers, against two that answer as vLLM does."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vllm_generic.tink import vllm_backend


class _Server(ThreadingHTTPServer):
    """Keeps its requests, and holds completions until there are two anywhere."""

    def __init__(self, together: threading.Barrier) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.together = together
        self.received: list[tuple[str, dict]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:  # noqa: N802
        self._answer({"data": [{"id": "base"}]})

    def do_POST(self) -> None:  # noqa: N802
        length = int(self.headers.get("content-length", 0))
        body = json.loads(self.rfile.read(length) or b"{}")
        self.server.received.append((self.path, body))
        if self.path == "/v1/completions":
            self.server.together.wait(30)
            self._answer({"choices": [{"text": f"{body['model']}:{body['prompt']}"}]})
        else:
            self._answer({})

    def _answer(self, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[_Server]]:
    together = threading.Barrier(2)
    pair = [_Server(together), _Server(together)]
    monkeypatch.setenv("VLLM_BASE_URL", ", ".join(server.url for server in pair))
    vllm_backend.initialize_vllm_client()
    yield pair
    for server in pair:
        server.shutdown()
        server.server_close()


def test_adapters_are_on_every_server_and_requests_are_shared(
    servers: list[_Server], tmp_path: Path
) -> None:
    vllm_backend.register_lora_adapter("mine", str(tmp_path))
    vllm_backend.register_lora_adapter("mine", str(tmp_path))
    assert vllm_backend.list_lora_adapters() == {"mine": str(tmp_path)}
    # each server holds its request until the other has one
    texts = vllm_backend.generate_with_vllm(["a", "b"], "mine", max_tokens=4)
    assert texts == ["mine:a", "mine:b"]
    assert vllm_backend.generate_with_vllm(["a", "b"]) == ["base:a", "base:b"]
    vllm_backend.reset_prefix_cache()
    assert vllm_backend.get_client_info()["base_urls"] == [s.url for s in servers]
    vllm_backend.unregister_lora_adapter("mine")
    loaded = {"lora_name": "mine", "lora_path": str(tmp_path)}
    for server in servers:
        paths = [path for path, _ in server.received]
        assert paths.count("/v1/completions") == 2
        assert server.received[0] == ("/v1/load_lora_adapter", loaded)
        assert server.received[1][1] == loaded | {"load_inplace": True}
        assert paths[-2:] == ["/reset_prefix_cache", "/v1/unload_lora_adapter"]


def test_a_server_that_is_down_is_left_out(servers: list[_Server]) -> None:
    urls = ["http://127.0.0.1:9", servers[0].url]
    both = vllm_backend.initialize_vllm_client({"base_url": urls})
    asked: list[str] = []

    def work(url: str) -> str:
        asked.append(url)
        return both.request("GET", url, "/v1/models").json()["data"][0]["id"]

    assert both.least_busy(work) == "base"
    assert asked == urls[1:]  # it was found out when the client was made


def test_errors(servers: list[_Server], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="LoRA path does not exist: '/no/such'"):
        vllm_backend.register_lora_adapter("mine", "/no/such")
    with pytest.raises(ValueError, match="'mine' is not registered"):
        vllm_backend.generate_with_vllm(["a"], "mine")
    with pytest.raises(ValueError, match="'mine' is not registered"):
        vllm_backend.unregister_lora_adapter("mine")
    monkeypatch.setenv("VLLM_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="The vLLM server can't be reached"):
        vllm_backend.initialize_vllm_client()
