# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensor-parallel collectives with gradients.

One rule decides every gradient here, as in Megatron-LM: what all ranks hold alike
(hidden states, norms, the loss) has a gradient that all ranks hold alike. So the
gradient of an all-reduce is its output's as it is, and where a tensor that all ranks
hold alike enters a sharded layer, the gradients of the ranks are summed.

`vllm.distributed.tensor_model_parallel_*` call these for tensors that need a gradient.
They run on `torch.distributed`, whose collectives may be called from autograd's
threads. vLLM's communicators, which keep a stream for each thread, may not.

Reference: Megatron-LM, https://arxiv.org/abs/1909.08053, section 3
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from vllm.distributed.parallel_state import GroupCoordinator

__all__ = ["all_gather", "all_reduce", "copy", "reduce_scatter"]


def all_reduce(input_: torch.Tensor, group: "GroupCoordinator") -> torch.Tensor:
    """The sum over the group's ranks (Megatron's g). The gradient passes unchanged."""
    if group.world_size == 1:
        return input_
    return _AllReduce.apply(input_, group)


def copy(input_: torch.Tensor, group: "GroupCoordinator") -> torch.Tensor:
    """`input_`, which all ranks hold alike (Megatron's f). The gradient is summed."""
    if group.world_size == 1:
        return input_
    return _Copy.apply(input_, group)


def all_gather(
    input_: torch.Tensor, group: "GroupCoordinator", dim: int = -1
) -> torch.Tensor:
    """The ranks' tensors, of one shape, joined along `dim`. The gradient is split."""
    if group.world_size == 1:
        return input_
    return _AllGather.apply(input_, group, dim)


def reduce_scatter(
    input_: torch.Tensor, group: "GroupCoordinator", dim: int = -1
) -> torch.Tensor:
    """This rank's part of the sum, split along `dim`. The gradient is gathered."""
    if group.world_size == 1:
        return input_
    return _ReduceScatter.apply(input_, group, dim)


def _sum(tensor: torch.Tensor, group: "GroupCoordinator") -> torch.Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group.device_group)
    return total


def _join(tensor: torch.Tensor, group: "GroupCoordinator", dim: int) -> torch.Tensor:
    # the collectives join and split the first axis
    tensor = tensor.movedim(dim, 0).contiguous()
    joined = tensor.new_empty(group.world_size * tensor.shape[0], *tensor.shape[1:])
    dist.all_gather_into_tensor(joined, tensor, group=group.device_group)
    return joined.movedim(0, dim).contiguous()


def _sum_and_split(
    tensor: torch.Tensor, group: "GroupCoordinator", dim: int
) -> torch.Tensor:
    tensor = tensor.movedim(dim, 0).contiguous()
    part = tensor.new_empty(tensor.shape[0] // group.world_size, *tensor.shape[1:])
    dist.reduce_scatter_tensor(part, tensor, group=group.device_group)
    return part.movedim(0, dim).contiguous()


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_: torch.Tensor, group: Any) -> torch.Tensor:
        return _sum(input_, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return input_.view_as(input_)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum(grad, ctx.group), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_: torch.Tensor, group: Any, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return _join(input_, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        parts = grad.chunk(ctx.group.world_size, ctx.dim)
        return parts[ctx.group.rank_in_group].contiguous(), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_: torch.Tensor, group: Any, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return _sum_and_split(input_, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _join(grad, ctx.group, ctx.dim), None, None
