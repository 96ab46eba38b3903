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
from typing import Any, cast

import cloudpickle
import torch
from torch import nn

from vllm.compilation.registered_model import compile_if_possible
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.tree_linear import layout_invariant
from vllm.model_executor.models.adapter.adapted import AdaptedModel, look
from vllm.model_executor.models.adapter.adapter import Adapter
from vllm.model_executor.models.adapter.seen import Seen
from vllm.model_executor.models.derived_plan.derive import derive_plan
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
from .capabilities import BY_NAME
from .checks import check_signature
from .declarations import (
    check_capabilities,
    check_class,
    check_layers,
    check_module,
    check_tp_plan,
)
from .messages import name_of, unpicklable_part
from .multimodal import MultiModalCallableModel, inputs_of, multimodal_class
from .wrapper import CallableModelWrapper, pooler_of

# A module with one of these capabilities was written for vLLM, so it is not tried.
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
        factory: called in each worker as `factory(vllm_config, parallel_context)`;
            `"module:name"` is imported there and not before.
        capabilities: answers to vLLM's questions about the model, by the names they
            have on vLLM's model interfaces (`supports_pp`, `is_pooling_model`, ...);
            `adapter`, an `Adapter` for a module that was not written for vLLM;
            `tp_plan`, in the place of the module's own, or "auto"; and
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
        self.tp_plan: Mapping[str, str] | str | None
        self.tp_plan = self.capabilities.pop("tp_plan", None)
        check_tp_plan(architecture, self.tp_plan)
        check_capabilities(architecture, self.capabilities, self.adapter)
        if not isinstance(factory, str):
            check_signature(architecture, factory)
        # Code of a model's directory is not imported before a worker asks for it.
        if not isinstance(factory, AutoMapModel):
            self._interface()

    def __reduce__(self) -> tuple[Any, ...]:
        factory = pickled(self.architecture, self.factory)
        declared = {
            **self.capabilities,
            "adapter": self.adapter,
            "multimodal": self.multimodal,
            "tp_plan": self.tp_plan,
        }
        capabilities = pickled(self.architecture, declared)
        return _unpickle, (self.architecture, factory, capabilities)

    def __deepcopy__(self, memo: dict[int, Any]) -> _CallableRegisteredModel:
        return self  # immutable, and possibly not picklable

    def look(
        self, module: nn.Module, vllm_config: VllmConfig, is_stage: bool = False
    ) -> Seen | None:
        """What `module` does, if it was not written for vLLM.

        Raises:
            ValueError: It is the whole model where one stage is wanted.

        """
        if is_stage and not self.builds_stages:
            raise ValueError(
                f"{self.architecture}: {type(module).__name__} has no pp_plan, by "
                "which it could be cut into pipeline stages. Give it one, or start "
                "with pipeline_parallel_size=1; if the callable builds the stage of "
                "its ParallelContext itself, register it with supports_pp=True."
            )
        model_cls = self.load_model_cls()
        knows_vllm = any(getattr(model_cls, name, False) for name in WITHOUT_ADAPTER)
        if knows_vllm and not issubclass(model_cls, MultiModalCallableModel):
            return None
        attention_free = getattr(model_cls, "is_attention_free", False)
        return look(module, self.adapter, vllm_config, attention_free, is_stage)

    def plan_for(
        self, module: nn.Module, vllm_config: VllmConfig, context: ParallelContext
    ) -> Mapping[str, str] | None:
        """The `tp_plan` that was given for `module`, if one was.

        Raises:
            ValueError: It is "auto", and nothing can be divided.

        """
        if self.tp_plan is None or isinstance(self.tp_plan, Mapping):
            return self.tp_plan
        if context.tensor_parallel_size == 1 and not layout_invariant():
            return {}
        device = cast(torch.device, vllm_config.device_config.device)
        vocab_size = vllm_config.model_config.get_vocab_size()
        return derive_plan(module, self.adapter, vocab_size, device, context)

    def adapted(
        self, module: nn.Module, vllm_config: VllmConfig, seen: Seen | None
    ) -> AdaptedModel | None:
        """A way to serve `module`, by what `look` has seen of it."""
        if seen is None:
            return None
        return AdaptedModel(module, seen, self.adapter or Adapter(), vllm_config)

    def check_built(
        self,
        module: nn.Module,
        layers: Mapping[str, Any],
        vllm_config: VllmConfig,
        context: ParallelContext,
    ) -> None:
        """Whether what is declared is true of `module` and of its `layers` of vLLM's.

        Raises:
            TypeError: `module` lacks something.
            ValueError: its layers differ from what is declared.

        """
        attributes, _ = self._interface()
        check_module(self.architecture, attributes, module)
        check_layers(self.architecture, attributes, layers, vllm_config, context)

    @property
    def builds_stages(self) -> bool:
        """Whether it is declared that the callable builds a pipeline stage."""
        attributes, _ = self._interface()
        return bool(attributes.get("supports_pp"))

    @property
    def is_pooling_model(self) -> bool:
        return bool(getattr(self.load_model_cls(), "is_pooling_model", False))

    def inspect_model_cls(self) -> _ModelInfo:
        return _ModelInfo.from_model_cls(self.load_model_cls())

    def load_model_cls(self) -> type[CallableModelWrapper]:
        return self._model_cls

    def _interface(self) -> tuple[dict[str, Any], type[nn.Module] | None]:
        """What the model's class has for vLLM, and the class that the factory names.

        What the caller declared wins over the factory's return annotation, and that
        over the wrapper's defaults.

        Raises:
            TypeError: what is declared needs more.

        """
        attributes: dict[str, Any] = {}
        annotated = None
        if not isinstance(self.factory, str):
            annotated = annotated_class(self.factory)
        if annotated is not None:
            attributes = interface_of(annotated)
        for name, value in self.capabilities.items():
            attributes[BY_NAME[name].attribute or name] = value
        check_class(self.architecture, attributes, annotated)
        return attributes, annotated

    @functools.cached_property
    def _model_cls(self) -> type[CallableModelWrapper]:
        """The wrapper class whose instances `factory` builds."""
        attributes, annotated = self._interface()
        # vLLM asks before the module is built, and only then is a pp_plan known. A
        # module without one is refused by `look`.
        if attributes.setdefault("supports_pp", True):
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
    """`"module:name"` in the registry; an import shows whether it is a class or not.

    Args:
        architecture: the name it is registered under.

    """

    architecture: str

    def inspect_model_cls(self) -> _ModelInfo:
        # Not vLLM's cache of such answers: it notices changes of the module's own file
        # only.
        def inspect() -> _ModelInfo:
            return _ModelInfo.from_model_cls(self.load_model_cls())

        if self.module_name in sys.modules:
            return inspect()
        # In another process, because an import may initialize CUDA.
        return _run_in_subprocess(inspect)

    def load_model_cls(self) -> type[nn.Module]:
        target = getattr(importlib.import_module(self.module_name), self.class_name)
        if isinstance(target, type):  # some of vLLM's are stubs that are no modules
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
    # An error here would end the process before it could report anything. So the error
    # is kept, and raised when the model is built.
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
    """Stands for a callable that cannot be imported here; raises when it is called."""

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
    """The attributes of `model_cls` that tell vLLM what it can do."""
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
    """A property of the class whose value comes from the instance's module."""
    return property(lambda self: getattr(self.module, name))
