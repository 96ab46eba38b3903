# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A callable in the registry, and the model class that answers for it."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cloudpickle
import torch
from torch import nn

from vllm.compilation.registered_model import compile_if_possible
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.adapter.adapted import AdaptedModel, adapt
from vllm.model_executor.models.adapter.adapter import Adapter
from vllm.model_executor.models.plans.pipeline import HIDDEN_STATES
from vllm.model_executor.models.registry import (
    _BaseRegisteredModel,
    _LazyRegisteredModel,
    _ModelInfo,
    _RegisteredModel,
    _run_in_subprocess,
)
from vllm.model_executor.parallel_context import ParallelContext
from vllm.sequence import IntermediateTensors
from vllm.transformers_utils.auto_map import AutoMapModel

from .build import ModelFactory
from .checks import check_capabilities, check_signature
from .messages import name_of, unpicklable_part
from .multimodal import MultiModalCallableModel, inputs_of, multimodal_class
from .wrapper import CallableModelWrapper, pooler_of

# Capabilities of models whose modules know vLLM, so that they are not tried.
WITHOUT_ADAPTER = (
    "has_inner_state",
    "is_hybrid",
    "is_pooling_model",
    "supports_multimodal",
    "supports_transcription",
)


class _CallableRegisteredModel(_BaseRegisteredModel):
    """A callable in the registry.

    Args:
        architecture: the name it is registered under.
        factory: called once per worker as `factory(vllm_config, parallel_context)`;
            `"module:name"` is imported there and not before.
        capabilities: answers to vLLM's questions about the model, by the names they
            have on vLLM's model interfaces (`supports_pp`, `is_pooling_model`, ...);
            `adapter`, an `Adapter` for a module that was not written for vLLM; and
            `multimodal`, one or more `Modality` that the model takes beside text.

    """

    def __init__(
        self,
        architecture: str,
        factory: ModelFactory | str,
        capabilities: Mapping[str, Any],
    ) -> None:
        self.architecture = architecture
        self.factory = factory
        self.capabilities = dict(capabilities)
        self.adapter: Adapter | None = self.capabilities.pop("adapter", None)
        self.multimodal = inputs_of(
            architecture, self.capabilities.pop("multimodal", None)
        )
        check_capabilities(architecture, self.capabilities, self.adapter)
        if not isinstance(factory, str):
            check_signature(architecture, factory)

    def __reduce__(self) -> tuple[Any, ...]:
        factory = pickled(self.architecture, self.factory)
        declared = {
            **self.capabilities,
            "adapter": self.adapter,
            "multimodal": self.multimodal,
        }
        capabilities = pickled(self.architecture, declared)
        return _unpickle, (self.architecture, factory, capabilities)

    def __deepcopy__(self, memo: dict[int, Any]) -> _CallableRegisteredModel:
        return self  # immutable, and possibly not picklable

    def adapted(
        self, module: nn.Module, vllm_config: VllmConfig
    ) -> AdaptedModel | None:
        """A way to serve `module`, if it was not written for vLLM."""
        model_cls = self.load_model_cls()
        knows_vllm = any(getattr(model_cls, name, False) for name in WITHOUT_ADAPTER)
        if knows_vllm and not issubclass(model_cls, MultiModalCallableModel):
            return None
        attention_free = getattr(model_cls, "is_attention_free", False)
        return adapt(module, self.adapter, vllm_config, attention_free)

    @property
    def is_pooling_model(self) -> bool:
        return bool(getattr(self.load_model_cls(), "is_pooling_model", False))

    def inspect_model_cls(self) -> _ModelInfo:
        return _ModelInfo.from_model_cls(self.load_model_cls())

    def load_model_cls(self) -> type[CallableModelWrapper]:
        return self._model_cls

    @functools.cached_property
    def _model_cls(self) -> type[CallableModelWrapper]:
        """The wrapper class whose instances `factory` builds.

        What the caller declared wins over the factory's return annotation, and that
        over the wrapper's defaults.
        """
        attributes: dict[str, Any] = {}
        annotated = None
        if not isinstance(self.factory, str):
            annotated = annotated_class(self.factory)
        if annotated is not None:
            attributes = interface_of(annotated)
            plans = (getattr(annotated, name, None) for name in ("pp_plan", "_pp_plan"))
            if any(plans):
                attributes.setdefault("supports_pp", True)
        attributes |= self.capabilities
        if attributes.get("supports_pp"):
            attributes["make_empty_intermediate_tensors"] = room_for_hidden_states
        if attributes.get("is_pooling_model"):
            attributes["pooler"] = property(pooler_of)
            if annotated is None or not hasattr(annotated, "compute_logits"):
                attributes["compute_logits"] = None
        multimodal = self.multimodal or inputs_of(
            self.architecture, attributes.pop("multimodal", None)
        )
        attributes["_registration"] = self
        attributes["__module__"] = __name__
        base = multimodal_class(multimodal) if multimodal else CallableModelWrapper
        model_cls = type(self.architecture, (base,), attributes)
        if attributes.get("supports_torch_compile", True):
            model_cls = compile_if_possible(model_cls)
        return model_cls


def factory_in(
    model_config: ModelConfig, architecture: str
) -> _CallableRegisteredModel | None:
    """What a config carries for `architecture`; None if that is no callable."""
    carried = model_config.registered_callables.get(architecture)
    if carried is None:
        return None
    return getattr(carried.load_model_cls(), "_registration", None)


@dataclass(frozen=True)
class _NamedRegisteredModel(_LazyRegisteredModel):
    """`"module:name"` in the registry: a class, or a callable; known once imported.

    Args:
        architecture: the name it is registered under.

    """

    architecture: str

    def inspect_model_cls(self) -> _ModelInfo:
        # vLLM's cache of what a module said of itself knows of changes to the module's
        # own file only.
        def inspect() -> _ModelInfo:
            return _ModelInfo.from_model_cls(self.load_model_cls())

        if self.module_name in sys.modules:
            return inspect()
        # In another process, because an import may initialize CUDA.
        return _run_in_subprocess(inspect)

    def load_model_cls(self) -> type[nn.Module]:
        target = getattr(importlib.import_module(self.module_name), self.class_name)
        if isinstance(target, type):  # vLLM has some that are stubs, and no modules
            return target
        return _CallableRegisteredModel(self.architecture, target, {}).load_model_cls()


@dataclass(frozen=True)
class CarriedClass(_BaseRegisteredModel):
    """A registered model class, on its way to other processes."""

    architecture: str
    model: _BaseRegisteredModel

    def inspect_model_cls(self) -> _ModelInfo:
        return self.model.inspect_model_cls()

    def load_model_cls(self) -> type[nn.Module]:
        return self.model.load_model_cls()

    def __reduce__(self) -> tuple[Any, ...]:
        model_cls = pickled(self.architecture, self.load_model_cls())
        return _unpickle_class, (self.architecture, model_cls)

    def __deepcopy__(self, memo: dict[int, Any]) -> CarriedClass:
        return self


def pickled(architecture: str, value: Any) -> bytes:
    """`value` by cloudpickle: by reference if it is importable, else by value.

    Raises:
        TypeError: it cannot be pickled; names the innermost object that cannot.

    """
    try:
        return cloudpickle.dumps(value)
    except Exception as error:
        raise TypeError(
            f"{architecture}: the registered {name_of(value)} cannot be sent to the "
            f"worker processes, because {unpicklable_part(value)} cannot be pickled "
            f"({error}). Create it inside the callable, or register the callable as "
            '"module:name".'
        ) from error


def _unpickle(
    architecture: str, factory: bytes, capabilities: bytes
) -> _CallableRegisteredModel:
    # A process that dies of an error here, before its first line, could tell nobody.
    # It is raised when the model is built.
    declared = _loads(capabilities)
    if isinstance(declared, Unimportable):
        return _CallableRegisteredModel(architecture, declared, {})
    return _CallableRegisteredModel(architecture, _loads(factory), declared)


def _unpickle_class(architecture: str, model_cls: bytes) -> _BaseRegisteredModel:
    target = _loads(model_cls)
    if isinstance(target, Unimportable):
        return _CallableRegisteredModel(architecture, target, {})
    return CarriedClass(architecture, _RegisteredModel.from_model_cls(target))


def _loads(pickle: bytes) -> Any:
    try:
        return cloudpickle.loads(pickle)
    except Exception as error:  # noqa: BLE001 - raised when the model is built
        return Unimportable(error)


class Unimportable:
    """In the place of what this process cannot import; says so when it is called."""

    def __init__(self, error: Exception) -> None:
        self.cause = f"{type(error).__name__}: {error}"
        self.traceback = "".join(traceback.format_exception(error)).rstrip()

    def __call__(
        self, vllm_config: VllmConfig, parallel_context: ParallelContext
    ) -> nn.Module:
        error = ImportError(
            f"the registered callable cannot be unpickled in this process: {self.cause}"
            ". What it refers to has to be importable by workers, as by PYTHONPATH."
        )
        error.add_note(self.traceback)
        raise error


def annotated_class(factory: ModelFactory) -> type[nn.Module] | None:
    """The module class that `factory` says it returns."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    if isinstance(factory, AutoMapModel):
        factory = factory.load()
        if isinstance(factory, type):
            return factory
    if not inspect.isroutine(factory):
        factory = type(factory).__call__
    try:
        annotation = inspect.get_annotations(factory, eval_str=True).get("return")
    except (NameError, TypeError):  # names imported for type checking only
        return None
    if isinstance(annotation, type) and issubclass(annotation, nn.Module):
        return annotation
    return None


def interface_of(model_cls: type[nn.Module]) -> dict[str, Any]:
    """The attributes by which `model_cls` tells vLLM what it can do, for a wrapper."""
    interface = {}
    for name in dir(model_cls):
        if hasattr(CallableModelWrapper, name) or name.startswith("__"):
            continue
        value = inspect.getattr_static(model_cls, name)
        plain = isinstance(value, classmethod | staticmethod) or not callable(value)
        interface[name] = value if plain else on_module(name)
    return interface


def room_for_hidden_states(
    wrapper: CallableModelWrapper,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> IntermediateTensors:
    """Room for what a pipeline stage receives: the module's own, or hidden states."""
    make = getattr(wrapper.module, "make_empty_intermediate_tensors", None)
    if make is not None:
        return make(batch_size, dtype, device)
    shape = (batch_size, wrapper._hidden_size)
    return IntermediateTensors(
        {HIDDEN_STATES: torch.zeros(shape, dtype=dtype, device=device)}
    )


def on_module(name: str) -> property:
    """An attribute that a class check finds and that an instance's module answers."""
    return property(lambda self: getattr(self.module, name))
