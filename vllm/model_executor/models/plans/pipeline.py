# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Pipeline parallelism: a module cut into the stages that its `pp_plan` allows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.model_executor.models.plans.layers import become
from vllm.model_executor.models.plans.patterns import (
    STACKS,
    kind_of,
    owners,
    resolve_pattern,
)
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.model_executor.parallel_context import ParallelContext
from vllm.sequence import IntermediateTensors

# vLLM's name for the tensor between pipeline stages, the only one of most models.
HIDDEN_STATES = "hidden_states"


@dataclass(frozen=True)
class Stages:
    """Where a `pp_plan` lets a module be cut.

    Args:
        before: The names of the modules that only the first stage needs.
        stack: The name of the stack of layers.
        after: The names of the modules that only the last stage needs.
        layer_input: The argument by which a layer takes hidden states.

    """

    before: list[str]
    stack: str
    after: list[str]
    layer_input: str


def match_stages(module: nn.Module, plan: Mapping[str, Any]) -> Stages | None:
    """The stack of layers, and the modules before and after it; None without a plan.

    Raises:
        ValueError: The plan does not fit the module.

    """
    if not plan:
        return None
    parts = dict(module.named_modules())
    names = [name for name in parts if name]
    no_split = {
        kind
        for part in parts.values()
        for kind in getattr(part, "_no_split_modules", None) or ()
    }
    found: dict[str, str] = {}
    for pattern in plan:
        matches = resolve_pattern(module, "pp_plan", pattern, names)
        if len(matches) > 1:
            raise ValueError(
                f"{kind_of(module)}: pp_plan has {pattern!r}, which matches "
                f"{' and '.join(matches)}. Name one module."
            )
        (name,) = matches
        for other in found:
            if f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}."):
                raise ValueError(
                    f"{kind_of(module)}: pp_plan names {name} twice, by "
                    f"{found[other]!r} and by {pattern!r}. Leave one out."
                )
        cut_inside = list(owners(name))
        if isinstance(parts[name], STACKS):
            cut_inside.append(name)
        for owner in cut_inside:
            if kind_of(parts[owner]) in no_split:
                raise ValueError(
                    f"{kind_of(module)}: pp_plan has {pattern!r}, which cuts inside "
                    f"{owner or 'the module'}, a {kind_of(parts[owner])}; "
                    "_no_split_modules keeps that whole. Name the stack that holds it."
                )
        found[name] = pattern
    stacks = [name for name in found if isinstance(parts[name], STACKS)]
    if len(stacks) != 1:
        raise ValueError(
            f"{kind_of(module)}: pp_plan names {len(stacks)} stacks of layers "
            f"({', '.join(stacks) or 'no ModuleList or ModuleDict'}) by "
            f"{', '.join(map(repr, plan))}; expected one."
        )
    (stack,) = stacks
    inputs, outputs = plan[found[stack]]
    if not inputs or len(outputs) != 1:
        raise ValueError(
            f"{kind_of(module)}: pp_plan has {found[stack]!r}: {plan[found[stack]]!r}; "
            "expected ([hidden states, ...], [hidden states]), because a stage hands "
            "over one tensor."
        )
    before, after = [], []
    seen_stack = False
    for name, pattern in found.items():
        if name == stack:
            seen_stack = True
            continue
        # Transformers puts a model's own entries, such as the head's, before those of
        # its base model. So what goes in and comes out says more than their order.
        taken, made = plan[pattern]
        if not set(taken) & set(outputs):
            before.append(name)
        elif seen_stack or not set(made) & set(inputs):
            after.append(name)
        else:
            before.append(name)
    return Stages(before, stack, after, inputs[0])


class Boundary:
    """Hidden states `[tokens, hidden]` at the ends of a stage, during one forward."""

    received: Any = None
    sent: Any = None


class StandIn(nn.Module):
    """Base of the stubs for modules that another stage runs."""

    stage_boundary: Boundary
    layer_input: str


class EarlierStage(StandIn):
    """Stand-in for an earlier stage's modules; returns the received hidden states.

    They get the leading axes of its input, which may be `[1, tokens]` in a module that
    works on batches.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        received = self.stage_boundary.received  # [tokens, hidden]
        given = _first(args, kwargs)
        if received is None or not isinstance(given, torch.Tensor):
            return received
        axes = given.shape[:-1] if given.is_floating_point() else given.shape
        if len(axes) < 2:
            return received
        return received.reshape(*axes, received.shape[-1])


class LaterLayer(StandIn):
    """Stand-in for a later layer; keeps its input to be sent."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args and self.layer_input in kwargs:
            args = (kwargs[self.layer_input],)
        self.stage_boundary.sent = _first(args, kwargs)
        return self.stage_boundary.sent


class AfterStack(StandIn):
    """Stand-in for a later stage's modules after the stack; returns its input."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _first(args, kwargs)


def is_run_here(module: nn.Module, path: str) -> bool:
    """Whether this stage runs the submodule at `path`, which the whole module had."""
    part = module
    for name in filter(None, path.split(".")):
        if isinstance(part, StandIn):
            return False
        part = part.get_submodule(name)
    return not isinstance(part, StandIn)


def run_stage(
    module: nn.Module, received: IntermediateTensors | None, call: Callable[[], Any]
) -> Any:
    """What `call` makes of `module`, which takes no tensors of an earlier stage itself.

    Args:
        module: Whole, or cut into stages.
        received: From the stage before.
        call: Calls the module, or a part of it that holds the stack of layers.

    Returns:
        What is handed to the next stage, or on the last stage the result of `call`.

    """
    boundary = getattr(module, "stage_boundary", None)
    if boundary is None:
        return call()
    try:
        if received is not None:
            boundary.received = received[HIDDEN_STATES]
        result = call()
        if boundary.sent is not None:  # the module's own forward was not called
            result = IntermediateTensors({HIDDEN_STATES: boundary.sent.flatten(0, -2)})
    finally:
        boundary.received = boundary.sent = None
    return result


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def cut_stage(
    module: nn.Module,
    stages: Stages,
    vllm_config: VllmConfig,
    context: ParallelContext,
) -> None:
    """Leave of `module` what this stage computes, and hand over at its ends.

    Args:
        module: The whole module, maybe divided for tensor parallelism before.
        stages: From `match_stages`.
        vllm_config: The engine's config. Attention layers that other stages own leave
            its `static_forward_context`.
        context: The place of this rank.

    Raises:
        ValueError: A stage is left without layers, or two share the weights of one.

    """
    boundary = Boundary()
    missing = _missing(module, stages, context)
    kept = {
        id(parameter)
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not any(name.startswith(f"{part}.") for part in missing)
    }
    attention = vllm_config.compilation_config.static_forward_context
    for name, stand_in in missing.items():
        part = module.get_submodule(name)
        if not any(id(parameter) in kept for parameter in part.parameters()):
            gone = {id(layer) for layer in part.modules()}
            for layer_name, layer in list(attention.items()):
                if id(layer) in gone:
                    del attention[layer_name]
            part = PPMissingLayer()
            module.set_submodule(name, part)
        elif name.startswith(f"{stages.stack}."):
            raise ValueError(
                f"{kind_of(module)}: {name} shares weights with another pipeline "
                "stage, which layers of a stack cannot. Use one stage."
            )
        # Else it is tied to a weight of this stage: it stays, to load by either name,
        # but it is not run.
        become(
            part,
            stand_in,
            stage_boundary=boundary,
            layer_input=stages.layer_input,
        )
    _hand_over(module, boundary, context)


def _missing(
    module: nn.Module, stages: Stages, context: ParallelContext
) -> dict[str, type[StandIn]]:
    """The stub for each module that this stage does not run, by the module's name."""
    layers = list(module.get_submodule(stages.stack)._modules)
    for rank in range(context.pipeline_parallel_size):
        if not replace(context, pipeline_parallel_rank=rank).layer_range(len(layers)):
            raise ValueError(
                f"{kind_of(module)}: pipeline stage {rank} of "
                f"{context.pipeline_parallel_size} is left empty: {stages.stack!r} has "
                f"{len(layers)} layers. Use fewer stages."
            )
    owned = context.layer_range(len(layers))
    missing: dict[str, type[StandIn]] = {}
    if not context.is_first_stage:
        missing |= dict.fromkeys(stages.before, EarlierStage)
    for index, layer in enumerate(layers):
        if index not in owned:
            earlier = index < owned.start
            missing[f"{stages.stack}.{layer}"] = EarlierStage if earlier else LaterLayer
    if not context.is_last_stage:
        missing |= dict.fromkeys(stages.after, AfterStack)
    return missing


def _hand_over(module: nn.Module, boundary: Boundary, context: ParallelContext) -> None:
    """Have `module`'s forward take and return what stages hand to each other."""
    signature = inspect.signature(module.forward)
    declared = "intermediate_tensors" in signature.parameters
    is_last_stage = context.is_last_stage

    class Stage(nn.Module):
        stage_boundary: Boundary

        def forward(
            self,
            *args: Any,
            intermediate_tensors: IntermediateTensors | None = None,
            **kwargs: Any,
        ) -> Any:
            if intermediate_tensors is not None:
                self.stage_boundary.received = intermediate_tensors[HIDDEN_STATES]
            if declared:
                kwargs["intermediate_tensors"] = intermediate_tensors
            result = super().forward(*args, **kwargs)
            if not is_last_stage:
                sent = self.stage_boundary.sent
                if isinstance(sent, torch.Tensor):
                    sent = sent.flatten(0, -2)  # [tokens, hidden], also of batches
                result = IntermediateTensors({HIDDEN_STATES: sent})
            self.stage_boundary.received = self.stage_boundary.sent = None
            return result

    if not declared:
        signature = _with_intermediate_tensors(signature)
    bound = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    Stage.forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[bound, *signature.parameters.values()]
    )
    become(module, Stage, stage_boundary=boundary)


def _with_intermediate_tensors(signature: inspect.Signature) -> inspect.Signature:
    parameters = list(signature.parameters.values())
    at = len(parameters)
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        at -= 1
    keyword = inspect.Parameter(
        "intermediate_tensors", inspect.Parameter.KEYWORD_ONLY, default=None
    )
    return signature.replace(parameters=[*parameters[:at], keyword, *parameters[at:]])
