# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Records what each submodule received and returned in a forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from vllm.model_executor.layers.previous_tokens import PreviousTokens
from vllm.model_executor.layers.trainable_attention import TrainableAttention

# The name of a submodule, and the turn of the call in one forward.
Call = tuple[str, int]
# A request's tokens, step by step: the values of all tokens of the step, the rows that
# are the request's, and how many rows there are.
Pieces = list[tuple[torch.Tensor | None, slice, int]]


@dataclass(frozen=True)
class Values:
    """The first tensor that a call received, and the first that it returned."""

    received: torch.Tensor | None
    returned: torch.Tensor | None


@contextmanager
def traced(root: nn.Module) -> Iterator[dict[Call, Values]]:
    """The calls of the submodules of `root`, in the order in which they return."""
    calls: dict[Call, Values] = {}
    halves = engine_halves(root)
    with ExitStack() as stack:
        for name, part in root.named_modules():
            if part not in halves:
                handle = part.register_forward_hook(
                    lambda part, args, kwargs, output, name=name: _record(
                        calls, name, (args, kwargs), output
                    ),
                    with_kwargs=True,
                )
                stack.callback(handle.remove)
        yield calls


def _record(calls: dict[Call, Values], name: str, received: Any, returned: Any) -> None:
    turn = 0
    while (name, turn) in calls:
        turn += 1
    calls[name, turn] = Values(_first_tensor(received), _first_tensor(returned))


def engine_halves(root: nn.Module) -> set[nn.Module]:
    """The parts of layers that only the engine calls; a trainer calls the others."""
    halves: set[nn.Module] = set()
    for layer in root.modules():
        if isinstance(layer, TrainableAttention | PreviousTokens):
            for part in layer.children():
                halves.update(part.modules())
    return halves


def _first_tensor(value: Any) -> torch.Tensor | None:
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
    first = next(tensors, None)
    # A copy, because a later layer may write into it.
    return None if first is None else first.detach().clone()


def distance(whole: torch.Tensor | None, pieces: Pieces) -> float | None:
    """The largest difference of the values of one request; None if axes differ.

    Args:
        whole: Those of a forward of the whole request.
        pieces: Those of steps.

    """
    tokens = sum(rows.stop - rows.start for _, rows, _ in pieces)
    if whole is None or tokens not in whole.shape:
        return None
    axis = whole.shape.index(tokens)
    parts = []
    for values, rows, count in pieces:
        if values is None or values.dim() != whole.dim() or values.shape[axis] != count:
            return None
        parts.append(values.narrow(axis, rows.start, rows.stop - rows.start))
    joined = torch.cat(parts, axis)
    return largest_difference(joined, whole) if joined.shape == whole.shape else None


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| where they are not equal, infinity if a NaN is on one side only."""
    a, b = a.float(), b.float()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, (a - b).abs())
    return difference.nan_to_num(nan=float("inf")).max().item() if len(a) else 0.0
