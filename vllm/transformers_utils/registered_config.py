# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The config of a model that Transformers does not know and a user registered."""

from typing import Any

from transformers import PretrainedConfig


def registered_model_config(config_dict: dict[str, Any]) -> PretrainedConfig | None:
    """`config_dict` as it is, if it names an architecture that a user registered.

    Such a model's `config.json` needs no `model_type`, and may hold any keys; those
    that vLLM reads (`hidden_size`, `num_hidden_layers`, `num_attention_heads`,
    `vocab_size`, `max_position_embeddings`, ...) have their usual names.
    """
    from vllm.model_executor.models.registry import _VLLM_MODELS, ModelRegistry

    registered = ModelRegistry.models.keys() - _VLLM_MODELS.keys()
    if registered.isdisjoint(config_dict.get("architectures") or ()):
        return None
    if "auto_map" in config_dict:  # code of its own, behind --trust-remote-code
        return None
    return PretrainedConfig.from_dict(config_dict)
