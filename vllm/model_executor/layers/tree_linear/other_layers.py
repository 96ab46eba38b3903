# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Row-parallel layers of DTensor and megatron-core that sum in a tree."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from vllm.distributed import differentiable_collectives as collectives
from vllm.model_executor.layers.tree_linear.linear import divided_linear
from vllm.model_executor.layers.tree_linear.tree import number_of_leaves

__all__ = ["sum_in_tree"]


def sum_in_tree(module: nn.Module) -> None:
    """Have row-parallel layers of other libraries sum in a tree, in place.

    These are `nn.Linear` whose weight is a DTensor that one axis of a mesh divides by
    its inputs, as after `RowwiseParallel`, and megatron-core's `RowParallelLinear`.
    Outside of the batch-invariant mode they compute what they did.
    """
    megatron = sys.modules.get("megatron.core.tensor_parallel")
    for part in module.modules():
        if isinstance(part, nn.Linear) and _divides_inputs(part.weight):
            if "forward" not in vars(part):
                part.forward = _DTensorForward(part)  # type: ignore[method-assign]
            continue
        if megatron is None or not isinstance(part, megatron.RowParallelLinear):
            continue
        if not isinstance(part._forward_impl, _MegatronProduct):
            part._forward_impl = _MegatronProduct(part._forward_impl, part.tp_group)


def _divides_inputs(weight: torch.Tensor) -> bool:
    return isinstance(weight, DTensor) and tuple(weight.placements) == (Shard(1),)


@dataclass(frozen=True)
class _Ranks:
    """A process group with what `divided_linear` asks of vLLM's."""

    device_group: dist.ProcessGroup

    @property
    def world_size(self) -> int:
        return self.device_group.size()

    @property
    def rank_in_group(self) -> int:
        return self.device_group.rank()

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return collectives.all_gather(tensor, self, dim)  # type: ignore[arg-type]


class _DTensorForward:
    """Of an `nn.Linear` `[..., inputs]` -> `[..., outputs]`, whole on all ranks."""

    def __init__(self, part: nn.Linear) -> None:
        self.part = part
        self.forward = part.forward

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = self.part.weight
        bias: torch.Tensor | None = self.part.bias
        # FSDP, which may divide the inputs too, gives a whole weight to a forward.
        if not (isinstance(weight, DTensor) and isinstance(input, DTensor)):
            return self.forward(input)
        mesh = weight.device_mesh
        leaves = number_of_leaves(weight.shape[1], mesh.size())
        if leaves == 1:
            return self.forward(input)
        parts = [input.redistribute(mesh, [Shard(input.dim() - 1)]), weight]
        x, local = (part.to_local() for part in parts)
        if isinstance(bias, DTensor):
            bias = bias.to_local()
        ranks: Any = _Ranks(mesh.get_group())
        out = divided_linear(x, local, bias, leaves, ranks)
        return DTensor.from_local(out, mesh, [Replicate()], run_check=False)


class _MegatronProduct:
    """The product inside megatron-core's layer, which then sums it over the ranks.

    The first rank gives the sum, and the others give zeros, to which it adds exactly.
    Each has the gradient, because that of Megatron's sum is passed on unchanged.
    """

    def __init__(self, product: Any, group: dist.ProcessGroup) -> None:
        self.product = product
        self.ranks = _Ranks(group)

    def __call__(
        self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        size = self.ranks.world_size
        leaves = number_of_leaves(weight.shape[1] * size, size)
        if leaves == 1:
            return self.product(input, weight, *args, **kwargs)
        ranks: Any = self.ranks
        out = divided_linear(input, weight, None, leaves, ranks)
        return out if ranks.rank_in_group == 0 else _Zeros.apply(out)


class _Zeros(torch.autograd.Function):
    """Zeros whose gradient is that of the tensor in their place."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return torch.full_like(tensor, -0.0)  # x + -0.0 is x, also where x is -0.0

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad
