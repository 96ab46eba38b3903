# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which blocks of a whole tensor a rank holds, as data.

A `Layout` is computed once, from what divides the tensor: a DTensor's placements,
megatron-core's partition attributes, or the sizes of one of vLLM's parallel layers.
Loading, comparing, saving and initializing follow from it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.parallel_context import ParallelContext

# megatron-core's mark of a parameter that is split; plans set it, too.
MARK = "tensor_model_parallel"


@dataclass(frozen=True)
class Box:
    """A block of `sizes`, at `local` in this rank's tensor and at `whole` in the whole.

    `replica` counts the ranks that hold the same block, from 0.
    """

    local: tuple[int, ...]
    whole: tuple[int, ...]
    sizes: tuple[int, ...]
    replica: int = 0

    def of_local(self, tensor: torch.Tensor) -> torch.Tensor:
        """The block, as a view of this rank's tensor."""
        return view_of(tensor, self.local, self.sizes)

    def of_whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """The block, as a view of the whole tensor."""
        return view_of(tensor, self.whole, self.sizes)

    def numel(self) -> int:
        return torch.Size(self.sizes).numel()


@dataclass(frozen=True)
class Layout:
    """The whole's `shape`, this rank's shape and dtype, and the blocks they share.

    `axis` is the one that is divided, None if none is or several are. There are no
    boxes where only the layer's own loader knows them, as for packed quantized weights.
    """

    shape: torch.Size
    local_shape: torch.Size
    dtype: torch.dtype
    boxes: tuple[Box, ...]
    axis: int | None = None

    def parts_of(self, tensor: torch.Tensor) -> list[tuple[Box, torch.Tensor]]:
        """The boxes with their views of this rank's tensor, gradient or the like."""
        return [(box, box.of_local(tensor)) for box in self.boxes]

    def padding_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows that are in no box: the padding of a vocabulary."""
        used = max((box.local[0] + box.sizes[0] for box in self.boxes), default=0)
        return tensor.narrow(0, used, tensor.shape[0] - used)

    def load(self, local: torch.Tensor, whole: torch.Tensor) -> None:
        """Copy this rank's blocks of `whole`, of any dtype and device, into `local`."""
        for box, part in self.parts_of(local):
            part.copy_(box.of_whole(whole))

    def holds(self, local: torch.Tensor, whole: torch.Tensor) -> bool:
        """Whether `local` has the bits that loading `whole` would give it."""
        return all(
            torch.equal(part, box.of_whole(whole).to(part.device, part.dtype))
            for box, part in self.parts_of(local)
        )


def layout_of(
    tensor: torch.Tensor, owner: nn.Module, context: ParallelContext
) -> Layout:
    """The layout of a parameter or buffer that lies in `owner`."""
    if isinstance(tensor, DTensor):
        return _dtensor_layout(tensor)
    if getattr(tensor, "allreduce", True) is False:
        return _whole_layout(tensor)  # Megatron's mark of a whole expert
    if getattr(tensor, MARK, False):
        return megatron_layout(tensor, context)
    if isinstance(tensor, nn.Parameter):
        return layer_layout(owner, tensor) or _whole_layout(tensor)
    return _whole_layout(tensor)


def megatron_layout(tensor: torch.Tensor, context: ParallelContext) -> Layout:
    """Of a parameter with megatron-core's marks.

    `partition_stride` chunks of each rank are spread over the axis, as for the gate
    and up halves of a fused SwiGLU.
    """
    axis: int = tensor.partition_dim  # type: ignore[attr-defined]
    stride: int = tensor.partition_stride  # type: ignore[attr-defined]
    ranks = context.get_tensor_parallel_world_size()
    rank = context.get_tensor_parallel_rank()
    size = tensor.shape[axis] // stride
    parts = [(k * size, (k * ranks + rank) * size, size, 0) for k in range(stride)]
    return _layout_along(tensor, axis, tensor.shape[axis] * ranks, parts)


def layer_layout(layer: nn.Module, parameter: torch.Tensor) -> Layout | None:
    """Of a parameter of vLLM's parallel layers; None if every rank holds it whole."""
    if isinstance(layer, VocabParallelEmbedding):
        axis = getattr(parameter, "output_dim", None)
        if axis is None:
            return None
        shard = layer.shard_indices
        replica = 0 if layer.tp_size > 1 else get_tp_group().rank_in_group
        start, size = shard.org_vocab_start_index, shard.num_org_elements
        parts = [(0, start, size, replica)]
        return _layout_along(parameter, axis, layer.org_vocab_size, parts)
    if isinstance(layer, RowParallelLinear):
        axis = getattr(parameter, "input_dim", None)  # a bias has none
        outputs = [(layer.input_size_per_partition, 1)]
    elif isinstance(layer, ColumnParallelLinear):
        axis = getattr(parameter, "output_dim", None)
        outputs = _outputs(layer)
    else:
        return None
    if axis is None or layer.tp_size == 1:
        return None

    parts, start, offset = [], 0, 0
    for size, replicas in outputs:
        owner, replica = divmod(layer.tp_rank, replicas)
        parts.append((start, offset + owner * size, size, replica))
        start += size
        offset += size * layer.tp_size // replicas
    if start != parameter.shape[axis]:  # packed, or one scale for a block of elements
        shape = list(parameter.shape)
        shape[axis] = shape[axis] * offset // start
        return Layout(
            torch.Size(shape), parameter.shape, parameter.dtype, boxes=(), axis=axis
        )
    return _layout_along(parameter, axis, offset, parts)


def _outputs(layer: ColumnParallelLinear) -> list[tuple[int, int]]:
    """Size here, and number of ranks that hold the same, of each fused projection."""
    if isinstance(layer, QKVParallelLinear):
        replicas = layer.num_kv_head_replicas
        return [
            (layer.num_heads * layer.head_size, 1),
            (layer.num_kv_heads * layer.head_size, replicas),
            (layer.num_kv_heads * layer.v_head_size, replicas),
        ]
    if isinstance(layer, MergedColumnParallelLinear):
        return [(size // layer.tp_size, 1) for size in layer.output_sizes]
    return [(layer.output_size_per_partition, 1)]


def _dtensor_layout(tensor: DTensor) -> Layout:
    """Of a DTensor, whose placements divide each axis independently of the others.

    Raises:
        ValueError: a placement is a pending sum, which no whole tensor can fill.

    """
    mesh, shape = tensor.device_mesh, tensor.shape
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"A parameter is a DTensor with placements {tensor.placements}; expected "
            "shards and replicas, because parts of a sum cannot be loaded. "
            "Redistribute it in the factory."
        )
    local = tensor.to_local()
    divided = [
        axis
        for axis in range(tensor.dim())
        if any(getattr(p, "dim", None) == axis for p in tensor.placements)
    ]
    runs = []  # of each axis: (start here, start in the whole, size)
    for axis in range(tensor.dim()):
        if axis not in divided:
            runs.append([(0, 0, shape[axis])])
            continue
        # Which indices along this axis are here: let DTensor divide a list of them.
        indices = torch.arange(shape[axis], device=mesh.device_type)
        indices = indices.view([-1 if a == axis else 1 for a in range(len(shape))])
        placements = [
            p if getattr(p, "dim", None) == axis else Replicate()
            for p in tensor.placements
        ]
        # Every rank has the list: no source rank, no communication.
        here = distribute_tensor(indices, mesh, placements, src_data_rank=None)
        runs.append(_runs(here.to_local().flatten().tolist()))
    replica = 0  # over all axes of the mesh that do not divide the tensor
    for place, size, placement in zip(
        mesh.get_coordinate() or (), mesh.shape, tensor.placements, strict=False
    ):
        if placement.is_replicate():
            replica = replica * size + place
    boxes = [
        Box(
            local=tuple(start for start, _, _ in block),
            whole=tuple(start for _, start, _ in block),
            sizes=tuple(size for _, _, size in block),
            replica=replica,
        )
        for block in itertools.product(*runs)
    ]
    only = divided[0] if len(divided) == 1 else None
    return Layout(shape, local.shape, tensor.dtype, tuple(boxes), only)


def _runs(indices: list[int]) -> list[tuple[int, int, int]]:
    """Consecutive `indices` as (position, first index, number)."""
    runs: list[tuple[int, int, int]] = []
    for position, index in enumerate(indices):
        if runs and index == runs[-1][1] + runs[-1][2]:
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((position, index, 1))
    return runs


def _whole_layout(tensor: torch.Tensor) -> Layout:
    zeros = (0,) * tensor.dim()
    box = Box(zeros, zeros, tuple(tensor.shape))
    return Layout(tensor.shape, tensor.shape, tensor.dtype, (box,))


def _layout_along(
    tensor: torch.Tensor, axis: int, size: int, parts: list[tuple[int, int, int, int]]
) -> Layout:
    """Of `parts` (start here, start in the whole, size, replica) of one axis."""

    def along(value: int, others: list[int]) -> tuple[int, ...]:
        return (*others[:axis], value, *others[axis + 1 :])

    zeros, sizes = [0] * tensor.dim(), list(tensor.shape)
    boxes = [
        Box(along(start, zeros), along(offset, zeros), along(length, sizes), replica)
        for start, offset, length, replica in parts
    ]
    shape = torch.Size(along(size, sizes))
    return Layout(shape, tensor.shape, tensor.dtype, tuple(boxes), axis)


def view_of(
    tensor: torch.Tensor, starts: tuple[int, ...], sizes: tuple[int, ...]
) -> torch.Tensor:
    """The block of `sizes` that begins at `starts`, as a view."""
    if tensor.shape == sizes:  # most are, and a slice takes longer than this look
        return tensor
    return tensor[tuple(slice(i, i + n) for i, n in zip(starts, sizes, strict=True))]
