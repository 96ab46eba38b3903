# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A registered callable behind `AsyncLLM` and `vllm serve`."""

import asyncio
import gc
import json
import multiprocessing
import os
import threading

import pytest
import requests
from servers import tiny_server
from tiny_model import TinyModel, greedy, trained_model

from vllm import AsyncEngineArgs, ModelRegistry, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

pytestmark = pytest.mark.engine

PROMPT = list(range(40))
OVERRIDE = '{"TinyModel": "tiny_model:build"}'


def words(token_ids: list[int]) -> str:
    return " ".join(f"t{i}" for i in token_ids)


@pytest.fixture
def registry(monkeypatch, fork_server):
    """The global registry, restored after the test."""
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    return ModelRegistry


def start_async(model_dir, **options) -> AsyncLLM:
    defaults = {
        "model": str(model_dir),
        "dtype": "float32",
        "max_model_len": 128,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 24,
    }
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**(defaults | options)))


async def generate(engine: AsyncLLM, data_parallel_rank: int | None) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=8, detokenize=False)
    async for output in engine.generate(
        {"prompt_token_ids": PROMPT},
        params,
        request_id=str(data_parallel_rank),
        data_parallel_rank=data_parallel_rank,
    ):
        token_ids = list(output.outputs[0].token_ids)
    return token_ids


def test_async_llm(model_dir, registry):
    registry.register_model("TinyModel", lambda c, p: TinyModel())

    async def serve() -> list[int]:
        engine = start_async(model_dir)
        token_ids = await generate(engine, None)
        engine.shutdown()
        return token_ids

    assert asyncio.run(serve()) == greedy(trained_model(), PROMPT, 8)


@pytest.mark.parametrize(
    "num_experts, sizes_and_ranks", [(0, [[1, 0], [1, 0]]), (2, [[2, 0], [2, 1]])]
)
def test_data_parallel_engines(
    model_dir, tmp_path_factory, registry, num_experts, sizes_and_ranks
):
    """Only with experts are they one data-parallel group; else each is on its own."""
    config = json.loads((model_dir / "config.json").read_text())
    config["num_experts"] = num_experts
    (model_dir / "config.json").write_text(json.dumps(config))
    seen = tmp_path_factory.mktemp("contexts")
    guard = threading.Lock()

    def factory(vllm_config, parallel_context):
        group = parallel_context.get_dp_process_group()
        size = parallel_context.get_data_parallel_size()
        rank = parallel_context.get_data_parallel_rank()
        assert (group.size(), group.rank()) == (size, rank)
        (seen / str(os.getpid())).write_text(json.dumps([size, rank]))
        return TinyModel()

    def guarded(vllm_config, parallel_context):
        with guard:
            return factory(vllm_config, parallel_context)

    async def serve() -> list[list[int]]:
        engine = start_async(model_dir, data_parallel_size=2)
        token_ids = [await generate(engine, rank) for rank in range(2)]
        engine.shutdown()
        return token_ids

    registry.register_model("TinyModel", guarded)
    with pytest.raises(TypeError, match="guard .a lock. cannot be pickled"):
        asyncio.run(serve())
    gc.collect()  # the engines' coordinator lives as long as the traceback
    assert not multiprocessing.active_children()

    registry.register_model("TinyModel", factory)
    assert asyncio.run(serve()) == [greedy(trained_model(), PROMPT, 8)] * 2
    contexts = [json.loads(path.read_text()) for path in seen.iterdir()]
    assert sorted(contexts) == sizes_and_ranks


@pytest.mark.parametrize(
    "data_parallel_size", [1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_vllm_serve(model_dir_with_tokenizer, tmp_path_factory, data_parallel_size):
    """By `--model-class-overrides`, and an architecture that vLLM does not know."""
    options = ["--data-parallel-size", str(data_parallel_size)]
    options += ["--api-server-count", "1"]
    logs = tmp_path_factory.mktemp("serve")
    with tiny_server(model_dir_with_tokenizer, logs, *options) as url:
        assert requests.get(f"{url}/v1/models", timeout=5).json()["data"][0]["id"] == (
            "tiny"
        )
        request = {
            "model": "tiny",
            "prompt": words(PROMPT),
            "max_tokens": 8,
            "temperature": 0,
        }
        expected = words(greedy(trained_model(), PROMPT, 8))
        for rank in range(data_parallel_size):
            answer = requests.post(
                f"{url}/v1/completions",
                json=request,
                headers={"X-data-parallel-rank": str(rank)},
                timeout=60,
            ).json()
            assert answer["choices"][0]["text"].strip() == expected
