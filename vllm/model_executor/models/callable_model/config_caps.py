# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Caps and scales that config.json has, and a module written for vLLM leaves out.

Hugging Face's classes apply them in their own attention and forward. A module that
takes over only their layers has to apply them again, and nothing else would tell that
it does not.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.trainable_attention import TrainableAttention

ATTENTION_CAP = "attn_logit_softcapping"
OF_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def check_caps(architecture: str, module: nn.Module, model_config: Any) -> None:
    """Whether what `config.json` says of scores and logits is in `module`.

    Raises:
        ValueError: Attention has no cap, or nothing computes the logits with theirs.

    """
    config = model_config.hf_text_config
    cap = getattr(config, ATTENTION_CAP, None)
    layers = [
        layer
        for layer in module.modules()
        if isinstance(layer, TrainableAttention | Attention)
    ]
    if cap and layers and not any(map(_has_cap, layers)):
        raise ValueError(
            f"{architecture}: config.json has {ATTENTION_CAP} {cap}, but no attention "
            f"layer of {type(module).__name__} has a cap. Build them with "
            f"logits_soft_cap={cap}, or take the key out of config.json."
        )
    if hasattr(module, "compute_logits") or model_config.runner_type == "pooling":
        return
    for name in OF_LOGITS:
        value = getattr(config, name, None)
        if value not in (None, 0, 1):
            raise ValueError(
                f"{architecture}: config.json has {name} {value}, but "
                f"{type(module).__name__} returns hidden states, and its head alone "
                "does not apply that. Give it a compute_logits(self, hidden_states) "
                "that does, or take the key out of config.json."
            )


def _has_cap(layer: nn.Module) -> bool:
    owner = layer.impl if isinstance(layer, Attention) else layer
    return bool(getattr(owner, "logits_soft_cap", None))
