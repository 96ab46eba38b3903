# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Logits of hidden states, from the module's own output head."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from .declarations import has_state_of_vllm

COMPUTE_LOGITS = "compute_logits(self, hidden_states) -> logits [tokens, vocab]"
# Hugging Face, Megatron-core and TorchTitan name their output layers so.
OUTPUT_HEADS = ("lm_head", "output_layer", "output")


def logits_function(
    architecture: str,
    module: nn.Module,
    vocab_size: int,
    tensor_parallel_size: int,
    head: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Callable[[torch.Tensor], torch.Tensor | None]:
    """How to get full logits from hidden states.

    Args:
        architecture: The registered name.
        module: What the factory built.
        vocab_size: The number of logits of each token.
        tensor_parallel_size: Ranks that may divide the logits among them.
        head: The module's head, if it is known.

    Raises:
        TypeError: the module has neither `compute_logits` nor a known output head.

    """
    if head is None:
        head = getattr(module, "compute_logits", None)
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

    @functools.cache
    def is_divided(width: int) -> bool:
        return tensor_parallel_size > 1 and _has_divided_outputs(module, width)

    def logits_of(hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits = head(hidden_states)
        if isinstance(logits, tuple):  # Megatron's linear layers return their bias too
            logits = logits[0]
        if logits is None:
            return None
        if logits.dim() == 2:
            width = logits.shape[1]
            if width < vocab_size and is_divided(width):
                # [tokens, vocab / TP] -> [tokens, vocab]
                logits = tensor_model_parallel_all_gather(logits)
        tokens = hidden_states.shape[0]
        fits = logits.dim() == 2 and logits.shape[0] == tokens
        if not fits or logits.shape[1] < vocab_size:
            raise ValueError(
                f"{architecture}: logits have shape {list(logits.shape)}; expected "
                f"[{tokens}, {vocab_size}], as the config's vocab_size says. Make the "
                "output head as wide as that, or correct vocab_size."
            )
        return logits[:, :vocab_size]  # a head may be padded to a multiple of TP

    return logits_of


def _has_divided_outputs(module: nn.Module, width: int) -> bool:
    """Whether tensor-parallel ranks divide something of which `width` is one's part.

    The marks that say how a parameter is loaded tell this. A module that loads its
    weights itself needs no marks, so its outputs count as divided.
    """
    if hasattr(module, "load_weights"):
        return True
    return any(
        _is_part_of_outputs(parameter, part, width)
        for part in module.modules()
        for parameter in part.parameters(recurse=False)
    )


def _is_part_of_outputs(parameter: nn.Parameter, layer: nn.Module, width: int) -> bool:
    """Whether `parameter` has `width` of the outputs that the ranks divide."""
    if isinstance(parameter, DTensor):
        return width in parameter.to_local().shape and width not in parameter.shape
    if getattr(parameter, "tensor_model_parallel", False):  # megatron-core's
        return parameter.shape[parameter.partition_dim] == width  # type: ignore
    own = hasattr(parameter, "weight_loader")  # vLLM's
    return own and width in parameter.shape and not isinstance(layer, ReplicatedLinear)


def is_undefined_at_warm_up(module: nn.Module) -> bool:
    """Whether a layer of vLLM's leaves its output unset in a step without metadata."""
    return any(map(has_state_of_vllm, module.modules()))


def check_logits(architecture: str, logits: torch.Tensor) -> None:
    """Look for overflow. -inf is allowed: a head says so that an id is no token.

    Raises:
        ValueError: some logits are NaN or +inf, or all of one token are -inf.

    """
    ill = logits.isnan() | logits.isposinf()
    if bool(ill.any()):
        raise ValueError(
            f"{architecture}: {int(ill.sum())} of {logits.numel()} logits are not "
            f"finite at warm-up, in {logits.dtype}. Check the weights for NaN and the "
            "model for overflow in this dtype."
        )
    masked = logits.isneginf().all(dim=-1)
    if bool(masked.any()):
        raise ValueError(
            f"{architecture}: all logits of {int(masked.sum())} of {len(masked)} "
            f"tokens are -inf at warm-up, in {logits.dtype}. Leave those of some ids "
            "finite, and check the model for overflow in this dtype."
        )
