# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensor-parallel collectives with gradients.

One rule decides every gradient here, as in Megatron-LM: if all ranks hold the same
tensor (hidden states, norms, the loss), they all hold the same gradient of it. So an
all-reduce passes the gradient of its output on unchanged, and where such a tensor
enters a sharded layer, the gradients of the ranks are summed.

`vllm.distributed.tensor_model_parallel_*` call these for tensors that need a gradient.
They are PyTorch's functional collectives, which torch.compile traces and which autograd
may call from its own threads. vLLM's communicators keep a stream for each thread.

Reference: Megatron-LM, https://arxiv.org/abs/1909.08053, section 3
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

if TYPE_CHECKING:
    from vllm.distributed.parallel_state import GroupCoordinator

__all__ = ["all_gather", "all_reduce", "copy", "reduce_scatter", "start_sum"]

# PyTorch 2.13 renamed these two.
_all_gather = (
    getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
)
_reduce_scatter = (
    getattr(functional, "reduce_scatter_single", None)
    or functional.reduce_scatter_tensor
)


def all_reduce(input_: torch.Tensor, group: "GroupCoordinator") -> torch.Tensor:
    """The sum over the group's ranks (Megatron's g). The gradient passes unchanged."""
    if group.world_size == 1:
        return input_
    return _AllReduce.apply(input_, group)


def copy(input_: torch.Tensor, group: "GroupCoordinator") -> torch.Tensor:
    """`input_`, the same on all ranks (Megatron's f). The gradient is summed."""
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


def start_sum(
    tensor: torch.Tensor, group: "GroupCoordinator"
) -> Callable[[], torch.Tensor]:
    """Begin to sum a tensor over the ranks, which may overwrite it.

    It passes no gradient: the backward of a layer calls it, and computes something else
    in the meantime.

    Returns:
        a function that waits for the sum and returns it.

    """
    tensor = tensor.contiguous()
    if torch.compiler.is_compiling():  # which traces no handles
        total = functional.all_reduce(tensor, "sum", group.device_group)
        return lambda: functional.wait_tensor(total)
    work = dist.all_reduce(tensor, group=group.device_group, async_op=True)

    def finish() -> torch.Tensor:
        work.wait()
        return tensor

    return finish


def _sum(tensor: torch.Tensor, group: "GroupCoordinator") -> torch.Tensor:
    total = functional.all_reduce(tensor.contiguous(), "sum", group.device_group)
    return functional.wait_tensor(total)


def _join(tensor: torch.Tensor, group: "GroupCoordinator", dim: int) -> torch.Tensor:
    dim %= tensor.dim()
    joined = _all_gather(tensor.contiguous(), dim, group.device_group)
    return functional.wait_tensor(joined)


def _sum_and_split(
    tensor: torch.Tensor, group: "GroupCoordinator", dim: int
) -> torch.Tensor:
    dim %= tensor.dim()
    part = _reduce_scatter(tensor.contiguous(), "sum", dim, group.device_group)
    return functional.wait_tensor(part)


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
