# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is examined: a model directory, a factory, or both, as vLLM is told of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from vllm import ModelRegistry
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm_generic.alone import make_groups_of_one

# The architecture of a factory that comes without a config.json.
NAMELESS = "ExaminedModel"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


def architecture_of(directory: Path) -> str:
    """The architecture that `config.json` in `directory` names.

    Raises:
        ValueError: There is no such file, it is no JSON, or it names none.

    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); vLLM reads the architecture and the "
            "sizes of the model from it."
        ) from error
    names = config.get("architectures") or []
    if not names:
        raise ValueError(
            f"{path} names no architecture: add "
            '"architectures": ["MyModel"], the name under which the factory is '
            "registered."
        )
    return names[0]


def has_weights(directory: Path) -> bool:
    return any(any(directory.glob(pattern)) for pattern in WEIGHTS)


def register(architecture: str, factory: Callable[..., nn.Module]) -> None:
    """Register `factory` as `ModelRegistry.register_model` of a program would.

    Raises:
        TypeError: It is a module class or a module, or does not take two arguments.

    """
    if isinstance(factory, type) and issubclass(factory, nn.Module):
        raise TypeError(
            f"{factory.__name__} is a class. vLLM takes a class for one that is "
            "written for vLLM; register a function that builds it: lambda vllm_config, "
            f"parallel_context: {factory.__name__}(...)."
        )
    ModelRegistry.register_model(architecture, cast(Callable[..., nn.Module], factory))


def widest_embedding(module: nn.Module) -> int:
    """The number of rows of the embedding in `module` that has the most.

    Raises:
        ValueError: It has none.

    """
    widths = (getattr(part, "num_embeddings", None) for part in module.modules())
    rows = [width for width in widths if isinstance(width, int)]
    if not rows:
        raise ValueError(
            f"{type(module).__name__} has no nn.Embedding, so its vocabulary is not "
            "seen; give a model directory whose config.json has vocab_size."
        )
    return max(rows)


@contextmanager
def directory_without_config(vocab_size: int) -> Iterator[Path]:
    """A model directory for a factory that does not read `config.json`."""
    with tempfile.TemporaryDirectory(prefix="vllm-doctor-") as folder:
        config = {"architectures": [NAMELESS], "vocab_size": vocab_size}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        yield Path(folder)


def config_of(arguments: EngineArgs) -> VllmConfig:
    """vLLM's config of one process, whatever the layout in `arguments`."""
    alone = replace(
        arguments,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        data_parallel_size=1,
        skip_tokenizer_init=True,
    )
    return alone.create_engine_config()


@contextmanager
def one_process(vllm_config: VllmConfig) -> Iterator[None]:
    """This process as the only worker of an engine with `vllm_config`."""
    backend = "nccl" if current_platform.is_cuda_alike() else "gloo"
    dtype = torch.get_default_dtype()
    make_groups_of_one(vllm_config, backend)
    try:
        with set_current_vllm_config(vllm_config):
            yield
    finally:
        torch.set_default_dtype(dtype)
        cleanup_dist_env_and_memory()
