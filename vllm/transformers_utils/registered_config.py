# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The config of a model that a user registered: it has every key of `config.json`.

Transformers drops keys that belong to a generation config (`top_k`, `use_cache`), and
rewrites others (`rope_scaling`, `dtype`) as its own models expect them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from vllm.transformers_utils.auto_map import model_reference

Overrides = Mapping[str, Any] | Callable[[PretrainedConfig], PretrainedConfig] | None


class RegisteredModelConfig(PretrainedConfig):
    """`config.json` as it is: each key is an attribute that has the value in the file.

    What the file lacks has the defaults of `PretrainedConfig`.
    """

    def __init__(self, **values: Any) -> None:
        super().__init__()
        vars(self).update(copy.deepcopy(values))

    # A key of the file comes before a property of that name in Transformers' class,
    # because some properties return the value of another key.
    def __getattribute__(self, name: str) -> Any:
        values = object.__getattribute__(self, "__dict__")
        return values[name] if name in values else super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or name == "name_or_path":
            super().__setattr__(name, value)  # Transformers' own
        else:
            vars(self)[name] = value

    def to_dict(self) -> dict[str, Any]:
        values = copy.deepcopy(vars(self))
        own = {name: values[name] for name in values if not name.startswith("_")}
        return super().to_dict() | own

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """The config itself, or its `text_config` if only that says what vLLM reads."""
        values = vars(self)
        text_config = values.get("text_config")
        if isinstance(text_config, dict) and "num_attention_heads" not in values:
            return RegisteredModelConfig(**text_config)
        return self


def registered_model_config(
    config_dict: dict[str, Any],
    model_type: str | None,
    overrides: Overrides,
    trust_remote_code: bool,
    known: Container[str],
) -> RegisteredModelConfig | None:
    """`config_dict` as it is, if its model is registered or is code beside it.

    None if another class reads the config: its `model_type` is one that Transformers
    has, or is in `known`; or the class is code, too. vLLM reads `hidden_size`,
    `num_hidden_layers`, `num_attention_heads`, `vocab_size` and
    `max_position_embeddings`.

    Raises:
        ValueError: the model is code beside the config, which is not trusted.

    """
    from vllm.model_executor.models.registry import ModelRegistry

    auto_map = config_dict.get("auto_map") or {}
    if model_type in CONFIG_MAPPING or model_type in known or "AutoConfig" in auto_map:
        return None
    config = RegisteredModelConfig(**config_dict)
    # Where none is named, `hf_overrides` may name one that is not known here.
    architectures = _architectures(config, overrides) or list(ModelRegistry.models)
    if not is_registered(architectures):
        reference = model_reference(auto_map)
        if reference is None:
            return None
        if not trust_remote_code:
            raise ValueError(
                f"config.json names {reference} as its model, in auto_map, which is "
                "code of the model's own. If you trust it, run it with "
                "`trust_remote_code=True` or `--trust-remote-code`."
            )
    return config


def keep_keys(
    config: PretrainedConfig, config_dict: Mapping[str, Any], overrides: Overrides
) -> None:
    """Give the config of a registered model the keys that its class dropped."""
    if is_registered(_architectures(config, overrides)):
        _restore(config, config_dict)


def _restore(config: PretrainedConfig, config_dict: Mapping[str, Any]) -> None:
    for key, value in config_dict.items():
        if not hasattr(config, key):
            setattr(config, key, copy.deepcopy(value))
        part = getattr(config, key)
        if isinstance(part, PretrainedConfig) and isinstance(value, Mapping):
            _restore(part, value)


def generation_source(config: PretrainedConfig) -> PretrainedConfig:
    """The part of `config` that sampling may use: special tokens only.

    A registered model's `top_k` may be its number of experts.
    """
    own = isinstance(config, RegisteredModelConfig)
    if not own and not is_registered(config.architectures):
        return config
    tokens = {k: v for k, v in config.to_dict().items() if k.endswith("_token_id")}
    return PretrainedConfig(**tokens)


def named_dtype(config: PretrainedConfig, dtype: torch.dtype | str) -> torch.dtype:
    """The dtype that `config.json` names, or else the one that vLLM found."""
    if isinstance(config, RegisteredModelConfig):
        values = vars(config)
        for value in (values.get("dtype"), values.get("torch_dtype")):
            named = value
            if isinstance(value, str):
                named = getattr(torch, value.removeprefix("torch."), None)
            if isinstance(named, torch.dtype):
                return named
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def requested_dtype(
    config: PretrainedConfig, dtype: str | torch.dtype
) -> str | torch.dtype:
    """The dtype that a user asked for; "auto" may become float32.

    vLLM's "auto" serves a float32 model in half precision. A registered callable also
    trains, and a framework that makes the engine itself passes no dtype. So where the
    `config.json` of a callable names float32, "auto" is float32. A "module:name" may be
    a class, which keeps vLLM's rule.
    """
    from vllm.model_executor.models.registry import (
        _LazyRegisteredModel,
        _RegisteredModel,
    )

    is_callable = any(
        not isinstance(model, _LazyRegisteredModel | _RegisteredModel)
        for model in _entries(config.architectures)
    )
    named = {str(getattr(config, key, None)) for key in ("dtype", "torch_dtype")}
    names_float32 = not named.isdisjoint({"float32", "torch.float32"})
    return torch.float32 if dtype == "auto" and is_callable and names_float32 else dtype


def is_registered(architectures: list[str] | None) -> bool:
    """Whether a user registered one of `architectures`, maybe in place of vLLM's."""
    from vllm.model_executor.models.registry import _LazyRegisteredModel

    # Only vLLM's own entries are of this class.
    return any(
        type(model) is not _LazyRegisteredModel for model in _entries(architectures)
    )


def _entries(architectures: list[str] | None) -> list[Any]:
    """What the registry holds for those of `architectures` that it knows."""
    from vllm.model_executor.models.registry import ModelRegistry

    models = map(ModelRegistry.models.get, architectures or ())
    return [model for model in models if model is not None]


def _architectures(config: PretrainedConfig, overrides: Overrides) -> list[str] | None:
    """The architectures, once the user's `hf_overrides` are applied."""
    if callable(overrides):
        return overrides(copy.deepcopy(config)).architectures
    return (overrides or {}).get("architectures", config.architectures)
