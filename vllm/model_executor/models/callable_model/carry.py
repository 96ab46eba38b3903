# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How registrations travel: in `ModelConfig.registered_callables`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.model_executor.model_loader.utils import _MODEL_ARCH_BY_HASH
from vllm.model_executor.models.registry import (
    ModelRegistry,
    _BaseRegisteredModel,
    _LazyRegisteredModel,
    _RegisteredModel,
    _try_inspect_model_cls,
    _try_load_model_cls,
)
from vllm.transformers_utils.auto_map import auto_map_model
from vllm.utils.func_utils import _supports_kw

from .checks import check_config
from .registration import CarriedClass, _CallableRegisteredModel

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.model_executor.models.registry import _ModelRegistry


def registrations_for(model_config: ModelConfig) -> dict[str, _BaseRegisteredModel]:
    """What a new config carries to other processes, by architecture.

    These are the entries that a user has registered in this process, and the model that
    the directory's own code defines. Entries that the config already has come first: a
    copied config keeps its own.

    Raises:
        ValueError: `config.json` lacks a key that vLLM reads.

    """
    given = model_config.registered_callables
    architectures = model_config.hf_config.architectures or []
    names = {
        ModelRegistry._normalize_arch(arch, model_config) for arch in architectures
    }
    here = {name: ModelRegistry.models.get(name) for name in names - given.keys()}
    carried = {
        name: CarriedClass(name, model) if type(model) is _RegisteredModel else model
        for name, model in here.items()
        # Only vLLM's own entries are of this class.
        if model is not None and type(model) is not _LazyRegisteredModel
    } | given
    own = None if carried else auto_map_model(model_config, ModelRegistry.models)
    if own is not None:
        # Whether it has a plan for pipeline stages is known when it is built.
        carried = {
            arch: _CallableRegisteredModel(arch, own, {"supports_pp": True})
            for arch in architectures
        }
    for model in carried.values():
        if isinstance(model, _CallableRegisteredModel):
            check_config(model_config, generates=not model.is_pooling_model)
    if carried:
        _forget_resolved_classes()
    return carried


def registry_of(model_config: ModelConfig, registry: _ModelRegistry) -> _ModelRegistry:
    """`registry`, with what `model_config` carries on top."""
    if not model_config.registered_callables:
        return registry
    return type(registry)({**registry.models, **model_config.registered_callables})


def _forget_resolved_classes() -> None:
    """Empty vLLM's caches of classes, which keep replaced registrations alive."""
    # support_torch_compile's `__init__` fills `_supports_kw` with model classes.
    for cache in (_try_load_model_cls, _try_inspect_model_cls, _supports_kw):
        cache.cache_clear()
    _MODEL_ARCH_BY_HASH.clear()
