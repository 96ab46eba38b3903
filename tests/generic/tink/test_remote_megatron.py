# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sampling by a Megatron server.

megatron-core's own handler checks each request and forms the answer. Flask, which its
server needs beside it, and its engine, which needs a GPU, are stand-ins here.
"""

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_generic.tink.backends.base import (
    SampleJob,
    SampleOutput,
    SamplingParams,
    Version,
)
from vllm_generic.tink.backends.remote_megatron import RemoteMegatron
from vllm_generic.tink.backends.remote_sampler import RemoteSampler


class Letters:
    """A token for each letter; 0 ends an answer."""

    eos_token_id = 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(token + 96) if token else "." for token in tokens)


class Local:
    """The fallback, which answers nothing."""

    tokenizer, max_length, vocab_size, engine = Letters(), 16, 27, None

    def failure(self) -> None:
        return None

    def close(self) -> None:
        pass

    async def sample(self, version: Any, job: SampleJob) -> SampleOutput:
        return SampleOutput([])


def generate(
    engine: Any,
    prompts: list[str],
    temperature: float,
    top_k: int,
    top_p: float,
    logprobs: bool,
    tokens_to_generate: int,
) -> dict[str, Any]:
    """As megatron-core's `run_mcore_engine`: each answer is its prompt and an end."""
    engine.append((temperature, top_k, top_p, logprobs, tokens_to_generate))
    tokens = [2 * Letters().encode(prompt) + [0] for prompt in prompts]
    return {
        "text": prompts,
        "tokens": tokens,
        # of all tokens but the first
        "logprobs": [[-0.5] * (len(each) - 2) + [-1.0] for each in tokens],
    }


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[Any]]]:
    pytest.importorskip("megatron.core")
    from megatron.core.inference.text_generation_server import (
        text_generation_server as megatron,
    )

    calls: list[Any] = []
    body: dict[str, Any] = {}
    request = SimpleNamespace(get_json=lambda: body)
    monkeypatch.setattr(megatron, "request", request, raising=False)
    monkeypatch.setattr(megatron, "jsonify", lambda value: value, raising=False)
    monkeypatch.setattr(megatron, "send_do_generate", lambda: None)
    monkeypatch.setattr(megatron, "run_mcore_engine", generate)
    handler = megatron.MegatronGenerate(calls, None)

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:  # noqa: N802
            body.clear()
            body.update(
                json.loads(self.rfile.read(int(self.headers["content-length"])))
            )
            result = handler.put() if self.path == "/api" else ("no such path", 404)
            value, status = result if isinstance(result, tuple) else (result, 200)
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", calls
        http.shutdown()


def sample(url: str, job: SampleJob, version: Version | None = None) -> SampleOutput:
    sampler = RemoteSampler(RemoteMegatron(url, Letters(), 16), Local())
    try:
        return asyncio.run(sampler.sample(version, job))
    finally:
        sampler.close()


def test_requests_that_megatron_takes(server: tuple[str, list[Any]]) -> None:
    url, calls = server
    prompt = Letters().encode("abc")
    params = SamplingParams(max_tokens=4, temperature=0.5, top_p=0.9)
    output = sample(url, SampleJob(prompt, params, num_samples=2))
    assert len(output.sequences) == 2
    assert output.sequences[0].tokens == [*prompt, 0]
    assert output.sequences[0].logprobs == [-0.5, -0.5, -0.5, -1.0]
    assert output.sequences[0].stopped
    sample(url, SampleJob(prompt, SamplingParams(temperature=0)))
    sample(url, SampleJob(prompt, SamplingParams(top_k=3, max_tokens=100)))
    assert calls == [
        (0.5, 0, 0.9, True, 4),
        (1.0, 1, 0.0, True, 13),
        (1.0, 3, 0.0, True, 13),
    ]
    hot = SampleJob(prompt, SamplingParams(temperature=200.0))
    with pytest.raises(RuntimeError, match="temperature must be a positive number"):
        sample(url, hot)


def test_what_it_does_not_take_is_sampled_here(
    server: tuple[str, list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    url, calls = server
    prompt, plain = Letters().encode("abc"), SamplingParams()
    with caplog.at_level(logging.WARNING):
        for job, version in (
            (SampleJob(prompt, SamplingParams(seed=1)), None),
            (SampleJob(prompt, plain, prompt_logprobs=True), None),
            (SampleJob([0, 14], plain), None),
            (SampleJob(prompt, plain), Version("a", Path("a"))),
        ):
            assert sample(url, job, version).sequences == []
        assert sample("http://127.0.0.1:9", SampleJob(prompt, plain)).sequences == []
    assert not calls
    for text in (
        "does not take a seed",
        "log-probabilities of prompts",
        "no text that a Megatron server reads",
        "does not take adapters",
        "The Megatron server can't be reached at http://127.0.0.1:9",
    ):
        assert f"{text}" in caplog.text
    assert caplog.text.count("sampling by Hugging Face instead") == 5
