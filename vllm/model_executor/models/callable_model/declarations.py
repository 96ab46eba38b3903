# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether what is declared of a registered callable is true.

It is checked when it is declared, as far as it can be; the rest is checked on the
module, before it loads its weights.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn
from typing_extensions import is_protocol

from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.distributed.text_collectives import all_gather_text
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.pooler import Pooler
from vllm.model_executor.models.adapter.adapter import Adapter
from vllm.model_executor.parallel_context import ParallelContext
from vllm.v1.attention.backend import AttentionType

from .capabilities import BY_NAME, CAPABILITIES, NOT_DECLARED, STATES, Need
from .messages import describe

INTERFACES = "vllm.model_executor.models.interfaces"

# What says that layers have states.
STATEFUL = ("is_hybrid", "has_inner_state")

# What a pooler has to do for pairs of texts that are scored so.
SCORE_TASKS = {"cross-encoder": "classify", "late-interaction": "token_embed"}


def check_capabilities(
    architecture: str, capabilities: Mapping[str, Any], adapter: Any = None
) -> None:
    """Check what a caller declares, by its names and values.

    Raises:
        TypeError: a name that vLLM does not ask for, or that is not declared.
        ValueError: a value that the capability cannot have.

    """
    if adapter is not None and not isinstance(adapter, Adapter):
        raise TypeError(
            f"{architecture}: adapter is {describe(adapter)}; expected an Adapter of "
            "vllm.model_executor.models.adapter."
        )
    for name, value in capabilities.items():
        if name in NOT_DECLARED:
            inherit = (
                " A class in the callable's return annotation has it by inheriting "
                "vLLM's interface."
                if "class" in NOT_DECLARED[name]
                else ""
            )
            raise TypeError(
                f"{architecture}: {name!r} is not declared, because "
                f"{NOT_DECLARED[name]}. Leave it out.{inherit}"
            )
        if name not in BY_NAME:
            near = difflib.get_close_matches(name, BY_NAME, n=3) or sorted(BY_NAME)
            raise TypeError(
                f"{architecture}: {name!r} is not a capability that vLLM asks for; "
                f"did you mean {', '.join(near)}?"
            )
        values = BY_NAME[name].values
        if not isinstance(value, type(values[0])) or value not in values:
            known = ", ".join(map(repr, dict.fromkeys(values)))
            raise ValueError(
                f"{architecture}: {name} is {value!r}; expected one of {known}."
            )


def check_tp_plan(architecture: str, plan: Any) -> None:
    """Check the form of a `tp_plan` that was given with a callable.

    Raises:
        TypeError: it is neither a plan nor "auto".

    """
    if plan is not None and plan != "auto" and not isinstance(plan, Mapping):
        raise TypeError(
            f"{architecture}: tp_plan is {plan!r}; expected 'auto', or a dictionary "
            "with names of modules as keys."
        )


def check_class(
    architecture: str,
    attributes: Mapping[str, Any],
    annotated: type[nn.Module] | None,
) -> None:
    """Check what vLLM will ask of the model's class, before it is built.

    Args:
        architecture: the name the callable is registered under.
        attributes: of the class by which the callable is known to vLLM.
        annotated: the class in the callable's return annotation.

    Raises:
        TypeError: a declared capability lacks something.

    """
    for capability in CAPABILITIES:
        if not capability.is_declared(attributes):
            continue
        others = capability.together_with
        if others and not any(BY_NAME[o].is_declared(attributes) for o in others):
            names = " or ".join(others)
            raise TypeError(
                f"{architecture}: {capability.name} is declared without {names}, and "
                f"means nothing alone. Declare {names} too, or leave it out."
            )
        missing = [
            need
            for need in capability.of_class
            if not _is_written(need.name, attributes, annotated)
        ]
        if missing:
            where = (
                "the callable has no return annotation that names one"
                if annotated is None
                else f"{annotated.__name__}, which the callable's return annotation "
                "names, does not have it"
            )
            raise TypeError(
                f"{architecture}: {capability.name} is declared. vLLM asks the model's "
                f"class for {_listed(missing)}; but {where}. Write `-> Model` as the "
                "return annotation, of a class that inherits "
                f"{INTERFACES}.{capability.interface} and has "
                f"{'it' if len(missing) == 1 else 'them'}."
            )


def check_module(
    architecture: str, attributes: Mapping[str, Any], module: nn.Module
) -> None:
    """Check what vLLM will ask of the module that the callable returned.

    Raises:
        TypeError: a declared capability lacks something.

    """
    for capability in CAPABILITIES:
        if not capability.is_declared(attributes):
            continue
        missing = [n for n in capability.of_module if not hasattr(module, n.name)]
        if missing:
            raise TypeError(
                f"{architecture}: {capability.name} is declared, but "
                f"{type(module).__name__} lacks {_listed(missing)}. Add "
                f"{'it' if len(missing) == 1 else 'them'}, or leave "
                f"{capability.name} out{capability.instead}."
            )
    if BY_NAME["is_pooling_model"].is_declared(attributes):
        pooler: Any = module.pooler
        if not isinstance(pooler, Pooler):
            raise TypeError(
                f"{architecture}: pooler of {type(module).__name__} is "
                f"{describe(pooler)}; expected a Pooler of "
                "vllm.model_executor.layers.pooler."
            )
        score = attributes.get("score_type", "bi-encoder")
        task = SCORE_TASKS.get(score)
        if task is not None and task not in pooler.get_supported_tasks():
            raise TypeError(
                f"{architecture}: score_type is {score!r}, for which the pooler needs "
                f"the task {task!r}; it has "
                f"{', '.join(sorted(pooler.get_supported_tasks()))}. Give it that "
                "task, or leave score_type out."
            )


def check_layers(
    architecture: str,
    attributes: Mapping[str, Any],
    layers: Mapping[str, Any],
    vllm_config: VllmConfig,
    context: ParallelContext,
) -> None:
    """Compare what is declared of attention and states with the layers that were built.

    All pipeline stages call this together: a state may be on another one.

    Args:
        architecture: the name the callable is registered under.
        attributes: of the class by which the callable is known to vLLM.
        layers: those with a cache of vLLM's or an attention kernel, by their prefix.
        vllm_config: of the engine.
        context: of this rank.

    Raises:
        ValueError: they differ.

    """
    model_config = vllm_config.model_config
    states = {n: layer for n, layer in layers.items() if isinstance(layer, MambaBase)}
    attention = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, AttentionLayerBase) and name not in states
    }
    both_ways = [
        name
        for name, layer in attention.items()
        if getattr(layer, "attn_type", None) == AttentionType.ENCODER_ONLY
    ]
    pooling = model_config.runner_type == "pooling"
    if both_ways and pooling and model_config.attn_type != "encoder_only":
        raise ValueError(
            f"{architecture}: tokens of {both_ways[0]} see later tokens too, so a "
            "sequence has to be read in one step, but vLLM is told that attention is "
            f"{model_config.attn_type!r}. Register with attn_type='encoder_only', or "
            "write is_causal: false into config.json."
        )
    if attention and BY_NAME["is_attention_free"].is_declared(attributes):
        raise ValueError(
            f"{architecture}: is_attention_free is declared, but "
            f"{next(iter(attention))} is attention. Leave is_attention_free out."
        )
    of_vllm = [name for name, layer in states.items() if has_state_of_vllm(layer)]
    if of_vllm and vllm_config.cache_config.mamba_block_size is None:
        raise ValueError(
            f"{architecture}: {of_vllm[0]} ({type(states[of_vllm[0]]).__name__}) has a "
            "state, of which vLLM knows nothing. Write `-> Model` as the callable's "
            f"return annotation, of a class that inherits {INTERFACES}.IsHybrid and "
            f"has {', '.join(need.text for need in STATES)}."
        )
    declared = [c for c in STATEFUL if BY_NAME[c].is_declared(attributes)]
    if not declared:
        return
    any_state = bool(states)
    if context.pipeline_parallel_size > 1:
        answers = all_gather_text("yes" * any_state, get_pp_group().cpu_group)
        any_state = "yes" in answers
    if not any_state:
        raise ValueError(
            f"{architecture}: {declared[0]} is declared, but no layer has a state that "
            f"vLLM keeps. Leave {declared[0]} out."
        )


def has_state_of_vllm(layer: object) -> bool:
    """Whether `layer` is one of vLLM's with a state, as Mamba's are.

    Layers of PreviousTokens, which are not vLLM's, size their own blocks.
    """
    sized_by_vllm = MambaBase.get_kv_cache_spec
    return (
        isinstance(layer, MambaBase) and type(layer).get_kv_cache_spec is sized_by_vllm
    )


def _is_written(
    name: str, attributes: Mapping[str, Any], annotated: type[nn.Module] | None
) -> bool:
    """Whether the model has `name`, and not only the empty one of an interface."""
    for base in () if annotated is None else annotated.__mro__:
        if name in base.__dict__:
            return not is_protocol(base)
    return name in attributes


def _listed(needs: list[Need]) -> str:
    return "; ".join(f"{need.text}, which {need.why}" for need in needs)
