# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Logits of chosen tokens: a module's own head, without the rest of the module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from vllm.model_executor.models.plans.layers import ColwiseLinear, gather_outputs

from .sites import Site
from .trial import HeadCall

# Their input is that of the product, and their output the product, of all ranks.
LINEAR_LAYERS = (nn.Linear.forward, ColwiseLinear.forward)


@dataclass(frozen=True)
class _Made:
    """Stands for the result of an earlier call, by its index; -1 is the product."""

    index: int


@dataclass(frozen=True)
class Head:
    """The head of a module, from hidden states to the result.

    Args:
        site: The product with the head's matrix.
        selected: Where the last token's hidden states are taken before it, if they are.
        layer: The submodule that makes the product; None if the module does so itself.
        arguments: The matrix and bias, if the module makes the product.
        tail: The calls that follow, such as a cap of the logits.

    """

    site: Site
    selected: Site | None
    layer: nn.Module | None
    arguments: tuple[Any, ...]
    tail: tuple[tuple[Any, Any, Any], ...]

    @property
    def cut(self) -> Site:
        """The call that gets the hidden states of all tokens as its first argument."""
        return self.site if self.selected is None else self.selected

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `[1, tokens, vocab]` of `hidden_states` `[1, tokens, hidden]`."""
        if self.layer is not None:
            product = self.layer(hidden_states)
        else:
            product = F.linear(hidden_states, *self.arguments)
        made = [product]

        def fill(value: Any) -> Any:
            return made[value.index + 1] if isinstance(value, _Made) else value

        for func, args, kwargs in self.tail:
            args, kwargs = tree_map(fill, (args, kwargs), is_leaf=_is_made)
            made.append(func(*args, **kwargs))
        return made[-1]


def find_head(
    module: nn.Module, calls: tuple[HeadCall, HeadCall], results: tuple[Any, Any]
) -> Head | None:
    """The head that led to the results of two trials; None if it cannot be replayed.

    Args:
        module: What was tried.
        calls: The last product with a matrix as wide as the vocabulary, in each trial.
        results: The logits of each trial.

    """
    first, second = (_tail(c, r) for c, r in zip(calls, results, strict=True))
    if first is None or first != second or calls[0].site != calls[1].site:
        return None
    site = calls[0].site
    layer = module.get_submodule(site.path) if site.path else None
    if layer is not None and type(layer).forward not in LINEAR_LAYERS:
        return None
    return Head(site, calls[0].selected, layer, calls[0].arguments, first)


def _tail(call: HeadCall, result: torch.Tensor) -> Any:
    """The calls from the product to the result, with places for what they made.

    None if something else is needed for them.
    """
    output, following = call.output, call.tail
    if following and following[0][0] is gather_outputs:
        output, following = following[0][3], following[1:]  # the layer does that
    indices = {id(output): -1}
    for index, (*_, made) in enumerate(following):
        indices.setdefault(id(made), index)
    last = indices.get(id(result))
    if last is None:
        return None

    def place(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _Made(indices[id(value)]) if id(value) in indices else value
        return value

    tail = []
    for func, args, kwargs, _ in following[: last + 1]:
        args, kwargs = tree_map(place, (args, kwargs))
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs))):
            return None
        tail.append((func, args, kwargs))
    return tuple(tail)


def _is_made(value: Any) -> bool:
    return isinstance(value, _Made)
