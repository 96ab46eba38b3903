# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The call of a registered callable, in the worker."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import cast

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.model_executor.layers.tree_linear import layout_invariant
from vllm.model_executor.layers.tree_linear.other_layers import sum_in_tree
from vllm.model_executor.models.adapter.seen import Seen
from vllm.model_executor.models.plans.apply import apply_plans
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.placement import place, unwrap
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.engine.startup_failure import enter_stage

from .checks import check_same_on_all_ranks, check_signature
from .messages import describe, name_of
from .precision import Float32Constants
from .time_limit import time_limit

ModelFactory = Callable[..., nn.Module]
Look = Callable[[nn.Module, VllmConfig, bool], Seen | None]

SIGNATURE = "factory(vllm_config, parallel_context) -> torch.nn.Module"


def build_module(
    architecture: str,
    registered: ModelFactory | str,
    vllm_config: VllmConfig,
    prefix: str,
    look: Look | None = None,
) -> tuple[nn.Module, list[tuple[nn.Module, str]], Seen | None]:
    """Call the registered factory, check what it returned, and apply its plans.

    Args:
        architecture: The registered name.
        registered: The factory.
        vllm_config: The engine's config.
        prefix: Of the names of the model's layers in the engine.
        look: Sees what a module does, by a trial; told whether it is one stage of
            several. Default: nothing is tried.

    Returns:
        The module, on the worker's device, the float32 constants that it computed, and
        what the whole module does, if it was not written for vLLM.

    """
    context = ParallelContext.from_config(vllm_config.parallel_config)
    factory = registered
    if isinstance(factory, str):
        factory = resolve_obj_by_qualname(factory.replace(":", "."))
    takes_prefix = check_signature(architecture, factory)
    keywords = {"prefix": prefix} if takes_prefix else {}
    task = f"the registered {name_of(registered)} of {architecture}"
    enter_stage(f"building the model by {task}")
    precision = Float32Constants(cast(torch.dtype, vllm_config.model_config.dtype))
    narrow = precision.dtype in (torch.bfloat16, torch.float16)
    try:
        with time_limit(task):
            with precision if narrow else nullcontext():
                module = factory(vllm_config, context, **keywords)
            if isinstance(module, nn.Module):
                module = unwrap(module)
                check_same_on_all_ranks(architecture, module, context)
    except Exception as error:
        error.add_note(f"raised by {task}, called with {context}")
        raise
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"{architecture}: the registered {name_of(registered)} returned "
            f"{describe(module)}; expected a torch.nn.Module. The signature "
            f"wanted is {SIGNATURE}."
        )
    constants = precision.computed(module) if narrow else []
    # A module that was built before, by the caller, may lie elsewhere.
    device = cast(torch.device, vllm_config.device_config.device)
    looks: list[Seen | None] = [] if look is not None else [None]

    def look_at_whole(module: nn.Module) -> None:
        if look is not None:
            looks.append(look(place(module, device), vllm_config, False))

    module = apply_plans(module, vllm_config, context, before_cut=look_at_whole)
    if layout_invariant():
        sum_in_tree(module)
    module = place(module, device)
    if look is not None and not looks:
        looks.append(look(module, vllm_config, context.pipeline_parallel_size > 1))
    return module, constants, looks[0]
