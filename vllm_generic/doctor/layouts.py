# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How ranks would divide a module by its plans, without the memory or the ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.plans import apply_plans
from vllm.model_executor.models.plans.patterns import find_plan
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.layout import MARK

TENSOR_SIZES = (2, 4, 8)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Of different tensors; one that is met twice counts once."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def gigabytes(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size / 1e3:.1f} kB"


def divided_by_factory(module: nn.Module) -> str | None:
    """Whose layers divide themselves over ranks, if `module` has such."""
    for part in module.modules():
        if isinstance(part, LinearBase | VocabParallelEmbedding):
            return "vLLM's layers"
        for parameter in part.parameters(recurse=False):
            if isinstance(parameter, DTensor):
                return "DTensor"
            if hasattr(parameter, MARK):
                return "megatron-core's layers"
    return None


def has_plan(module: nn.Module, name: str, vllm_config: VllmConfig) -> bool:
    """Whether `module` has the plan `name`, or inherits one that would divide it."""
    return bool(find_plan(module, name, vllm_config.model_config.hf_config, True))


def bytes_of_ranks(
    module: nn.Module, vllm_config: VllmConfig, tensor_size: int, stages: int
) -> list[int]:
    """Bytes of parameters on the first tensor-parallel rank of each stage.

    Raises:
        ValueError: The plans cannot divide the module so.

    """
    sizes = []
    for stage in range(stages):
        context = replace(
            ParallelContext.from_config(vllm_config.parallel_config),
            tensor_parallel_size=tensor_size,
            pipeline_parallel_size=stages,
            pipeline_parallel_rank=stage,
        )
        part = apply_plans(_without_data(module), vllm_config, context)
        sizes.append(bytes_of(part.parameters()))
    return sizes


def _without_data(module: nn.Module) -> nn.Module:
    """A copy of `module` on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(module, memo)
