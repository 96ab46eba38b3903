# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A small model that trainers and engines divide in many ways, as data."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch

from vllm.distributed.weight_sync.manifest import Location, Manifest, Shard
from vllm.model_executor.parameters.layout import Box, Layout

LAYERS, EXPERTS = 2, 4
# Of each tensor of a layer: its whole shape, and the axis that tensor parallelism cuts.
DENSE = {"norm": ((12,), None), "up": ((16, 12), 0), "down": ((12, 16), 1)}
EXPERT = ((8, 12), None)


@dataclass(frozen=True)
class Side:
    """How one side divides the model."""

    tp: int = 1
    pp: int = 1
    fsdp: int = 1
    ep: bool = False  # experts whole, over the tensor-parallel ranks
    copies: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.fsdp * self.copies


def cut(
    box: Box, axis: int, parts: int, index: int, uneven: bool = False
) -> Box | None:
    """Part `index` of a box that is cut along an axis, by PyTorch's rule of chunks."""
    size = box.sizes[axis]
    chunk = -(-size // parts) if uneven else size // parts
    start = min(index * chunk, size)
    length = min(chunk, size - start)
    if length == 0:
        return None
    whole, sizes = list(box.whole), list(box.sizes)
    whole[axis] += start
    sizes[axis] = length
    return Box((0,) * len(sizes), tuple(whole), tuple(sizes))


def layout(shape: tuple[int, ...], box: Box | None) -> Layout:
    boxes = () if box is None else (box,)
    local = (0,) * len(shape) if box is None else box.sizes
    return Layout(torch.Size(shape), torch.Size(local), torch.float32, boxes)


def manifests(side: Side, name: str, layers: int = LAYERS) -> list[Manifest]:
    found = []
    for rank in range(side.ranks):
        tp = rank % side.tp
        fsdp = rank // side.tp % side.fsdp
        stage = rank // (side.tp * side.fsdp) % side.pp
        shards = []
        for layer in range(layers):
            if layer * side.pp // layers != stage:
                continue
            tensors = {key: (*value, None) for key, value in DENSE.items()}
            tensors |= {f"experts.{e}": (*EXPERT, e) for e in range(EXPERTS)}
            for key, (shape, axis, expert) in tensors.items():
                if expert is not None and side.ep and expert % side.tp != tp:
                    continue
                zeros = (0,) * len(shape)
                box: Box | None = Box(zeros, zeros, shape)
                if axis is not None:
                    box = cut(box, axis, side.tp, tp)
                if side.fsdp > 1:
                    box = cut(box, 0, side.fsdp, fsdp, uneven=True)
                shards.append(Shard((f"layers.{layer}.{key}",), layout(shape, box)))
        location = Location("machine", hash((name, rank)), f"{name}{rank}", ())
        found.append(Manifest(location, shards))
    return found


@functools.cache
def whole_tensors() -> dict[str, torch.Tensor]:
    shapes = {key: shape for key, (shape, _) in DENSE.items()}
    shapes |= {f"experts.{e}": EXPERT[0] for e in range(EXPERTS)}
    numbers = itertools.count()
    return {
        f"layers.{layer}.{key}": torch.arange(torch.Size(shape).numel()).view(shape)
        + 1000.0 * next(numbers)
        for layer in range(LAYERS)
        for key, shape in shapes.items()
    }


def local_tensors(manifest: Manifest, filled: bool) -> list[torch.Tensor]:
    tensors = []
    for shard in manifest.shards:
        local = torch.full(tuple(shard.layout.local_shape), float("nan"))
        if filled:
            shard.layout.load(local, whole_tensors()[shard.names[0]])
        tensors.append(local)
    return tensors
