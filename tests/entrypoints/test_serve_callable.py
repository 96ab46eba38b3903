# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A registered callable behind `AsyncLLM` and `vllm serve`."""

import asyncio
import os
import subprocess
import sys
import time

import pytest
import requests
from tiny_model import TinyModel, greedy, trained_model

from vllm import AsyncEngineArgs, ModelRegistry, SamplingParams
from vllm.utils.network_utils import get_open_port
from vllm.v1.engine.async_llm import AsyncLLM

pytestmark = pytest.mark.engine

PROMPT = list(range(40))
OVERRIDE = '{"TinyModel": "tiny_model:build"}'


def words(token_ids: list[int]) -> str:
    return " ".join(f"t{i}" for i in token_ids)


def test_async_llm(model_dir, monkeypatch):
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    ModelRegistry.register_model("TinyModel", lambda c, p: TinyModel())

    async def generate() -> list[int]:
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(model_dir),
                dtype="float32",
                max_model_len=128,
                skip_tokenizer_init=True,
                enforce_eager=True,
                kv_cache_memory_bytes=1 << 24,
            )
        )
        params = SamplingParams(temperature=0, max_tokens=8, detokenize=False)
        async for output in engine.generate(
            {"prompt_token_ids": PROMPT}, params, request_id="0"
        ):
            token_ids = list(output.outputs[0].token_ids)
        engine.shutdown()
        return token_ids

    assert asyncio.run(generate()) == greedy(trained_model(), PROMPT, 8)


def test_vllm_serve(model_dir_with_tokenizer, tmp_path_factory):
    """By `--model-class-overrides`, and an architecture that vLLM does not know."""
    port = get_open_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    command += [str(model_dir_with_tokenizer), "--model-class-overrides", OVERRIDE]
    command += ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "tiny", "--kv-cache-memory-bytes", "16777216"]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    url = f"http://127.0.0.1:{port}"
    with open(log, "w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ)
    try:
        for _ in range(300):
            assert server.poll() is None, log.read_text()[-4000:]
            try:
                if requests.get(f"{url}/health", timeout=5).ok:
                    break
            except requests.ConnectionError:
                time.sleep(1)
        assert requests.get(f"{url}/v1/models", timeout=5).json()["data"][0]["id"] == (
            "tiny"
        )
        request = {
            "model": "tiny",
            "prompt": words(PROMPT),
            "max_tokens": 8,
            "temperature": 0,
        }
        answer = requests.post(f"{url}/v1/completions", json=request, timeout=60).json()
        expected = words(greedy(trained_model(), PROMPT, 8))
        assert answer["choices"][0]["text"].strip() == expected
    finally:
        server.terminate()
        server.wait(timeout=60)
