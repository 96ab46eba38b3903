# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""From a config to a running engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from vllm import LLM, AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm_generic.rollout.async_engines import (
    AsyncEngine,
    AsyncLLMEngine,
    ServerEngine,
)
from vllm_generic.rollout.config import RolloutConfig
from vllm_generic.rollout.engine_args import (
    Factory,
    engine_args,
    register,
    tokenizer_folder,
)
from vllm_generic.rollout.engines import Engine, LocalEngine
from vllm_generic.rollout.pool import EnginePool

SERVER_CAPACITY = 256  # vllm serve's own default of max_num_seqs on most devices


def start_engine(config: RolloutConfig, factory: Factory | str | None) -> Engine:
    """Make the engine, or connect to the servers, that a config describes.

    Args:
        config: How to make it.
        factory: Builds the model in each worker; None if vLLM knows how.

    """
    if config.engine_urls:
        return _connect(config)
    if config.ray_engines:
        return _place(config, factory)
    if factory is not None:
        register(config, factory)
    args = engine_args(config)
    if not config.asynchronous:
        return LocalEngine(LLM(**args))

    async def make() -> list[AsyncEngine]:
        return [AsyncLLMEngine(AsyncLLM.from_engine_args(AsyncEngineArgs(**args)))]

    async def seq_length(engines: Sequence[AsyncEngine]) -> int:
        return engines[0].handle.model_config.max_model_len

    def tokenizer(engines: Sequence[AsyncEngine]) -> Any | None:
        engine: AsyncLLM = engines[0].handle
        skipped = engine.model_config.skip_tokenizer_init
        return None if skipped else engine.get_tokenizer()

    return EnginePool(make, seq_length, tokenizer)


def _connect(config: RolloutConfig) -> Engine:
    folder = tokenizer_folder(config)
    tokenizer = None if folder is None else AutoTokenizer.from_pretrained(folder)
    capacity = config.max_num_seqs or SERVER_CAPACITY
    servers = [
        ServerEngine(url, capacity, config.timeout, with_text=tokenizer is not None)
        for url in config.engine_urls
    ]

    async def make() -> list[AsyncEngine]:
        return list(servers)

    async def seq_length(engines: Sequence[AsyncEngine]) -> int:
        lengths = [await server.seq_length() for server in servers]
        return min([*lengths, config.seq_length or lengths[0]])

    return EnginePool(make, seq_length, lambda _: tokenizer)


def _place(config: RolloutConfig, factory: Factory | str | None) -> Engine:
    from vllm_generic.rollout.ray_engines import RayEngine, place

    folder = tokenizer_folder(config)
    tokenizer = None if folder is None else AutoTokenizer.from_pretrained(folder)

    async def make() -> Sequence[AsyncEngine]:
        return await place(config, factory)

    async def seq_length(engines: Sequence[AsyncEngine]) -> int:
        return min(each.seq_length for each in engines if isinstance(each, RayEngine))

    return EnginePool(make, seq_length, lambda _: tokenizer)
