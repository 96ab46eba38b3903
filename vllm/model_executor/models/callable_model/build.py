# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The call of a registered callable, in the worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.distributed import get_world_group, model_parallel_is_initialized
from vllm.distributed.text_collectives import all_gather_text
from vllm.logger import init_logger
from vllm.model_executor.layers.tree_linear import layout_invariant
from vllm.model_executor.layers.tree_linear.other_layers import sum_in_tree
from vllm.model_executor.models.adapter.seen import Seen
from vllm.model_executor.models.plans.apply import apply_plans
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.placement import place, unwrap
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.engine.startup_failure import enter_stage

from .checks import check_same_on_all_ranks, check_signature
from .empty_parameters import EmptyParameters, any_values, needs_values
from .messages import describe, name_of
from .precision import Float32Constants, keep_float32
from .quantized_linears import quantize_linears
from .time_limit import time_limit

logger = init_logger(__name__)

ModelFactory = Callable[..., nn.Module]
Look = Callable[[nn.Module, VllmConfig, bool], Seen | None]
PlanFor = Callable[[nn.Module, VllmConfig, ParallelContext], Mapping[str, str] | None]

SIGNATURE = "factory(vllm_config, parallel_context) -> torch.nn.Module"


def build_module(
    architecture: str,
    registered: ModelFactory | str,
    vllm_config: VllmConfig,
    prefix: str,
    look: Look | None = None,
    plan_for: PlanFor | None = None,
    keep_values: bool = False,
) -> tuple[nn.Module, list[tuple[nn.Module, str]], Seen | None]:
    """Call the registered factory, check what it returned, and apply its plans.

    Args:
        architecture: The registered name.
        registered: The factory.
        vllm_config: The engine's config.
        prefix: Of the names of the model's layers in the engine.
        look: Sees what a module does, by a trial; told whether it is one stage of
            several. Default: nothing is tried.
        keep_values: Parameters keep the values that the factory gives them. Else they
            are NaN until they are loaded, if nothing else depends on them.
        plan_for: The `tp_plan` in the place of a module's own, if it has one to give.

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
    dtype = cast(torch.dtype, vllm_config.model_config.dtype)
    device = torch.device(cast(torch.device | str, vllm_config.device_config.device))
    keep_float32(dtype, device)
    narrow = dtype in (torch.bfloat16, torch.float16)
    built = _Call(lambda: factory(vllm_config, context, **keywords), dtype, narrow)
    try:
        with time_limit(task):
            if keep_values:
                module, precision = built()
            else:
                module, precision = _without_values(
                    built, architecture, vllm_config, context
                )
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
    looks: list[Seen | None] = [] if look is not None else [None]

    def tried(module: nn.Module, is_stage: bool) -> Seen | None:
        assert look is not None
        empty = [p for p in module.parameters() if p.is_meta]
        module = place(module, device)
        try:
            with any_values(empty):
                return look(module, vllm_config, is_stage)
        except Exception as error:
            if (ranks := context.tensor_parallel_size) > 1:
                heads = vllm_config.model_config.get_total_num_kv_heads()
                error.add_note(
                    f"It was tried as one of {ranks} tensor-parallel ranks has it. Of "
                    f"each projection a rank needs whole heads, and config.json has "
                    f"{heads} for keys and values."
                )
            raise

    def look_at_whole(module: nn.Module) -> None:
        if look is not None:
            looks.append(tried(module, False))

    given = None if plan_for is None else plan_for(module, vllm_config, context)
    module = apply_plans(module, vllm_config, context, look_at_whole, given)
    if layout_invariant():
        sum_in_tree(module)
    if look is not None and not looks:
        looks.append(tried(module, context.pipeline_parallel_size > 1))
    head = looks[0].head.layer if looks[0] and looks[0].head else None
    quantize_linears(architecture, module, vllm_config, context, prefix, head)
    # A module that was built before, by the caller, may lie elsewhere.
    module = place(module, device)
    return module, constants, looks[0]


@dataclass(frozen=True)
class _Call:
    """A factory's call, which may be made twice."""

    factory: Callable[[], Any]
    dtype: torch.dtype
    narrow: bool

    def __call__(self) -> tuple[Any, Float32Constants]:
        precision = Float32Constants(self.dtype)
        with precision if self.narrow else nullcontext():
            return self.factory(), precision


def _without_values(
    call: _Call, architecture: str, vllm_config: VllmConfig, context: ParallelContext
) -> tuple[Any, Float32Constants]:
    """What the factory returns, with its parameters on the meta device if possible.

    Where it is not, on any rank, all ranks call the factory again and keep its values.
    """
    compilation = vllm_config.compilation_config
    known = set(compilation.static_forward_context)
    empty = EmptyParameters(torch.get_default_device())
    # As in the call without it, precision is the outer mode.
    inner = replace(call, factory=lambda: _call_in(empty, call.factory))
    why = None
    try:
        module, precision = inner()
        if isinstance(module, nn.Module):
            why = empty.problem(unwrap(module))
    except Exception as error:
        # Any other error is raised at once: other ranks may wait for this one in a
        # collective of the factory's, and never come to agree with it.
        if not needs_values(error):
            raise
        why = f"the factory needs them ({str(error).strip().partition(chr(10))[0]})"
    ranks = context.tensor_parallel_size * context.pipeline_parallel_size
    if ranks > 1 and model_parallel_is_initialized():
        answers = all_gather_text(why or "", get_world_group().cpu_group)
        why = next(filter(None, answers), None)
    if why is None:
        return module, precision
    logger.info(
        "%s: parameters get memory and initial values before they are loaded: %s.",
        architecture,
        why,
    )
    module = None
    for name in set(compilation.static_forward_context) - known:
        del compilation.static_forward_context[name]
    return call()


def _call_in(mode: EmptyParameters, factory: Callable[[], Any]) -> Any:
    with mode:
        return factory()
