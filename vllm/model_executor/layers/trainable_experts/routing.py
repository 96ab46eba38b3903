# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which experts each token goes to: chosen, recorded, and replayed.

A trainer that rounds otherwise than its engine may send a token to other experts, and
then differs by more than rounding. It can replay what the engine chose ("rollout
routing replay", https://arxiv.org/abs/2510.11370). An engine returns that with
`enable_return_routed_experts`, in releases that have the option.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["RoutedLayer", "recorded_routing", "replayed_routing", "top_experts"]


def top_experts(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """The experts with the highest scores, the best first.

    Of equal scores the expert with the lower index comes first. `torch.topk` promises
    no order of them, so that engine and trainer could choose differently.

    Args:
        scores: `[tokens, experts]`.
        top_k: How many of them.

    Returns:
        int64 `[tokens, top_k]`.

    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


class RoutedLayer(nn.Module):
    """A layer whose routing can be read and given.

    `layer_id` and `capture_fn` are what vLLM's `RoutedExpertsCaptureSource` names, by
    which an engine with `enable_return_routed_experts` finds the layer.

    Args:
        layer_id: The index of its transformer layer in the whole model.
        top_k: How many experts each token has.

    """

    capture_fn: Callable[[torch.Tensor], None] | None

    def __init__(self, layer_id: int, top_k: int) -> None:
        super().__init__()
        self.layer_id, self.top_k = layer_id, top_k
        self.capture_fn = None
        self.replayed: torch.Tensor | None = None  # int64 [tokens, top_k]

    def route(self, scores: torch.Tensor) -> torch.Tensor:
        """The experts of each token, `[tokens, experts]` -> int64 `[tokens, top_k]`."""
        chosen = self.replayed
        if chosen is None:
            chosen = top_experts(scores.detach(), self.top_k)
        elif chosen.shape != (len(scores), self.top_k):
            raise ValueError(
                f"The routing that is replayed has the shape {list(chosen.shape)} for "
                f"layer {self.layer_id}; expected {[len(scores), self.top_k]}, one row "
                "for each token that the model is called with."
            )
        if self.capture_fn is not None:
            self.capture_fn(chosen)
        return chosen


def _routed_layers(model: nn.Module) -> list[RoutedLayer]:
    layers = [part for part in model.modules() if isinstance(part, RoutedLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer whose routing can be read or given; "
            "expected a TrainableExperts in it."
        )
    return layers


@contextmanager
def replayed_routing(model: nn.Module, routing: torch.Tensor) -> Iterator[None]:
    """Have the experts of `model` take the tokens that they had elsewhere.

    The weights of the experts are the model's own, with gradients. Call `backward()`
    inside if activations are recomputed.

    Args:
        model: A module with `TrainableExperts`.
        routing: Integers `[tokens, layers, top_k]`, a row for each token that the model
            is called with, as `CompletionOutput.routed_experts` has them.

    Raises:
        ValueError: The model has no such layer, or the shape is another.

    """
    layers = _routed_layers(model)
    last = max(layer.layer_id for layer in layers)
    if routing.dim() != 3 or routing.shape[1] <= last:
        raise ValueError(
            f"routing has the shape {list(routing.shape)}; expected [tokens, layers, "
            f"top_k] with at least {last + 1} layers."
        )
    for layer in layers:
        layer.replayed = routing[:, layer.layer_id].long()
    try:
        yield
    finally:
        for layer in layers:
            layer.replayed = None


@contextmanager
def recorded_routing(model: nn.Module) -> Iterator[dict[int, torch.Tensor]]:
    """The routing of every call inside: by layer, of its last call.

    Args:
        model: A module with `TrainableExperts`.

    Yields:
        For each `layer_id`, int64 `[tokens, top_k]`.

    Raises:
        ValueError: The model has no such layer.

    """
    layers = _routed_layers(model)
    recorded: dict[int, torch.Tensor] = {}
    before = [layer.capture_fn for layer in layers]

    def recorder(layer_id: int) -> Callable[[torch.Tensor], None]:
        return lambda chosen: recorded.update({layer_id: chosen})

    for layer in layers:
        layer.capture_fn = recorder(layer.layer_id)
    try:
        yield recorded
    finally:
        for layer, capture_fn in zip(layers, before, strict=True):
            layer.capture_fn = capture_fn
