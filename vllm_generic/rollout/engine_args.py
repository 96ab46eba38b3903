# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a config says of vLLM's engine and of the model's directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.parallel_context import ParallelContext
from vllm.platforms import current_platform
from vllm_generic.rollout.config import RolloutConfig

Factory = Callable[[VllmConfig, ParallelContext], nn.Module]


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
        "skip_tokenizer_init": tokenizer_folder(config) is None,
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


def tokenizer_folder(config: RolloutConfig) -> str | None:
    """Where the tokenizer is: as the key says, else in the model's directory."""
    if config.tokenizer is not None:
        return config.tokenizer
    if config.model is None or not any(Path(config.model).glob("tokenizer*")):
        return None
    return config.model


def _folder(config: RolloutConfig) -> Path:
    if config.model is None:
        raise ValueError("There is no key model. Name the model's directory.")
    return Path(config.model)


def _model_config(config: RolloutConfig) -> dict[str, Any]:
    return json.loads((_folder(config) / "config.json").read_text())
