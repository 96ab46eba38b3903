# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Any callable that builds a PyTorch module, as a vLLM model.

`ModelRegistry.register_model` hands a callable to `_CallableRegisteredModel`. Its
`load_model_cls` makes a subclass of `CallableModelWrapper`, so that everything in
vLLM that asks questions of a model *class* gets its answer, and nothing is built
before a worker asks for it. `registry_of` lets registrations travel inside the
`ModelConfig`, by whatever means that travels: fork, spawn, Ray.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, ClassVar, cast

import cloudpickle
import torch
from torch import nn

from vllm.compilation.registered_model import (
    add_to_compile_hash,
    compile_if_possible,
)
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import get_tp_group, tensor_model_parallel_all_gather
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.full_checkpoint import readable
from vllm.model_executor.model_loader.utils import _MODEL_ARCH_BY_HASH
from vllm.model_executor.models.parallel_plan import HIDDEN_STATES, apply_plans
from vllm.model_executor.models.registry import (
    _VLLM_MODELS,
    _BaseRegisteredModel,
    _LazyRegisteredModel,
    _ModelInfo,
    _try_inspect_model_cls,
    _try_load_model_cls,
)
from vllm.model_executor.parallel_context import ParallelContext, all_gather_text
from vllm.model_executor.parameters.load import weights_of
from vllm.model_executor.parameters.placement import place, unwrap
from vllm.sequence import IntermediateTensors
from vllm.transformers_utils.auto_map import AutoMapModel, auto_map_model
from vllm.utils.func_utils import _supports_kw
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.engine.startup_failure import enter_stage, time_limit

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.model_executor.models.registry import _ModelRegistry

logger = init_logger(__name__)

ModelFactory = Callable[..., nn.Module]

SIGNATURE = "factory(vllm_config, parallel_context) -> torch.nn.Module"
FORWARD = "forward(self, input_ids, positions) -> hidden states [tokens, hidden]"
COMPUTE_LOGITS = "compute_logits(self, hidden_states) -> logits [tokens, vocab]"
# Hugging Face, Megatron-core and TorchTitan name their output layers so.
OUTPUT_HEADS = ("lm_head", "output_layer", "output")

# How forward may take what the previous pipeline stage returned: vLLM's name for its
# IntermediateTensors, and the usual one for hidden states in the place of embeddings.
STAGE_INPUTS = ("intermediate_tensors", "inputs_embeds")

# Optional; vLLM's name and Hugging Face's.
INPUT_EMBEDDINGS = ("embed_input_ids", "get_input_embeddings")

# Where nn.Module keeps what belongs to it.
MODULE_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")

WARM_UP_TOKENS = 8


class CallableModelWrapper(nn.Module):
    """The module that a registered callable built, with vLLM's model interface.

    It shares the module's own tables of parameters, buffers and children instead of
    holding it as a child: names in the state dict are exactly the module's. What
    vLLM asks for beyond the methods here is looked up on the module.

    `load_model_cls` of the registration makes the subclasses that vLLM builds.

    Raises:
        TypeError: the callable did not return a module that vLLM can run.

    """

    _registration: ClassVar[_CallableRegisteredModel]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        arch = self._registration.architecture
        module = self._registration.build(vllm_config, prefix)
        # Not setattr: nn.Module would make it a child and prefix every name.
        self.__dict__["module"] = module
        for table in MODULE_TABLES:
            self.__dict__[table] = module.__dict__[table]

        add_to_compile_hash(module, vllm_config)

        self._arch = arch
        self._vllm_config = vllm_config
        self._vocab_size = vllm_config.model_config.get_vocab_size()
        self._hidden_size = vllm_config.model_config.get_hidden_size()
        self._context = ParallelContext.from_config(vllm_config.parallel_config)
        self._weights = weights_of(module, self._context)
        self._forward_keywords = _forward_keywords(arch, module)
        self._stage_input = None
        if not self._context.is_first_stage:
            self._stage_input = _stage_input(arch, module, self._forward_keywords)
        if self._context.is_last_stage and not self._registration.is_pooling_model:
            self._logits = _logits_function(arch, module, self._vocab_size)
        self._logits_seen = False
        if self._context.is_first_stage and not any(
            hasattr(module, name) for name in INPUT_EMBEDDINGS
        ):
            logger.warning_once(
                "%s has none of %s: requests with prompt embeddings will be refused.",
                arch,
                ", ".join(INPUT_EMBEDDINGS),
            )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "module" not in self.__dict__:
                raise
            return getattr(self.module, name)

    def train(self, mode: bool = True) -> CallableModelWrapper:
        self.module.train(mode)
        self.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.load_state_dict(*args, **kwargs)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings, `[tokens]` -> `[tokens, hidden]`."""
        if hasattr(self.module, "embed_input_ids"):
            return self.module.embed_input_ids(input_ids)
        if hasattr(self.module, "get_input_embeddings"):
            return self.module.get_input_embeddings()(input_ids)
        raise NotImplementedError(
            f"{self._arch}: prompt embeddings and multimodal inputs need "
            f"embed_input_ids(self, input_ids) on {type(self.module).__name__}, "
            "which has neither that nor get_input_embeddings()."
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | IntermediateTensors:
        """Hidden states `[tokens, hidden]` of flattened `input_ids` `[tokens]`.

        A pipeline stage that is not the last wraps them as `IntermediateTensors`;
        one that is not the first gets those of the stage before.
        """
        if intermediate_tensors is not None and self._stage_input == "inputs_embeds":
            inputs_embeds = intermediate_tensors[HIDDEN_STATES]
            intermediate_tensors = None
        # A new dict: vLLM takes a trace that changes one of its own for a mistake.
        offered = {
            **kwargs,
            "intermediate_tensors": intermediate_tensors,
            "inputs_embeds": inputs_embeds,
        }
        passed = {
            name: value
            for name, value in offered.items()
            if self._forward_keywords is None or name in self._forward_keywords
        }
        for name, value in offered.items():
            if value is not None and name not in passed:
                raise TypeError(
                    f"{self._arch}: vLLM has {name} to pass, but "
                    f"{type(self.module).__name__}.forward takes no such argument. "
                    f"Add {name}=None to it."
                )
        hidden_states = self.module(input_ids, positions, **passed)
        if isinstance(hidden_states, IntermediateTensors):
            return self._to_next_stage(hidden_states)
        tokens = positions.shape[-1]
        if (
            not isinstance(hidden_states, torch.Tensor)
            or hidden_states.dim() != 2
            or hidden_states.shape[0] != tokens
        ):
            raise ValueError(
                f"{self._arch}: {type(self.module).__name__}.forward returned "
                f"{_describe(hidden_states)} for {tokens} tokens; vLLM wants hidden "
                f"states of shape [{tokens}, hidden]. Tokens are flattened: drop the "
                "batch axis, and leave the output head to compute_logits."
            )
        if self._context.is_last_stage:
            return hidden_states
        return self._to_next_stage(IntermediateTensors({HIDDEN_STATES: hidden_states}))

    def _to_next_stage(self, tensors: IntermediateTensors) -> IntermediateTensors:
        """`tensors`, which have to fit the room that the next stage has for them."""
        if not hasattr(self.module, "make_empty_intermediate_tensors"):
            widths = {name: list(t.shape[1:]) for name, t in tensors.items()}
            if widths != {HIDDEN_STATES: [self._hidden_size]}:
                raise ValueError(
                    f"{self._arch}: from one pipeline stage to the next go tensors "
                    f"{widths} for each token; expected {HIDDEN_STATES} of the "
                    f"config's hidden_size {self._hidden_size}. Give "
                    f"{type(self.module).__name__} "
                    "make_empty_intermediate_tensors(batch_size, dtype, device) for "
                    "others."
                )
        return tensors

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits `[tokens, vocab]` of hidden states `[tokens, hidden]`.

        Vocabulary-parallel logits are gathered. None on ranks that vLLM's own
        output head leaves without.
        """
        self._weights.require_whole()
        logits = self._logits(hidden_states)
        if logits is not None and not self._logits_seen:
            self._logits_seen = True
            _check_finite(self._arch, logits)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Load with the module's own `load_weights`, or by name if it has none."""
        enter_stage("loading the weights")
        source = self._vllm_config.model_config.model
        return self._weights.load_model(self, readable(weights, source), source)

    def process_weights_after_loading(self) -> None:
        """Finish the module's own processing, then try the model on a few tokens.

        vLLM warms up most configurations later, but not all; a model that cannot
        run must fail here, while it is loaded.
        """
        self._weights.finish_first_load()
        if hasattr(self.module, "process_weights_after_loading"):
            self.module.process_weights_after_loading()
        # A compiled module must first meet vLLM's own warm-up sizes.
        parts = self.module.modules()
        compiled = any(not getattr(part, "do_not_compile", True) for part in parts)
        if not compiled:
            self._warm_up()

    @torch.no_grad()
    def _warm_up(self) -> None:
        if self._registration.is_pooling_model:
            return
        device = self._vllm_config.device_config.device
        tokens = min(
            WARM_UP_TOKENS, self._vllm_config.scheduler_config.max_num_batched_tokens
        )
        input_ids = torch.zeros(tokens, dtype=torch.long, device=device)
        positions = torch.zeros(tokens, dtype=torch.long, device=device)
        received = None
        if not self._context.is_first_stage:
            dtype = self._vllm_config.model_config.dtype
            empty = self.make_empty_intermediate_tensors(tokens, dtype, device)
            received = IntermediateTensors(
                {name: torch.zeros_like(tensor) for name, tensor in empty.items()}
            )
        enter_stage("trying the model on a few tokens")
        self.eval()  # vLLM does so once the model is loaded
        with (
            set_current_vllm_config(self._vllm_config),
            set_forward_context(None, self._vllm_config, num_tokens=tokens),
        ):
            # Eagerly: compilation is for vLLM's own warm-up, and its sizes.
            hidden_states = self.forward(input_ids, positions, received)
            if isinstance(hidden_states, torch.Tensor):
                self.compute_logits(hidden_states)


class _CallableRegisteredModel(_BaseRegisteredModel):
    """A callable in the registry.

    Args:
        architecture: the name it is registered under.
        factory: called once per worker as `factory(vllm_config, parallel_context)`;
            `"module:name"` is imported there and not before.
        capabilities: answers to vLLM's questions about the model, by the names they
            have on vLLM's model interfaces (`supports_pp`, `is_pooling_model`, ...).

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
        _check_capabilities(architecture, capabilities)
        if not isinstance(factory, str):
            _check_signature(architecture, factory)

    def __reduce__(self) -> tuple[Any, ...]:
        state = (self.factory, self.capabilities)
        try:
            return _unpickle, (self.architecture, cloudpickle.dumps(state))
        except Exception as error:
            raise TypeError(
                f"{self.architecture}: the registered {_name(self.factory)} cannot be "
                f"sent to the worker processes, because {_unpicklable(self.factory)} "
                f"cannot be pickled ({error}). Create it inside the callable, or "
                'register the callable as "module:name".'
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> _CallableRegisteredModel:
        return self  # immutable, and possibly not picklable

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
            annotated = _annotated_class(self.factory)
        if annotated is not None:
            attributes = _interface_of(annotated)
            plans = (getattr(annotated, name, None) for name in ("pp_plan", "_pp_plan"))
            if any(plans):
                attributes.setdefault("supports_pp", True)
        attributes |= self.capabilities
        if attributes.get("supports_pp"):
            attributes["make_empty_intermediate_tensors"] = (
                _make_empty_intermediate_tensors
            )
        if attributes.get("is_pooling_model"):
            attributes["pooler"] = property(_pooler)
            if annotated is None or not hasattr(annotated, "compute_logits"):
                attributes["compute_logits"] = None
        attributes["_registration"] = self
        attributes["__module__"] = __name__
        model_cls = type(self.architecture, (CallableModelWrapper,), attributes)
        if attributes.get("supports_torch_compile", True):
            model_cls = compile_if_possible(model_cls)
        return model_cls

    def build(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        """Call the factory and check what it returned."""
        context = ParallelContext.from_config(vllm_config.parallel_config)
        factory = self.factory
        if isinstance(factory, str):
            factory = resolve_obj_by_qualname(factory.replace(":", "."))
        takes_prefix = _check_signature(self.architecture, factory)
        keywords = {"prefix": prefix} if takes_prefix else {}
        task = f"the registered {_name(self.factory)} of {self.architecture}"
        enter_stage(f"building the model by {task}")
        try:
            with time_limit(task):
                module = factory(vllm_config, context, **keywords)
                if isinstance(module, nn.Module):
                    module = unwrap(module)
                    _check_same_on_all_ranks(self.architecture, module, context)
        except Exception as error:
            error.add_note(
                f"raised by the registered {_name(self.factory)} of "
                f"{self.architecture}, called with {context}"
            )
            raise
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"{self.architecture}: the registered {_name(self.factory)} returned "
                f"{_describe(module)}; expected a torch.nn.Module. The signature "
                f"wanted is {SIGNATURE}."
            )
        module = apply_plans(module, vllm_config, context)
        # A module that was built before, by the caller, may lie elsewhere.
        return place(module, vllm_config.device_config.device)


def as_model_cls(architecture: str, target: Any) -> type[nn.Module]:
    """The model class of what a lazily imported `module:name` turned out to be."""
    if isinstance(target, type):  # vLLM has some that are stubs, and no modules
        return target
    return _CallableRegisteredModel(architecture, target, {}).load_model_cls()


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


def _unpickle(architecture: str, state: bytes) -> _CallableRegisteredModel:
    try:
        factory, capabilities = cloudpickle.loads(state)
    except Exception as error:  # noqa: BLE001 - reported when the model is built
        # A process that dies of it here, before its first line, could tell nobody.
        return _CallableRegisteredModel(architecture, _Unpicklable(error), {})
    return _CallableRegisteredModel(architecture, factory, capabilities)


class _Unpicklable:
    """Stands for a callable that this process cannot import; says so when called."""

    def __init__(self, error: Exception) -> None:
        self.cause = f"{type(error).__name__}: {error}"

    def __call__(
        self, vllm_config: VllmConfig, parallel_context: ParallelContext
    ) -> nn.Module:
        raise ImportError(
            f"the registered callable cannot be unpickled in this process: {self.cause}"
            ". What it refers to has to be importable by workers, as by PYTHONPATH."
        )


def _check_signature(architecture: str, factory: Any) -> bool:
    """Whether `factory` also declares `prefix`.

    Raises:
        TypeError: it cannot be called with two positional arguments.

    """
    if isinstance(factory, type) and issubclass(factory, nn.Module):
        raise TypeError(
            f"{architecture}: {factory.__name__} is a model class, which declares its "
            "capabilities itself, as class attributes."
        )
    if isinstance(factory, nn.Module):
        raise TypeError(
            f"{architecture}: expected a callable that returns a module, got a "
            f"{type(factory).__name__} module. Register "
            "`lambda vllm_config, parallel_context: module` instead."
        )
    if not callable(factory):
        raise TypeError(
            f"{architecture}: expected a model class, a callable or a string "
            f"'module:name', got {_describe(factory)}."
        )
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some builtins have none to inspect
        return False
    parameter = signature.parameters.get("prefix")
    takes_prefix = parameter is not None and parameter.kind in (
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    keywords = {"prefix": ""} if takes_prefix else {}
    try:
        signature.bind(None, None, **keywords)
    except TypeError as error:
        raise TypeError(
            f"{architecture}: the {_name(factory)} has the signature {signature}, but "
            f"is called as factory(vllm_config, parallel_context): {error}."
        ) from None
    return takes_prefix


def _check_capabilities(architecture: str, capabilities: Mapping[str, Any]) -> None:
    known = {field.name for field in fields(_ModelInfo)} - {"architecture"}
    known |= {"supports_lora", "packed_modules_mapping", "embedding_modules"}
    known |= {"supports_torch_compile"}
    for name in capabilities:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or sorted(known)
            raise TypeError(
                f"{architecture}: {name!r} is not a capability that vLLM asks for; "
                f"did you mean {', '.join(near)}?"
            )


def _check_same_on_all_ranks(
    architecture: str, module: nn.Module, context: ParallelContext
) -> None:
    """Compare the module's class and tensors with those of the tensor-parallel group.

    Shapes are left out, as shards may be uneven, and with expert parallelism names are,
    as each rank has its own experts.

    Raises:
        ValueError: rank 0 has another; the same on every rank.

    """
    if context.tensor_parallel_size == 1:
        return
    lines = [f"the class {type(module).__module__}.{type(module).__qualname__}"]
    if context.expert_parallel_size == 1:
        lines += [
            f"{name}, {tensor.dim()} axes of {tensor.dtype}"
            for name, tensor in module.state_dict(keep_vars=True).items()
            if isinstance(tensor, torch.Tensor)
        ]
    texts = all_gather_text("\n".join(lines), get_tp_group().cpu_group)
    for rank, text in enumerate(texts):
        if text != texts[0]:
            pairs = zip_longest(texts[0].split("\n"), text.split("\n"))
            first, other = next((a, b) for a, b in pairs if a != b)
            raise ValueError(
                f"{architecture}: tensor-parallel ranks built different models. First "
                f"difference: rank 0 has {first or 'no more tensors'}; rank {rank} has "
                f"{other or 'no more tensors'}. Build the same module on every rank, "
                "each with its shards."
            )


def _annotated_class(factory: ModelFactory) -> type[nn.Module] | None:
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


def _interface_of(model_cls: type[nn.Module]) -> dict[str, Any]:
    """What `model_cls` says of itself to vLLM, for a wrapper class to say likewise."""
    interface = {}
    for name in dir(model_cls):
        if hasattr(CallableModelWrapper, name) or name.startswith("__"):
            continue
        value = inspect.getattr_static(model_cls, name)
        plain = isinstance(value, classmethod | staticmethod) or not callable(value)
        interface[name] = value if plain else _on_module(name)
    return interface


def _make_empty_intermediate_tensors(
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


def _pooler(wrapper: CallableModelWrapper) -> Any:
    """The module's pooler, which every step of a pooling model asks for."""
    wrapper._weights.require_whole()
    return wrapper.module.pooler


def _on_module(name: str) -> property:
    """An attribute that a class check finds and that an instance's module answers."""
    return property(lambda self: getattr(self.module, name))


def _forward_keywords(architecture: str, module: nn.Module) -> frozenset[str] | None:
    """Names of forward's optional arguments that vLLM may pass, None for any.

    Raises:
        TypeError: forward is missing or cannot take `input_ids` and `positions`.

    """
    kind = type(module).__name__
    if type(module).forward is nn.Module.forward:
        raise TypeError(f"{architecture}: {kind} has no forward. vLLM calls {FORWARD}.")
    signature = inspect.signature(module.forward)
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(
            f"{architecture}: {kind}.forward{signature} cannot be called with token "
            f"ids and positions ({error}). vLLM calls {FORWARD}."
        ) from None
    parameters = signature.parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(list(signature.parameters)[2:])


def _stage_input(
    architecture: str, module: nn.Module, keywords: frozenset[str] | None
) -> str:
    """Which argument of forward takes what the previous pipeline stage returned.

    Raises:
        TypeError: forward has none.

    """
    for name in STAGE_INPUTS:
        if keywords is None or name in keywords:
            return name
    raise TypeError(
        f"{architecture}: {type(module).__name__}.forward"
        f"{inspect.signature(module.forward)} of a pipeline stage after the first has "
        "no argument for the hidden states of the stage before. Add "
        "inputs_embeds=None, which gets them as [tokens, hidden], or "
        "intermediate_tensors=None, which gets vLLM's IntermediateTensors; or give the "
        "module a pp_plan, which cuts it into stages."
    )


def _logits_function(
    architecture: str, module: nn.Module, vocab_size: int
) -> Callable[[torch.Tensor], torch.Tensor | None]:
    """How to get full logits from hidden states.

    Raises:
        TypeError: the module has neither `compute_logits` nor a known output head.

    """
    head: Any = getattr(module, "compute_logits", None)
    if head is None:
        heads = (getattr(module, name, None) for name in OUTPUT_HEADS)
        head = next((head for head in heads if head is not None), None)
    if head is None and hasattr(module, "get_output_embeddings"):
        head = cast(Any, module).get_output_embeddings()
    if head is None:
        raise TypeError(
            f"{architecture}: {type(module).__name__} has no way from hidden states to "
            f"logits. Give it {COMPUTE_LOGITS}, or an output head named "
            f"{', '.join(OUTPUT_HEADS)}."
        )
    if isinstance(head, ParallelLMHead):
        return functools.partial(
            LogitsProcessor(vocab_size), head, embedding_bias=head.bias
        )

    def logits_of(hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits = head(hidden_states)
        if isinstance(logits, tuple):  # Megatron's linear layers return their bias too
            logits = logits[0]
        if logits is None:
            return None
        if logits.dim() == 2 and logits.shape[-1] < vocab_size:
            # [tokens, vocab / TP] -> [tokens, vocab]
            logits = tensor_model_parallel_all_gather(logits)
        tokens = hidden_states.shape[0]
        fits = logits.dim() == 2 and logits.shape[0] == tokens
        if not fits or logits.shape[1] < vocab_size:
            raise ValueError(
                f"{architecture}: logits have shape {list(logits.shape)}; expected "
                f"[{tokens}, {vocab_size}], as the config's vocab_size says."
            )
        return logits[:, :vocab_size]  # a head may be padded to a multiple of TP

    return logits_of


def _check_finite(architecture: str, logits: torch.Tensor) -> None:
    finite = torch.isfinite(logits)
    if not bool(finite.all()):
        raise ValueError(
            f"{architecture}: {int((~finite).sum())} of {logits.numel()} logits are "
            f"not finite at warm-up, in {logits.dtype}. Check the weights for NaN and "
            "the model for overflow in this dtype."
        )


def _unpicklable(value: Any, path: str = "", depth: int = 4) -> str:
    """Names the innermost part of `value` that cloudpickle refuses."""
    for name, part in _parts(value):
        try:
            cloudpickle.dumps(part)
        except Exception:  # noqa: BLE001 - any refusal is what is looked for
            where = f"{path}.{name}" if path else name
            if depth > 0:
                return _unpicklable(part, where, depth - 1)
            return f"{where} ({_describe(part)})"
    return f"{path} ({_describe(value)})" if path else _describe(value)


def _parts(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, functools.partial):
        yield from {"func": value.func, **value.keywords}.items()
        yield from ((f"args[{i}]", arg) for i, arg in enumerate(value.args))
    elif inspect.ismethod(value):
        yield "self", value.__self__
    elif inspect.isfunction(value):
        variables = inspect.getclosurevars(value)
        yield from {**variables.nonlocals, **variables.globals}.items()
    elif isinstance(value, Mapping):
        yield from ((f"[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        yield from ((f"[{i}]", item) for i, item in enumerate(value))
    elif not isinstance(value, type):
        yield from getattr(value, "__dict__", {}).items()


def _name(factory: Any) -> str:
    if isinstance(factory, str):
        return f"callable {factory}"
    name = getattr(factory, "__qualname__", type(factory).__qualname__)
    return f"callable {getattr(factory, '__module__', '?')}.{name}"


def _describe(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"a {type(value).__name__}"
