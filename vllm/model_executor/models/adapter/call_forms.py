# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How a module is called with tokens and positions, and what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .stand_ins import unwatched

# What the libraries call the argument that takes each token's place in its sequence.
POSITIONS = ("position_ids", "input_pos", "positions", "pos", "pos_ids", "tok_idx")
# Names of the argument for labels. Without labels, some models return the logits of
# the last token only.
LABELS = ("targets", "labels", "target")
# What the libraries call the argument that takes embeddings in the place of tokens.
EMBEDDINGS = "inputs_embeds"
# A module of torchtitan's makes its masks by the first, and takes them as the second.
MASKS = ("get_attention_masks", "attention_masks")
# Masks that some libraries want to be given; None stands for a causal one.
NO_MASKS = ("attention_mask",)
# Where an output object or a dictionary has its logits, or else its hidden states.
RESULTS = ("logits", "last_hidden_state", "hidden_states")


class CannotBeCalledError(TypeError):
    """Every way of calling a module failed; the message has them all."""


@dataclass(frozen=True)
class CallForm:
    """One way to call a module's forward with the tokens of a step.

    Args:
        batched: Whether tokens are `[1, tokens]`, and not `[tokens]`.
        positions: The argument that takes positions; None if it has none.
        labels: The argument that takes labels, given the tokens themselves.
        masks: Whether the module makes its masks of positions, beside its forward.
        constants: Further arguments, by name.
        function: Calls the module in its place, as `Adapter.forward`.
        flat_positions: Whether positions are `[tokens]` where tokens are `[1, tokens]`.

    """

    batched: bool
    positions: str | None = None
    labels: str | None = None
    masks: bool = False
    constants: tuple[tuple[str, Any], ...] = ()
    function: Callable[..., Any] | None = None
    flat_positions: bool = False

    def __call__(
        self, module: nn.Module, input_ids: torch.Tensor, positions: torch.Tensor
    ) -> Any:
        """What the module returns for `input_ids` and `positions`, both `[tokens]`.

        Positions may have several axes, `[axes, tokens]`.

        Embeddings `[tokens, hidden]` in the place of `input_ids` go to the argument
        `inputs_embeds` of the module.
        """
        embedded = input_ids.is_floating_point()
        if self.batched:
            input_ids = input_ids[None]  # [1, tokens]
            if not self.flat_positions:
                positions = positions.unsqueeze(-2)  # [1, tokens], [axes, 1, tokens]
        if self.function is not None:
            return self.function(module, input_ids, positions)
        keywords = dict(self.constants)
        if self.positions is not None:
            keywords[self.positions] = positions
        if self.masks:
            make, argument = MASKS
            keywords[argument] = unwatched(getattr(module, make), positions)
        if embedded:
            return module(**{EMBEDDINGS: input_ids}, **keywords)
        if self.labels is not None:
            keywords[self.labels] = input_ids
        return module(input_ids, **keywords)

    def keywords(self, module: nn.Module) -> frozenset[str]:
        """What else than tokens and positions `module` takes, called in this way."""
        if self.function is not None:
            return frozenset()
        return frozenset(
            {EMBEDDINGS}.intersection(inspect.signature(module.forward).parameters)
        )

    def __str__(self) -> str:
        shape = "[1, tokens]" if self.batched else "[tokens]"
        if self.function is not None:
            return f"Adapter.forward(module, ids {shape}, positions {shape})"
        arguments = [f"ids {shape}"]
        if self.positions is not None:
            flat = "[tokens]" if self.flat_positions else shape
            arguments.append(f"{self.positions}={flat}")
        if self.labels is not None:
            arguments.append(f"{self.labels}=ids")
        if self.masks:
            arguments.append("{1}={0}(positions)".format(*MASKS))
        arguments += [f"{name}={value}" for name, value in self.constants]
        return f"forward({', '.join(arguments)})"


def call_forms(module: nn.Module, positions: str | None = None) -> Iterator[CallForm]:
    """The ways in which `module` may take tokens, the likeliest first.

    Args:
        module: What the factory built.
        positions: The argument that takes positions, if that is known.

    """
    parameters = inspect.signature(module.forward).parameters
    names = list(parameters)
    if positions is None:
        positions = next((name for name in POSITIONS if name in names), None)
    constants: list[tuple[str, Any]] = (
        [("use_cache", False)] if "use_cache" in names else []
    )
    constants += [
        (name, None)
        for name in NO_MASKS
        if name in names and parameters[name].default is inspect.Parameter.empty
    ]
    masks = hasattr(module, MASKS[0]) and MASKS[1] in names
    labels = labels_of(module)
    if labels is not None and parameters[labels].default is not inspect.Parameter.empty:
        labels = None
    batched = CallForm(True, positions, labels, masks, tuple(constants))
    flat = replace(batched, batched=False)
    if positions is None:
        yield from (batched, flat)
    elif is_written_for_vllm(module):
        # As vLLM calls it: the author may have thought of vLLM.
        yield from (flat, batched)
    else:
        # Some take the same positions for each sequence (lingua), and some take any
        # only beside a KV cache of their own (litgpt).
        yield batched
        yield replace(batched, flat_positions=True)
        yield from (replace(batched, positions=None), flat)


def is_written_for_vllm(module: nn.Module) -> bool:
    """Whether forward wants tokens, then positions, and nothing else, as of vLLM."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    required = [
        p.name
        for p in parameters
        if p.default is inspect.Parameter.empty
        and p.kind
        not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    ]
    return len(required) == 2 and required[1] in POSITIONS


def cannot_be_called(
    module: nn.Module, failures: list[tuple[CallForm, Exception]]
) -> CannotBeCalledError:
    """What to raise when every way of calling `module` failed."""
    tried = "; ".join(
        f"{form}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        for form, error in failures
    )
    names = ", ".join(inspect.signature(module.forward).parameters)
    return CannotBeCalledError(
        f"{type(module).__name__}.forward({names}) could not be called with tokens. "
        f"Tried: {tried}. Say how it is called by register_model(..., "
        "adapter=Adapter(forward=function)) with function(module, input_ids, "
        "positions), both [1, tokens]."
    )


def labels_of(module: nn.Module) -> str | None:
    """The argument of forward that takes labels."""
    names = inspect.signature(module.forward).parameters
    return next((name for name in LABELS if name in names), None)


def tensor_of(output: Any) -> torch.Tensor:
    """The logits, or else the hidden states, in what a forward returned.

    Raises:
        TypeError: There are none.

    """
    if isinstance(output, torch.Tensor):
        return output
    for name in RESULTS:
        if isinstance(output, Mapping):
            value = output.get(name)
        else:
            value = getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value
    if isinstance(output, tuple | list):  # such as (logits, loss)
        for value in output:
            if isinstance(value, torch.Tensor):
                return value
    raise TypeError(
        f"it returned a {type(output).__name__} without a tensor; expected logits or "
        f"hidden states, alone, first in a tuple, or as {', '.join(RESULTS)}"
    )
