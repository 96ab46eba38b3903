# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's fused experts, as the tensors of single experts that a checkpoint holds.

The layer stacks the experts of a rank in one parameter, with the gate's rows before
those of the up projection. A checkpoint, and a trainer's module, have a tensor for each
projection of each expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from vllm.model_executor.layers.fused_moe import (
    RoutedExperts,
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.parameters.layout import Box, Layout, view_of

STACKED = ("w13_weight", "w13_bias", "w2_weight", "w2_bias")
# By the names of projections, that of one parameter for those of all experts.
TRANSFORMERS_NAMES = {
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("down_proj",): "down_proj",
}


@dataclass(frozen=True)
class Part:
    """Where the tensor of one expert lies in a parameter that stacks them.

    Args:
        stacked: The shape of the parameter on this rank, as it was made.
        expert: The place of the expert on this rank.
        first: The first row.
        sizes: The shape of the expert's tensor on this rank, without padding.

    """

    stacked: tuple[int, ...]
    expert: int
    first: int
    sizes: tuple[int, ...]

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The expert's tensor, as a view of a parameter of the shape `stacked`."""
        starts = (self.first, *[0] * (len(self.sizes) - 1))
        return view_of(parameter[self.expert], starts, self.sizes)


class ExpertTensor(NamedTuple):
    """A tensor of one expert on this rank: its name, its layout, and where it lies."""

    name: str
    layout: Layout
    part: Part


class Stack(NamedTuple):
    """A whole parameter as checkpoints may hold it, stacked, and what is in it.

    `parts` are the names of the experts' tensors, each with its expert, its first row,
    and the number of its rows. With `transposed` the last two axes change places.
    """

    shape: tuple[int, ...]
    parts: list[tuple[str, int, int, int]]
    transposed: bool

    def split(self, whole: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of all experts, as views."""
        whole = whole.mT if self.transposed else whole
        for name, expert, first, rows in self.parts:
            yield name, whole[expert].narrow(0, first, rows)


class FusedExperts:
    """What the parameters of one of vLLM's fused layers hold.

    Args:
        path: The layer's, in the whole model.
        layer: As it was built; its weights are not loaded yet.

    `refusal` says why that cannot be told of this layer; then nothing else can be used.
    """

    def __init__(self, path: str, layer: RoutedExperts) -> None:
        self._path = path
        self._layer = layer
        self._parent = path.removesuffix("routed_experts")  # checkpoints have no such
        config = layer.moe_config
        names = [layer.ckpt_gate_proj_name]
        if config.is_act_and_mul:
            names.append(cast(str, layer.ckpt_up_proj_name))
        self._projections = {"w13": names, "w2": [layer.ckpt_down_proj_name]}
        self._ranks = config.moe_parallel_config.tp_size
        self._rank = config.moe_parallel_config.tp_rank
        self._hidden = cast(int, config.hidden_dim_unpadded)
        self._width = cast(int, config.intermediate_size_per_partition_unpadded)
        self.refusal: str | None = None
        if why := _refusal(layer):
            self.refusal = (
                f"{path}.w13_weight is of a fused layer {why}. Which part of which "
                "expert lies where is known for unquantized experts that stay in "
                "place. Give the module a load_weights(weights) method to load it; it "
                "cannot be updated by WeightSync."
            )

    def tensors(self, leaf: str) -> Iterator[ExpertTensor]:
        """What the parameter `leaf`, one of `STACKED`, holds on this rank."""
        parameter = self._layer._parameters[leaf]
        assert parameter is not None
        for projection, first, layout in self._layouts(leaf, parameter):
            for expert in range(self._layer.moe_config.num_experts):
                place = self._layer.expert_map_manager.map_global_to_local(expert)
                if place >= 0:
                    yield ExpertTensor(
                        self._name(expert, projection, leaf),
                        layout,
                        Part(tuple(parameter.shape), place, first, layout.local_shape),
                    )

    def stacks(self, leaf: str) -> Iterator[tuple[str, Stack]]:
        """By name, whole parameters for `leaf` that a checkpoint may hold instead."""
        parameter = self._layer._parameters[leaf]
        assert parameter is not None
        parts, rows = [], 0
        for projection, _, layout in self._layouts(leaf, parameter):
            parts += [
                (self._name(expert, projection, leaf), expert, rows, layout.shape[0])
                for expert in range(self._layer.moe_config.num_experts)
            ]
            rows += layout.shape[0]
        kind, _, suffix = leaf.partition("_")
        shape = (self._layer.moe_config.num_experts, rows, *layout.shape[1:])
        yield f"{self._path}.{leaf}", Stack(shape, parts, transposed=False)
        name = TRANSFORMERS_NAMES.get(tuple(self._projections[kind]))
        if name is not None and suffix == "weight":
            turned = self._layer.is_fused_checkpoint_transposed
            shape = (shape[0], *shape[:0:-1]) if turned else shape
            yield f"{self._parent}{name}", Stack(shape, parts, turned)

    def _name(self, expert: int, projection: str, leaf: str) -> str:
        return f"{self._parent}{expert}.{projection}.{leaf.partition('_')[2]}"

    def _layouts(
        self, leaf: str, parameter: torch.Tensor
    ) -> Iterator[tuple[str, int, Layout]]:
        """Of each projection: its name, its first row here, and how it is divided."""
        kind, _, suffix = leaf.partition("_")
        projections = self._projections[kind]
        height = parameter.shape[1] // len(projections)  # with padding
        here = [self._width, self._hidden]  # [rows, columns] of w13, turned for w2
        axis = 0 if kind == "w13" else 1
        if axis == 1:
            here.reverse()
        local = tuple(here[:1] if suffix == "bias" else here)
        for number, projection in enumerate(projections):
            divided = axis < len(local) and self._ranks > 1
            start, shape = [0] * len(local), list(local)
            if divided:
                start[axis] = self._rank * self._width
                shape[axis] = self._ranks * self._width
            box = Box(
                local=(0,) * len(local),
                whole=tuple(start),
                sizes=local,
                replica=0 if divided else self._rank,
            )
            layout = Layout(
                torch.Size(shape),
                torch.Size(local),
                parameter.dtype,
                (box,),
                axis if divided else None,
            )
            yield projection, number * height, layout


def _refusal(layer: RoutedExperts) -> str | None:
    """What keeps a layer's parts from being known."""
    config = layer.moe_config
    if not is_plain(layer):
        return f"that is quantized by {type(layer.quant_method).__name__}"
    if config.num_experts != config.num_logical_experts:
        return "with redundant experts, which move"
    if config.moe_parallel_config.enable_eplb:
        return "whose experts are moved to balance the load"
    if layer.expert_map_manager.num_fused_shared_experts:
        return "with shared experts among its own"
    if getattr(config, "tp_shard_with_padding", False):  # since 0.32.0
        return "whose ranks have padded shares"
    return None


def is_plain(layer: nn.Module) -> bool:
    """Whether `layer` has experts that are not quantized."""
    return isinstance(layer, RoutedExperts) and isinstance(
        layer.quant_method, UnquantizedFusedMoEMethod
    )


def is_stacked(layer: nn.Module, leaf: str) -> bool:
    """Whether `leaf` of `layer` is a parameter that stacks experts."""
    return isinstance(layer, RoutedExperts) and leaf in STACKED


def pack_experts(layer: nn.Module, tensors: Mapping[Any, torch.Tensor]) -> None:
    """New weights for a layer that was loaded before, in place.

    Args:
        layer: For which `is_plain`.
        tensors: By `Place`, this rank's part of each expert's tensor.
            All of the layer's, of any dtype and device.

    """
    kernel: dict[str, torch.Tensor] = {}
    made: dict[str, nn.Parameter] = {}
    for place, tensor in tensors.items():
        leaf, part = place.leaf, place.part
        if leaf not in made:  # zero, because nothing is loaded into the padding
            kernel[leaf] = old = cast(nn.Parameter, layer._parameters[leaf])
            made[leaf] = nn.Parameter(old.new_zeros(part.stacked), requires_grad=False)
            made[leaf].__dict__.update(old.__dict__)
        part.of(made[leaf]).copy_(tensor)
    try:
        layer._parameters.update(made)
        cast(Any, layer).quant_method.process_weights_after_loading(layer)
        for leaf, parameter in kernel.items():
            parameter.copy_(cast(torch.Tensor, layer._parameters[leaf]))
    finally:
        layer._parameters.update(cast(dict[str, Any], kernel))
