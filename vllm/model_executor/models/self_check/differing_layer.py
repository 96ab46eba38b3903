# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Finds the first submodule that computes something else in the engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from .engine_batch import EngineBatches
from .forwards import Around, Forwards
from .trace import Call, Pieces, Values, distance, largest_difference, traced

# A submodule differs if its difference is this many times the effect of rounding.
MARGIN = 4.0


class _Traces:
    """The calls of each forward that it is around.

    Args:
        rounded: A further context of these forwards.

    """

    def __init__(self, rounded: Around | None = None) -> None:
        self.of_forwards: list[dict[Call, Values]] = []
        self._rounded = rounded

    @contextmanager
    def __call__(self, module: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            if self._rounded is not None:
                stack.enter_context(self._rounded(module))
            self.of_forwards.append(stack.enter_context(traced(module)))
            yield


def first_differing_layer(
    forwards: Forwards, batches: EngineBatches, rounded: Around, least: float
) -> tuple[int, str] | None:
    """The first submodule of this rank that differs, in the order of its own forward.

    Args:
        rounded: Has the module round otherwise.
        least: A smaller difference, relative to the largest value, does not count.

    Returns:
        Its place in that order, and a sentence about it; None if none differs.

    """
    served, own, noisy = _Traces(), _Traces(), _Traces(rounded)
    forwards.served(batches, served)
    forwards.own(own)
    forwards.own(noisy)
    for request, calls in enumerate(own.of_forwards):
        for index, (call, whole) in enumerate(calls.items()):
            in_steps = list(_pieces(forwards, served.of_forwards, request, call))
            other = noisy.of_forwards[request].get(call, Values(None, None))
            if _differs(
                whole.returned,
                [(values.returned, rows, count) for values, rows, count in in_steps],
                other.returned,
                least,
            ):
                received_differs = _differs(
                    whole.received,
                    [(values.received, rows, n) for values, rows, n in in_steps],
                    other.received,
                    least,
                )
                kind = type(forwards.model.module.get_submodule(call[0])).__name__
                return index, _sentence(call, kind, received_differs)
    return None


def _pieces(
    forwards: Forwards, steps: list[dict[Call, Values]], request: int, call: Call
) -> Iterator[tuple[Values, slice, int]]:
    """Of each step: the values of `call`, the request's rows, and how many rows."""
    for calls, pieces in zip(steps, forwards.steps, strict=True):
        start, count = 0, sum(piece.tokens for piece in pieces)
        for piece in pieces:
            if piece.request == request:
                rows = slice(start, start + piece.tokens)
                yield calls.get(call, Values(None, None)), rows, count
            start += piece.tokens


def _differs(
    whole: torch.Tensor | None,
    pieces: Pieces,
    noisy: torch.Tensor | None,
    least: float,
) -> bool | None:
    """Whether `pieces` differ from `whole` by more than rounding; None if unknown."""
    found = distance(whole, pieces)
    if whole is None or found is None:
        return None
    rounding = 0.0
    if noisy is not None and noisy.shape == whole.shape:
        rounding = largest_difference(whole, noisy)
    return found > max(MARGIN * rounding, least * whole.abs().max().item())


def _sentence(call: Call, kind: str, received_differs: bool | None) -> str:
    name, turn = call
    what = f"{name!r}, a {kind}" if name else f"the module itself, a {kind}"
    if turn:
        what += f", in its call {turn + 1}"
    if received_differs is None:
        return f"The first layer that differs is {what}."
    if received_differs:
        return (
            f"The first layer that differs is {what}; what it receives differs "
            "already, so the code that calls it mixes tokens or has other positions."
        )
    return f"The first layer that differs is {what}; what it receives is equal."
