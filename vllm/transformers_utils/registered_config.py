# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The config of a model that Transformers does not know and a user registered."""

from typing import Any

from transformers import PretrainedConfig

from vllm.transformers_utils.auto_map import model_reference


def registered_model_config(
    config_dict: dict[str, Any], trust_remote_code: bool
) -> PretrainedConfig | None:
    """`config_dict` as it is, if its model is registered or is code beside it.

    Such a model's `config.json` needs no `model_type`, and may hold any keys; those
    that vLLM reads (`hidden_size`, `num_hidden_layers`, `num_attention_heads`,
    `vocab_size`, `max_position_embeddings`, ...) have their usual names.

    Raises:
        ValueError: the model is code beside the config, which is not trusted.

    """
    from vllm.model_executor.models.registry import _VLLM_MODELS, ModelRegistry

    auto_map = config_dict.get("auto_map") or {}
    if "AutoConfig" in auto_map:  # the config is code, too
        return None
    registered = ModelRegistry.models.keys() - _VLLM_MODELS.keys()
    if registered.isdisjoint(config_dict.get("architectures") or ()):
        reference = model_reference(auto_map)
        if reference is None:
            return None
        if not trust_remote_code:
            raise ValueError(
                f"config.json names {reference} as its model, in auto_map, which is "
                "code of the model's own. If you trust it, run it with "
                "`trust_remote_code=True` or `--trust-remote-code`."
            )
    return PretrainedConfig.from_dict(config_dict)
