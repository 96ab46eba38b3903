# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The self-check: what is compared, how much may differ, and the error message."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

import vllm.envs as envs
from vllm.distributed import get_pp_group, get_world_group
from vllm.distributed.text_collectives import all_gather_text
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.trainable_attention.kv_caches import trainable_layers
from vllm.model_executor.models.callable_model.wrapper import CallableModelWrapper
from vllm.v1.engine.startup_failure import enter_stage
from vllm.v1.worker.utils import AttentionGroup

from .differing_layer import first_differing_layer
from .engine_batch import EngineBatches
from .forwards import Around, Forwards, Logprobs
from .limits import small_limits
from .rounding import relative_error, rounded_otherwise
from .schedule import (
    BEYOND,
    LONG,
    OTHER_PROMPT,
    PROMPT,
    SHORTEST,
    Piece,
    steps_of,
    token_ids,
)
from .trace import engine_halves, largest_difference

logger = init_logger(__name__)

UNQUANTIZED = ("auto", "float16", "bfloat16")  # cache dtypes

# What rounding explains in any model, in nats.
FLOOR = {torch.float32: 1e-4}
FLOOR_OF_16_BITS = 1e-2
# The served model may differ by this many times the effect of rounding.
MARGIN = 4.0
ROUNDINGS = (1, 2)
# By rounding, the router of a mixture may choose another expert for some token of one
# prompt. A fault is there with every prompt.
ATTEMPTS = 3


@torch.no_grad()
def self_check(worker: Any) -> None:
    """Compare a registered callable's model, as it serves, with its own full forward.

    All ranks of the engine call this once, when they have their KV caches.
    `VLLM_MODEL_SELF_CHECK=0` turns it off.

    Raises:
        RuntimeError: They differ by more than rounding; on every rank.

    """
    model = worker.get_model()
    if not envs.VLLM_MODEL_SELF_CHECK or not isinstance(model, CallableModelWrapper):
        return
    started = time.perf_counter()
    reason = first_of_all_ranks(why_not(model, worker.vllm_config))
    if reason is None:
        enter_stage("checking the model against its own full forward")
        reason = _Check(model, worker.model_runner).run()
    took = time.perf_counter() - started
    outcome = f"is not checked against it, as {reason}" if reason else "agrees with it"
    logger.debug(
        "%s has a full forward, and %s (%.2f s).", type(model).__name__, outcome, took
    )


def all_ranks(text: str = "") -> list[str]:
    """The texts of all ranks of the engine."""
    group = get_world_group()
    if group.world_size == 1:
        return [text]
    return all_gather_text(text, group.cpu_group)


def first_of_all_ranks(text: str | None) -> str | None:
    """The first text of any rank that is not empty."""
    return next(filter(None, all_ranks(text or "")), None)


def why_not(model: CallableModelWrapper, vllm_config: Any) -> str | None:
    """Why `model` has no full forward outside of the engine, or none that is equal."""
    config, parallel = vllm_config.model_config, vllm_config.parallel_config
    if not model.was_tried:
        return "parts of it are compiled, and first called by vLLM's profiling run"
    if getattr(model, "is_pooling_model", False):
        return "it is a pooling model"
    if config.is_multimodal_model or config.uses_mrope or config.is_encoder_decoder:
        return "its inputs are not only token ids"
    if vllm_config.quant_config is not None:
        return "it is quantized, which may depend on what is in a batch"
    if vllm_config.cache_config.cache_dtype not in UNQUANTIZED:
        return "its KV cache is quantized"
    if vllm_config.kv_transfer_config is not None:
        return "its KV cache is transferred"
    if (
        parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size
        > 1
    ):
        return "ranks divide the context"
    if (
        model.adapted is not None
        and model.adapted.seen.last_only
        and parallel.pipeline_parallel_size > 1
    ):
        return "its stages compute the logits of the last token only"
    ours = engine_halves(model.module)
    for name, part in model.module.named_modules():
        if isinstance(part, AttentionLayerBase) and part not in ours:
            return (
                f"{name} is vLLM's {type(part).__name__}, which runs in an engine only"
            )
    return None


class _Check:
    """One check of one model.

    Args:
        runner: The worker's model runner, for its KV caches.

    """

    def __init__(self, model: CallableModelWrapper, runner: Any) -> None:
        self._model = model
        self._config = runner.vllm_config
        self._device = torch.device(self._config.device_config.device)
        self._groups = [group for group in runner.attn_groups if group]
        self._num_blocks = runner.kv_cache_config.num_blocks
        self._layers = trainable_layers(model)
        self._dtype = self._config.model_config.dtype

    def run(self) -> str | None:
        """Returns why nothing could be compared; None if it was, and was equal.

        Raises:
            RuntimeError: It was not.

        """
        scheduler = self._config.scheduler_config
        longest = min(self._longest(), self._config.model_config.max_model_len)
        if longest < SHORTEST:
            return f"max_model_len is only {longest}"
        lengths = [longest, min(OTHER_PROMPT, longest)][: scheduler.max_num_seqs]
        steps = steps_of(lengths, scheduler.max_num_batched_tokens)
        # A model with a full forward of its own has windows that cannot be made small.
        limited = [] if self._model.full_forward else list(self._layers.values())
        limits = small_limits(limited, self._groups, self._config, longest)
        with limits as groups, self._without_adapters():
            batches, problem = self._batches(groups, lengths, steps)
            if batches is None:
                return problem
            for attempt in range(ATTEMPTS):
                forwards = self._forwards(lengths, steps, attempt)
                own, problem = self._own(forwards)
                if problem is not None:
                    return problem
                difference = self._largest(forwards.served(batches), own)
                allowed = self._floor
                if difference > allowed:
                    allowed = max(allowed, MARGIN * self._rounding(forwards, own))
                if difference <= allowed:
                    self._warn_of_unused_layers()
                    return None
            where = self._where_it_differs(forwards, batches)
        raise RuntimeError(self._message(difference, allowed, where))

    def _batches(
        self,
        groups: list[list[AttentionGroup]],
        lengths: list[int],
        steps: list[list[Piece]],
    ) -> tuple[EngineBatches | None, str | None]:
        """The engine's steps, or why they cannot be made here on some rank."""
        batches = problem = None
        try:
            batches = EngineBatches(
                self._config, groups, self._num_blocks, lengths, self._device
            )
            for pieces in steps:
                batches.metadata(pieces)
        except Exception as error:  # noqa: BLE001 - said on every rank, as the reason
            problem = f"its steps cannot be made here: {type(error).__name__}: {error}"
        problem = first_of_all_ranks(problem)
        return (batches, None) if problem is None else (None, problem)

    def _longest(self) -> int:
        """Tokens of the first prompt.

        The windows of a model's own code cannot be made small, so that the prompt is
        longer than they are, where a prompt of that length takes little time.
        """
        if self._model.full_forward is None:
            return PROMPT
        windows = [layer.sliding_window for layer in self._layers.values()]
        config = self._config.model_config.hf_text_config
        windows.append(getattr(config, "sliding_window", None))
        short = [size for size in windows if isinstance(size, int) and size <= LONG]
        return max([PROMPT, *(size + BEYOND for size in short)])

    @property
    def _floor(self) -> float:
        return FLOOR.get(self._dtype, FLOOR_OF_16_BITS)

    def _forwards(
        self, lengths: list[int], steps: list[list[Piece]], attempt: int
    ) -> Forwards:
        config = self._config.model_config.hf_text_config
        special = {
            value
            for name, value in config.to_dict().items()
            if name.endswith("_token_id") and isinstance(value, int)
        }
        vocab_size = self._config.model_config.get_vocab_size()
        prompts = [
            token_ids(length, vocab_size, special, seed=len(lengths) * attempt + index)
            for index, length in enumerate(lengths)
        ]
        return Forwards(self._model, self._config, prompts, steps, self._device)

    def _own(self, forwards: Forwards) -> tuple[list[Logprobs], str | None]:
        """The module's own log-probs, or why it cannot compute them by itself."""
        own: list[Logprobs] = []
        problem = None
        try:
            own = forwards.own()
        except Exception as error:  # noqa: BLE001 - said on every rank, as the reason
            problem = f"its own forward fails: {type(error).__name__}: {error}"
        return own, first_of_all_ranks(problem)

    def _largest(self, found: list[Logprobs], own: list[Logprobs]) -> float:
        """The largest difference of any log-prob on any rank, in nats."""
        here = (
            max(
                largest_difference(a, b)
                for a, b in zip(found, own, strict=True)
                if a is not None and b is not None
            )
            if any(a is not None for a in found)
            else 0.0
        )
        return max(map(float, all_ranks(str(here))))

    def _rounding(self, forwards: Forwards, own: list[Logprobs]) -> float:
        """How far rounding moves the module's own log-probs, in nats."""
        return max(
            self._largest(forwards.own(self._rounded_otherwise(seed)), own)
            for seed in ROUNDINGS
        )

    def _rounded_otherwise(self, seed: int) -> Around:
        size = relative_error(self._dtype, self._device)
        return lambda module: rounded_otherwise(module, size, seed)

    def _without_adapters(self) -> AbstractContextManager[None]:
        manager = self._model.lora_manager
        return nullcontext() if manager is None else manager.without_adapters()

    def _unused_layers(self) -> list[str]:
        counts = self._model.attention_calls.counts or {}
        return [
            name
            for name, layer in self._layers.items()
            if layer.paged is not None and not counts.get(layer.paged.layer_name)
        ]

    def _warn_of_unused_layers(self) -> None:
        if unused := self._unused_layers():
            logger.warning(
                "%s: forward never calls the attention layers %s. They take memory for "
                "their KV caches.",
                type(self._model).__name__,
                ", ".join(unused),
            )

    def _where_it_differs(self, forwards: Forwards, batches: EngineBatches) -> str:
        """Which layer differs first, on the first pipeline stage where one does."""
        size = relative_error(self._dtype, self._device)
        here = first_differing_layer(
            forwards, batches, self._rounded_otherwise(ROUNDINGS[0]), MARGIN * size
        )
        stage = get_pp_group().rank_in_group
        found = [] if here is None else [f"{stage:06} {here[0]:06} {here[1]}"]
        found = [text for text in all_ranks(*found) if text]
        return min(found).split(" ", 2)[2] if found else "No single layer differs."

    def _message(self, difference: float, allowed: float, where: str) -> str:
        unused = self._unused_layers()
        hint = (
            f" The attention layers {', '.join(unused)} are built and never called."
            if unused
            else ""
        )
        return (
            f"{type(self._model).__name__} would answer wrongly: of a prompt that is "
            f"read in chunks and decode steps, {type(self._model.module).__name__} "
            "computes other log-probabilities than by its own full forward, by up to "
            f"{difference:.3g}. Rounding explains {allowed:.3g}. {where}{hint} In an "
            "engine step, forward gets some tokens of several sequences: attention has "
            "to be TrainableAttention, what else reads earlier tokens has to keep them "
            "in PreviousTokens, and positions are those that vLLM gives. "
            "VLLM_MODEL_SELF_CHECK=0 starts without this check."
        )
