# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Serves a user's unchanged module: forward, logits and attention layers for vLLM."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx, nn

from vllm import envs
from vllm.config import CompilationMode, VllmConfig
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.trainable_attention import TrainableAttention
from vllm.model_executor.layers.trainable_attention.engine_step import (
    AttentionCalls,
    EngineStep,
    current_step,
)
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import set_default_torch_dtype

from .adapter import Adapter
from .call_forms import CannotBeCalledError, is_written_for_vllm
from .calls import UnservableError
from .full_forward import full_forward, stage_forward
from .layers import SiteAttention, attends_by_vllm
from .library_attention import show_attention
from .merged_products import lay_side_by_side
from .recording import digest, example, record
from .seen import Seen, run_routed, see
from .sites import PathHooks
from .tables import Tables
from .transformers_attention import leaves_out_caps

logger = init_logger(__name__)


class AdaptedModel:
    """Runs a module that was not written for vLLM, in engine steps.

    Args:
        module: What the factory built, on its device, or this rank's pipeline stage of
            it. It stays as it is, but for hooks that do nothing elsewhere.
        seen: What the trial showed of the whole module's forward.
        adapter: What the user has said.
        vllm_config: The engine's config.

    """

    def __init__(
        self, module: nn.Module, seen: Seen, adapter: Adapter, vllm_config: VllmConfig
    ) -> None:
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            seen = seen.in_stage(module, get_pp_group().is_last_rank)
        caps = {attention.soft_cap for attention in seen.attention.values()} - {None}
        if caps and leaves_out_caps(module):
            logger.warning(
                "%s attends by Transformers' sdpa, which leaves out the soft cap %s "
                "that its config has. The engine applies it. Build the module with "
                "attn_implementation='eager', to train as it is served.",
                type(module).__name__,
                ", ".join(map(str, caps)),
            )
        self.module = module
        self.seen = seen
        self._adapter = adapter
        self._tables = Tables(module)
        layers = {
            site: SiteAttention(site, attention, vllm_config)
            for site, attention in seen.attention.items()
        }
        self._layers = layers
        self._attention = dict(layers)
        # For vLLM, which looks for attention layers among a model's modules.
        self.layers = nn.ModuleList(layers.values())
        PathHooks(module, seen.owners)
        self._recorded: dict[tuple[bool, int], fx.GraphModule] = {}
        self._longest = vllm_config.model_config.max_model_len
        self._most_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        # A stage also takes and gives other tensors. The bits of the exact mode were
        # not tried with recordings.
        self.can_be_recorded = (
            vllm_config.parallel_config.pipeline_parallel_size == 1
            and not envs.VLLM_BATCH_INVARIANT
        )
        compiles = vllm_config.compilation_config.mode != CompilationMode.NONE
        # A LoRA adds to what each layer returns, in place: products stay apart then.
        if self.can_be_recorded and compiles and vllm_config.lora_config is None:
            lay_side_by_side(module)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        received: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Hidden states `[tokens, width]` of `input_ids` and `positions`, `[tokens]`.

        Where the head is not known they are logits. A pipeline stage takes what it
        received from the one before. `inputs_embeds` `[tokens, hidden]` takes the place
        of `input_ids`.
        """
        if inputs_embeds is None:
            assert input_ids is not None
            inputs = input_ids.long()
        else:
            inputs = inputs_embeds
        step = current_step()
        recorded = self._recorded.get(_kind(inputs, positions))
        if step is not None and recorded is not None:
            step.count_all()
            return recorded(inputs, positions.long())
        try:
            return self._routed(inputs, positions.long(), received)
        except (AssertionError, IndexError, ValueError) as error:
            if len(inputs) <= self._longest:
                raise
            raise self._takes_too_many(len(inputs), error) from error

    def _takes_too_many(self, tokens: int, error: Exception) -> UnservableError:
        *_, place = traceback.extract_tb(error.__traceback__)
        return UnservableError(
            f"{type(self.module).__name__} failed with the {tokens} tokens of a step: "
            f"{type(error).__name__} at {place.filename}:{place.lineno}, "
            f"«{place.line}». A step of several requests may have more tokens than one "
            f"sequence, which has at most max_model_len={self._longest}. If that many "
            "are all that the module takes, start it with "
            f"max_num_batched_tokens={self._longest}; if it takes fewer, lower "
            "max_model_len, too."
        )

    def _routed(
        self,
        inputs: torch.Tensor,
        positions: torch.Tensor,
        received: IntermediateTensors | None = None,
    ) -> Any:
        return run_routed(
            self.module,
            self.seen,
            self._attention,
            self._tables,
            inputs,
            positions,
            received,
        )

    def record(
        self,
        calls: AttentionCalls,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> str:
        """Have later steps run a graph of what the module does, which can be compiled.

        The arguments are those of a step, whose values do not matter.

        Returns:
            What tells the graph from others.

        Raises:
            UnrecordableError: What it does holds for some numbers of tokens only.

        """
        if inputs_embeds is None:
            assert input_ids is not None
            given = input_ids.long()
        else:
            given = inputs_embeds

        def forward(inputs: torch.Tensor, positions: torch.Tensor) -> Any:
            with EngineStep(calls):
                return self._routed(inputs, positions)

        with torch.inference_mode(False), torch.no_grad():
            inputs, places = example(given, 0), example(positions.long(), -1)
            forward(inputs, places)  # what is looked at once, with weights
            recorded = record(forward, inputs, places, self._longest, self._most_tokens)
        self._recorded[_kind(inputs, places)] = recorded
        return digest(recorded)

    def forget_recording(self) -> None:
        """Have later steps run the module itself."""
        self._recorded.clear()

    @property
    def attention(self) -> dict[str, TrainableAttention]:
        """The attention layers, by the submodule that makes the call.

        Without those of a submodule that makes several: its name says not which.
        """
        calls = Counter(site.path for site in self._layers)
        return {
            site.path: layer.attention
            for site, layer in self._layers.items()
            if calls[site.path] == 1
        }

    @property
    def keywords(self) -> frozenset[str]:
        """What else `forward` can pass to the module."""
        return self.seen.form.keywords(self.module) | {"intermediate_tensors"}

    @property
    def logits_function(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """`logits`; None if the head has to be found by its name."""
        seen, adapter = self.seen, self._adapter
        known = seen.head is not None or adapter.head is not None or seen.gives_logits
        return self.logits if known else None

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `[tokens, vocab]` of what `forward` returned for some tokens."""
        head = self._adapter.head
        if isinstance(head, str):
            return self.module.get_submodule(head)(hidden_states)
        if head is not None:
            return head(self.module, hidden_states)
        if self.seen.head is not None:
            return self.seen.head.logits(hidden_states[None]).flatten(0, -2)
        return hidden_states

    def full_forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits `[tokens, vocab]` of one sequence `[tokens]`, by the module alone."""
        head = None if self.seen.gives_logits else self.logits_function
        return full_forward(self.module, input_ids.long(), self.seen.form, head)

    def stage_forward(
        self, input_ids: torch.Tensor, received: IntermediateTensors | None
    ) -> torch.Tensor | IntermediateTensors:
        """As `full_forward`, by all pipeline stages; what this one hands over."""
        result = stage_forward(self.module, input_ids.long(), self.seen.form, received)
        if isinstance(result, IntermediateTensors) or self.seen.gives_logits:
            return result
        return self.logits(result)


def _kind(inputs: torch.Tensor, positions: torch.Tensor) -> tuple[bool, int]:
    """Whether a step gets embeddings and not ids, and axes of its positions."""
    return inputs.is_floating_point(), positions.dim()


def look(
    module: nn.Module,
    adapter: Adapter | None,
    vllm_config: VllmConfig,
    attention_free: bool = False,
    is_stage: bool = False,
) -> Seen | None:
    """What `module` does, which was not written for vLLM; None if it was.

    Args:
        module: What the factory built, on its device.
        adapter: What the user has said.
        vllm_config: The engine's config.
        attention_free: Whether the model was declared so.
        is_stage: Whether the factory built one pipeline stage of several.

    Raises:
        UnservableError: It does something that vLLM cannot serve.
        CannotBeCalledError: It could not be called.

    """
    if adapter is None and attends_by_vllm(module):
        return None
    if type(module).forward is nn.Module.forward and adapter is None:
        return None  # the wrapper says that there is no forward
    if is_stage:
        if adapter is None and is_written_for_vllm(module):
            return None  # a stage may have no attention
        raise UnservableError(
            f"{type(module).__name__} has no attention layer of vLLM's and no pp_plan, "
            "by which it could be cut into pipeline stages. Give it a pp_plan, or "
            "start with pipeline_parallel_size=1."
        )
    model_config = vllm_config.model_config
    show_attention(module)
    training = module.training
    module.eval()
    try:
        # As in a step: PyTorch's own default, and no gradients.
        with torch.no_grad(), set_default_torch_dtype(torch.float32):
            seen = see(
                module,
                adapter or Adapter(),
                model_config.get_vocab_size(),
                model_config.max_model_len,
                cast(torch.device, vllm_config.device_config.device),
            )
    except CannotBeCalledError:
        if adapter is None and is_written_for_vllm(module):
            return None  # the wrapper calls it so, and says what is wrong with it
        raise
    except UnservableError as error:
        raise type(error)(f"{type(module).__name__}: {error}") from error.__cause__
    finally:
        module.train(training)
    if attention_free and seen.attention:
        site, call = next(iter(seen.attention.items()))
        raise UnservableError(
            f"{type(module).__name__} is declared is_attention_free, but calls {site}, "
            f"at {call.line}. Register it without is_attention_free."
        )
    if adapter is None and not seen.attention and not seen.form.batched:
        return None  # vLLM's own form, without attention
    return seen
