# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How registrations travel: inside the `ModelConfig`, wherever that goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.model_executor.model_loader.utils import _MODEL_ARCH_BY_HASH
from vllm.model_executor.models.registry import (
    _VLLM_MODELS,
    _BaseRegisteredModel,
    _LazyRegisteredModel,
    _try_inspect_model_cls,
    _try_load_model_cls,
)
from vllm.transformers_utils.auto_map import auto_map_model
from vllm.utils.func_utils import _supports_kw

from .registration import _CallableRegisteredModel

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.model_executor.models.registry import _ModelRegistry


def registry_of(model_config: ModelConfig, registry: _ModelRegistry) -> _ModelRegistry:
    """`registry`, with the callables it had where `model_config` was made.

    The first call, while the config is made, puts them into the config; there they
    are pickled with it, so that other processes find them, whatever those have
    registered themselves.
    """
    carried = vars(model_config).get("_registered_callables")
    if carried is None:
        names = {
            registry._normalize_arch(arch, model_config)
            for arch in model_config.architectures
        }
        carried = {
            name: registry.models[name]
            for name in names
            if name in registry.models and _travels(name, registry.models[name])
        }
        own = None if carried else auto_map_model(model_config, registry.models)
        if own is not None:
            # Whether it has a plan for pipeline stages is known when it is built.
            carried = {
                arch: _CallableRegisteredModel(arch, own, {"supports_pp": True})
                for arch in model_config.architectures
            }
        vars(model_config)["_registered_callables"] = carried
        if carried:
            _forget_resolved_classes()
    if not carried:
        return registry
    return type(registry)({**registry.models, **carried})


def _forget_resolved_classes() -> None:
    """Empty vLLM's caches of them, which keep what was registered before alive."""
    # The last by the __init__ of a class that is decorated to be compiled.
    for cache in (_try_load_model_cls, _try_inspect_model_cls, _supports_kw):
        cache.cache_clear()
    _MODEL_ARCH_BY_HASH.clear()


def _travels(name: str, model: _BaseRegisteredModel) -> bool:
    """Whether other processes cannot be expected to know of a registration."""
    if isinstance(model, _LazyRegisteredModel):
        return name not in _VLLM_MODELS
    return isinstance(model, _CallableRegisteredModel)
