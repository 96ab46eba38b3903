# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The module that a registered callable built, with vLLM's model interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import nn

from vllm.compilation.registered_model import add_to_compile_hash
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import get_world_group
from vllm.distributed.weight_transfer.registered_models import use_weight_sync
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.trainable_attention.engine_step import (
    AttentionCalls,
    EngineStep,
)
from vllm.model_executor.layers.trainable_attention.kv_caches import (
    a_kv_cache_for_each_call,
    trainable_layers,
)
from vllm.model_executor.model_loader.full_checkpoint import readable
from vllm.model_executor.models.plans.pipeline import HIDDEN_STATES
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.load import weights_of
from vllm.model_executor.parameters.placement import unregistered_tensors
from vllm.sequence import IntermediateTensors
from vllm.v1.engine.startup_failure import enter_stage

from . import draft_head
from .build import build_module
from .checks import (
    FORWARD,
    check_config,
    check_hidden_states,
    check_positions,
    check_quantization,
    check_takes_embeddings,
    forward_keywords,
    stage_input,
    warn_without_embeddings,
)
from .config_caps import check_caps
from .layer_names import names_of_its_own
from .logits import check_logits, is_undefined_at_warm_up, logits_function
from .mrope import PositionsOfSeveralAxes
from .own_loading import plain_while_loading
from .precision import is_about_dtypes, round_constants
from .quantized_weights import attention_of, of_module

if TYPE_CHECKING:
    from vllm.lora.hooked_manager import HookedLoRAManager
    from vllm.lora.sites import Site

    from .registration import _CallableRegisteredModel

logger = init_logger(__name__)

# Where nn.Module keeps what belongs to it.
MODULE_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")

# The wrapper's child with the attention layers of a module that was adapted.
ATTENTION_LAYERS = "vllm_attention_layers"

WARM_UP_TOKENS = 8

# Hidden states, what goes to the next pipeline stage, or a draft head's two results.
Output = torch.Tensor | IntermediateTensors | tuple[torch.Tensor, torch.Tensor]


class CallableModelWrapper(PositionsOfSeveralAxes, nn.Module):
    """The module that a registered callable built, with vLLM's model interface.

    It shares the module's own tables of parameters, buffers and children instead of
    holding it as a child: names in the state dict are exactly the module's. What
    vLLM asks for beyond the methods here is looked up on the module.

    `load_model_cls` of the registration makes the subclasses that vLLM builds.

    Raises:
        TypeError: the callable did not return a module that vLLM can run.

    """

    _registration: ClassVar[_CallableRegisteredModel]

    # vLLM's interface for LoRA. Hooks find their layers, so nothing is declared.
    supports_lora: ClassVar[Literal[True]] = True
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {}
    embedding_modules: ClassVar[dict[str, str]] = {}
    lora_skip_prefixes: ClassVar[list[str]] = []
    is_3d_moe_weight: ClassVar[bool] = False
    is_non_gated_moe: ClassVar[bool] = False
    lora_manager: HookedLoRAManager | None = None
    adapter_sites: dict[str, Site] | None = None

    # Logits `[tokens, vocab]` of one sequence `[tokens]` by the module's own code,
    # where that is not what an engine runs.
    full_forward: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        registration = self._registration
        arch = registration.architecture
        head = draft_head.config_of(arch, vllm_config)
        self.is_draft_head = head is not None
        vllm_config = head or vllm_config
        with names_of_its_own(vllm_config, prefix) as layers:
            module, self._constants, seen = build_module(
                arch,
                registration.factory,
                vllm_config,
                prefix,
                None if self.is_draft_head else registration.look,
                registration.plan_for,
            )
            self.adapted = registration.adapted(module, vllm_config, seen)
        # Not setattr: nn.Module would make it a child and prefix every name.
        self.__dict__["module"] = module
        for table in MODULE_TABLES:
            self.__dict__[table] = module.__dict__[table]
        if self.is_draft_head:
            self.__dict__ |= draft_head.parts_of_its_own(vllm_config)
        if self.adapted is not None:
            self.full_forward = self.adapted.full_forward
            # In a table of the wrapper's own: the module gets no new children.
            attention = {ATTENTION_LAYERS: self.adapted.layers}
            self.__dict__["_modules"] = {**module._modules, **attention}
        if self.adapted is None or not self.adapted.can_be_recorded:
            add_to_compile_hash(module, vllm_config)
        self._arch = arch
        self._vllm_config = vllm_config
        self._vocab_size = vllm_config.model_config.get_vocab_size()
        self._hidden_size = vllm_config.model_config.get_hidden_size()
        self._context = ParallelContext.from_config(vllm_config.parallel_config)
        self._weights = weights_of(module, self._context)
        if vllm_config.lora_config is not None:
            # Now, because packed weights no longer have the shapes of their layers.
            from vllm.lora.sites import find_sites

            self.adapter_sites = find_sites(module, self._context)
        self._problem: str | None = None
        self._forward_keywords: frozenset[str] | None
        if self.adapted is None:
            given = (draft_head.HIDDEN,) if self.is_draft_head else ()
            self._forward_keywords = forward_keywords(arch, module, given)
            check_caps(arch, module, vllm_config.model_config)
        else:
            self._forward_keywords = self.adapted.keywords
        self._stage_input = None
        if not self._context.is_first_stage and self.adapted is None:
            self._stage_input = stage_input(arch, module, self._forward_keywords)
        # Also a model that generates may be pooled: vLLM then takes its head away.
        self._pools = vllm_config.model_config.runner_type == "pooling"
        if self._context.is_last_stage and not self._pools:
            if self._vocab_size < 1:  # a "module:callable" is known only now
                check_config(vllm_config.model_config, generates=True)
            of_module = None if self.adapted is None else self.adapted.logits_function
            self._logits = logits_function(
                arch,
                module,
                self._vocab_size,
                self._context.tensor_parallel_size,
                of_module,
            )
        self._logits_seen = is_undefined_at_warm_up(module)
        self.attention_calls = AttentionCalls()
        self.was_tried = False
        self._registration.check_built(module, layers, vllm_config, self._context)
        use_weight_sync(vllm_config)
        self.supports_mrope = check_positions(arch, module, vllm_config.model_config)
        check_quantization(arch, module, vllm_config, self._context)
        if vllm_config.model_config.enable_prompt_embeds:
            why = "prompt embeddings are enabled"
            check_takes_embeddings(arch, module, self._forward_keywords, why)
        elif self._context.is_first_stage and self.adapted is None:
            warn_without_embeddings(arch, module)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "module" not in self.__dict__:
                raise
            # Trainers look for the layers of a model of vLLM's there.
            default = (self.module,) if name == "model" else ()
            return getattr(self.module, name, *default)

    @property
    def lora_manager_cls(self) -> type[HookedLoRAManager]:
        """The LoRA manager that the model runner makes, if LoRA is enabled."""
        from vllm.lora.hooked_manager import HookedLoRAManager

        return HookedLoRAManager

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
            "which has neither that nor get_input_embeddings(). Add one of them."
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Output:
        """Hidden states `[tokens, hidden]` of flattened `input_ids` `[tokens]`.

        A pipeline stage that is not the last wraps them as `IntermediateTensors`;
        one that is not the first gets those of the stage before. A draft head gets
        those of its target and returns two.
        """
        with EngineStep(self.attention_calls):
            return self.call_module(
                input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
            )

    def call_module(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Output:
        """As `forward`, but on whole sequences, outside of an engine step."""
        if intermediate_tensors is not None and self._stage_input == "inputs_embeds":
            inputs_embeds = intermediate_tensors[HIDDEN_STATES]
            intermediate_tensors = None
        # Build a new dict: vLLM rejects traces that mutate their keyword arguments.
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
        if self.adapted is not None:
            hidden_states = self.adapted.forward(
                input_ids, positions, intermediate_tensors, inputs_embeds
            )
        else:
            hidden_states = self.module(input_ids, positions, **passed)
        if isinstance(hidden_states, IntermediateTensors):
            return self._to_next_stage(hidden_states)
        tokens = positions.shape[-1]
        if self.is_draft_head:
            return draft_head.results(self._arch, hidden_states, tokens)
        check_hidden_states(self._arch, self.module, hidden_states, tokens)
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

        Gathered over the vocabulary; None where vLLM's LogitsProcessor returns none.
        """
        self._weights.require_whole()
        adapters = self.lora_manager
        if adapters is None:
            logits = self._logits(hidden_states)
        else:
            with adapters.rows_of_logits(hidden_states):
                logits = self._logits(hidden_states)
        if logits is not None and not self._logits_seen:
            self._logits_seen = True
            check_logits(self._arch, logits)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Load with the module's own `load_weights`, or by name if it has none."""
        enter_stage("loading the weights")
        source = self._vllm_config.model_config.model
        weights = readable(weights, source)
        if self._vllm_config.quant_config is not None:
            weights = of_module(self.module, attention_of(self), weights)
        with plain_while_loading(self._arch, self.module, self._vllm_config):
            return self._weights.load_model(self, weights, source)

    def weights_problem(self) -> str | None:
        """Why the weights cannot be served; asked before the first step with new ones.

        Where ranks have an engine each, this is a collective call if weights were
        loaded since, which is to be so on all ranks or on none.
        """
        update = self._weights.update
        if update.touched:
            parallel = self._vllm_config.parallel_config
            if parallel.distributed_executor_backend == "external_launcher":
                self._problem = update.agree(get_world_group().cpu_group)
            else:
                self._problem = update.problem()
            update.end()
        return self._problem

    def update_progress(self) -> tuple[bool, bool]:
        """Whether anything, and whether everything was loaded since the last step."""
        return self._weights.update.has_new(), self._weights.update.is_complete()

    def mark_mixed(self, reason: str) -> None:
        """Refuse to serve, because an update failed after it had changed weights."""
        self._weights.update.mark_mixed(reason)

    def require_update(self, why: str) -> None:
        """Refuse to serve, with the sentence `why`, until all weights are loaded."""
        self._weights.update.require_update(why)

    def unregistered_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The module's constants that are no buffers, which a deep sleep would lose."""
        return unregistered_tensors(self.module)

    def process_weights_after_loading(self) -> None:
        """Finish the module's own processing, then try the model on a few tokens.

        vLLM warms up most configurations later, but not all; a model that cannot
        run must fail here, while it is loaded. Some trainers call this again after
        each update; then there is nothing to try.
        """
        self._weights.finish_first_load()
        if hasattr(self.module, "process_weights_after_loading"):
            self.module.process_weights_after_loading()
        if self.was_tried:
            return
        # Leave the first call of compiled parts to vLLM's profiling run.
        parts = self.module.modules()
        compiled = any(not getattr(part, "do_not_compile", True) for part in parts)
        pooling = self._registration.is_pooling_model
        if trainable_layers(self) or not (compiled or pooling):
            self._warm_up()
            self.was_tried = True

    @torch.no_grad()
    def _warm_up(self) -> None:
        config = self._vllm_config
        device = config.device_config.device
        tokens = min(WARM_UP_TOKENS, config.scheduler_config.max_num_batched_tokens)
        input_ids = torch.zeros(tokens, dtype=torch.long, device=device)
        positions = torch.zeros(tokens, dtype=torch.long, device=device)
        received = None
        if not self._context.is_first_stage:
            dtype = config.model_config.dtype
            empty = self.make_empty_intermediate_tensors(tokens, dtype, device)
            received = IntermediateTensors(
                {name: torch.zeros_like(tensor) for name, tensor in empty.items()}
            )
        given = draft_head.inputs_of(config, tokens) if self.is_draft_head else {}
        enter_stage("trying the model on a few tokens")
        self.eval()  # as vLLM does once the model is loaded

        def run() -> None:
            # Eagerly: compilation is for vLLM's own warm-up, and its sizes.
            hidden_states = self.forward(input_ids, positions, received, **given)
            if isinstance(hidden_states, tuple):
                hidden_states, _ = hidden_states
            if isinstance(hidden_states, torch.Tensor) and not self._pools:
                self.compute_logits(hidden_states)

        with (
            set_current_vllm_config(config),
            set_forward_context(None, config, num_tokens=tokens, skip_compiled=True),
            a_kv_cache_for_each_call(self, self.attention_calls),
        ):
            try:
                run()
            except Exception as error:
                if not self._constants or not is_about_dtypes(error):
                    error.add_note(self._how_it_was_called(tokens))
                    raise
                self._round_constants(error)
                run()

    def _round_constants(self, error: Exception) -> None:
        """Cast constants that `forward` uses beside activations, without a cast."""
        dtype = cast(torch.dtype, self._vllm_config.model_config.dtype)
        names = round_constants(self._constants, dtype)
        logger.warning(
            "%s: forward fails with constants in float32 (%s), so they are rounded to "
            "%s: %s. Cast in forward what is combined with activations, as by "
            "`.to(x.dtype)`, to keep the others as they were computed.",
            self._arch,
            str(error).strip().partition("\n")[0],
            dtype,
            ", ".join(names),
        )
        self._constants = []

    def _how_it_was_called(self, tokens: int) -> str:
        return (
            f"{type(self.module).__name__} was tried as forward(input_ids [{tokens}], "
            f"positions [{tokens}]): vLLM calls {FORWARD}, with the tokens of all "
            "sequences on one axis, without a batch axis."
        )


def pooler_of(wrapper: CallableModelWrapper) -> Any:
    """The module's pooler, which every step of a pooling model asks for."""
    wrapper._weights.require_whole()
    return wrapper.module.pooler
