# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""From a config to a running engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer

from vllm import LLM, AsyncEngineArgs, ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.parallel_context import ParallelContext
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM
from vllm_generic.rollout.async_engines import (
    AsyncEngine,
    AsyncLLMEngine,
    ServerEngine,
)
from vllm_generic.rollout.config import RolloutConfig
from vllm_generic.rollout.engines import Engine, LocalEngine
from vllm_generic.rollout.pool import EnginePool

Factory = Callable[[VllmConfig, ParallelContext], nn.Module]

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


def engine_args(config: RolloutConfig) -> dict[str, Any]:
    """The arguments of vLLM's engine that a config asks for.

    Raises:
        ValueError: there is no model's directory, or its config has no window.

    """
    args: dict[str, Any] = {
        "model": str(_folder(config)),
        "tokenizer": config.tokenizer,
        "load_format": config.load_format,
        "dtype": config.dtype,
        "seed": config.seed or 0,
        "max_model_len": config.seq_length,
        "logprobs_mode": config.logprobs_mode,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "max_num_seqs": config.max_num_seqs,
        "block_size": config.block_size,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "kv_cache_memory_bytes": config.kv_cache_memory_bytes,
        "tensor_parallel_size": config.tensor_model_parallel_size,
        "pipeline_parallel_size": config.pipeline_model_parallel_size,
        "data_parallel_size": config.data_parallel_size,
        "enforce_eager": config.enforce_eager,
        "enable_sleep_mode": current_platform.is_sleep_mode_available(),
        "skip_tokenizer_init": _tokenizer_folder(config) is None,
    }
    if config.sliding_window is not None:
        if "sliding_window" not in _model_config(config):
            raise ValueError(
                f"sliding_window is {config.sliding_window}, and the model's config "
                f"in {config.model} has none. Remove the key."
            )
        args["hf_overrides"] = {"sliding_window": config.sliding_window}
    args = {key: value for key, value in args.items() if value is not None}
    return args | config.engine_args


def register(config: RolloutConfig, factory: Factory | str) -> None:
    """Let vLLM build the model of a config's directory by a factory."""
    for architecture in _model_config(config)["architectures"]:
        ModelRegistry.register_model(architecture, factory)


def _connect(config: RolloutConfig) -> Engine:
    folder = _tokenizer_folder(config)
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

    folder = _tokenizer_folder(config)
    tokenizer = None if folder is None else AutoTokenizer.from_pretrained(folder)

    async def make() -> Sequence[AsyncEngine]:
        return await place(config, factory)

    async def seq_length(engines: Sequence[AsyncEngine]) -> int:
        return min(each.seq_length for each in engines if isinstance(each, RayEngine))

    return EnginePool(make, seq_length, lambda _: tokenizer)


def _folder(config: RolloutConfig) -> Path:
    if config.model is None:
        raise ValueError("There is no key model. Name the model's directory.")
    return Path(config.model)


def _model_config(config: RolloutConfig) -> dict[str, Any]:
    return json.loads((_folder(config) / "config.json").read_text())


def _tokenizer_folder(config: RolloutConfig) -> str | None:
    """Where the tokenizer is: as the key says, else in the model's directory."""
    if config.tokenizer is not None:
        return config.tokenizer
    if config.model is None or not any(Path(config.model).glob("tokenizer*")):
        return None
    return config.model
