# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Draft heads, which draft from the hidden states of their target, as EAGLE's do.

vLLM builds such a head with the config of its target and asks for two results, hidden
states for the logits and for the head's next step. It also looks for an embedding and
an output head that might be the target's.

Paper: EAGLE, https://arxiv.org/abs/2401.15077
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, cast

import torch

from vllm.config import VllmConfig
from vllm.model_executor.models.utils import get_draft_quant_config

from .checks import is_hidden_states
from .messages import describe

HIDDEN = "hidden_states"  # of the target, by vLLM's keyword


def config_of(architecture: str, vllm_config: VllmConfig) -> VllmConfig | None:
    """The config of a draft head, whose `model_config` is its own.

    None if `architecture` is no head.

    Raises:
        ValueError: The method of speculation takes vLLM's own heads only, or the engine
            has pipeline stages.

    """
    speculation = vllm_config.speculative_config
    if speculation is None or vllm_config.model_config is None:
        return None
    own = speculation.draft_model_config
    if own is None or vllm_config.model_config is own or not speculation.use_eagle():
        return None
    if architecture not in own.architectures:
        return None
    if speculation.method != "eagle":
        raise ValueError(
            f"{architecture}: speculation by {speculation.method!r} works with vLLM's "
            "own classes only. Serve a callable's head, also a layer for multi-token "
            'prediction, by method "eagle".'
        )
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            f"{architecture}: a callable's draft head was asked for with "
            f"pipeline_parallel_size="
            f"{vllm_config.parallel_config.pipeline_parallel_size}; expected 1."
        )
    # Not vLLM's replace: both have one table of layers, and are checked already.
    config = copy.copy(vllm_config)
    config.model_config = own
    config.quant_config = get_draft_quant_config(vllm_config)
    return config


def parts_of_its_own(vllm_config: VllmConfig) -> dict[str, Any]:
    """What vLLM compares with its target's embedding and head, and finds different.

    So the module keeps the layers that its checkpoint has, under any names.
    """
    model_config = vllm_config.model_config
    dtype = cast(torch.dtype, model_config.dtype)
    device = cast(torch.device, vllm_config.device_config.device)
    layer = SimpleNamespace(weight=torch.empty(0, dtype=dtype, device=device))
    return {
        "has_own_embed_tokens": True,
        "has_own_lm_head": True,
        "lm_head": layer,
        "model": SimpleNamespace(embed_tokens=layer),
    }


def inputs_of(vllm_config: VllmConfig, tokens: int) -> dict[str, torch.Tensor]:
    """What forward gets beside token ids and positions, of zeros."""
    model_config = vllm_config.model_config
    shape = (tokens, model_config.get_hidden_size())
    dtype = cast(torch.dtype, model_config.dtype)
    device = vllm_config.device_config.device
    return {HIDDEN: torch.zeros(shape, dtype=dtype, device=device)}


def results(
    architecture: str, found: Any, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states `[tokens, hidden]` for logits, and for the head's next step.

    Raises:
        ValueError: The head returned something else.

    """
    both = found if isinstance(found, tuple) else (found, found)
    if len(both) != 2 or not all(is_hidden_states(part, tokens) for part in both):
        raise ValueError(
            f"{architecture}: the draft head returned {describe(found)} for {tokens} "
            f"tokens; expected hidden states [{tokens}, hidden], or two of them: for "
            "the logits, and for the head's next step."
        )
    return both
