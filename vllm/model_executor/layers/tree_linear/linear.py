# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Linear layers whose bits depend on no layout, with gradients."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from vllm.distributed import differentiable_collectives as collectives
from vllm.model_executor.layers.tree_linear.product import round_sum
from vllm.model_executor.layers.tree_linear.tree import layout_invariant, tree_sum

if TYPE_CHECKING:
    from vllm.distributed.parallel_state import GroupCoordinator


def whole_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`F.linear` over an axis that no layout divides, with any number of outputs.

    Args:
        x: `[..., features]`.
        weight: `[outputs, features]`; outputs may be those of one rank, or of all.
        bias: `[outputs]`.

    Returns:
        `[..., outputs]`.

    """
    return _run(x, weight, bias, leaves=1, partial=False)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`F.linear`, or `whole_linear` where every layout is to have the same bits."""
    run = whole_linear if layout_invariant() else F.linear
    return run(x, weight, bias)


def divided_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    leaves: int,
    group: "GroupCoordinator | None" = None,
) -> torch.Tensor:
    """`F.linear` over an axis that tensor parallelism divides, on any number of ranks.

    Args:
        x: `[..., features]`, of this rank.
        weight: `[outputs, features]`, of this rank.
        bias: `[outputs]`, the same on all ranks; it is added once.
        leaves: Of the whole axis, from `number_of_leaves`; the ranks divide it.
        group: The ranks that divide the axis, None for one.

    Returns:
        `[..., outputs]`, the same on all ranks. Every rank adds the ranks' sums by
        itself.

    """
    if group is None or group.world_size == 1:
        return _run(x, weight, bias, leaves, partial=False)
    x, weight, bias = autocast(x, weight, bias)
    local = partial_linear(x, weight, leaves, group.world_size)
    return total_of_ranks(local, bias, leaves, x.dtype, group)


def partial_linear(
    x: torch.Tensor, weight: torch.Tensor, leaves: int, ranks: int
) -> torch.Tensor:
    """This rank's part of a `divided_linear`, to be summed by `total_of_ranks`.

    Args:
        x: `[..., features]`, of this rank.
        weight: `[outputs, features]`, of this rank.
        leaves: Of the whole axis.
        ranks: How many divide the axis. With one the sum is finished.

    Returns:
        `[..., outputs]`. Of several leaves and ranks it is float32, or float64 for
        float64, and else in the dtype of `x`.

    """
    if leaves == 1:  # the bits of this layout only
        return linear(x, weight)
    return _run(x, weight, None, leaves // ranks, partial=ranks > 1)


def total_of_ranks(
    local: torch.Tensor,
    bias: torch.Tensor | None,
    leaves: int,
    dtype: torch.dtype,
    group: "GroupCoordinator",
) -> torch.Tensor:
    """The sum over the ranks of what `partial_linear` returned, with its bias.

    Args:
        local: `[..., outputs]`.
        bias: `[outputs]`, the same on all ranks.
        leaves: Of the whole axis.
        dtype: Of the result.
        group: The ranks that divide the axis.

    Returns:
        `[..., outputs]`, the same on all ranks.

    """
    if has_torch_function((local,)):
        # For a mode that watches a module it is one call: how ranks talk is not the
        # module's doing.
        return handle_torch_function(
            total_of_ranks, (local,), local, bias, leaves, dtype, group
        )
    if leaves == 1:
        total = collectives.all_reduce(local, group)
        return total if bias is None else total + bias
    needs_gradient = bias is not None and bias.requires_grad
    if torch.is_grad_enabled() and (local.requires_grad or needs_gradient):
        sums = collectives.all_gather(local.unsqueeze(0), group, dim=0)
        # [ranks, ..., outputs] -> [..., outputs]
        return round_sum(tree_sum(sums), bias, dtype)
    rows = local.reshape(-1, local.shape[-1])
    if local.is_cuda:
        name = group.device_group.group_name
        out = torch.ops.vllm.tree_total_of_ranks(rows, bias, dtype, name)
    else:
        sums = group.all_gather(rows.unsqueeze(0), dim=0)  # [ranks, rows, outputs]
        out = torch.ops.vllm.tree_total(sums, bias, dtype)
    return out.view(local.shape)


def autocast(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Cast as autocast casts a linear; it cannot see into a Function."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return cast(x), cast(weight), None if bias is None else cast(bias)


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    leaves: int,
    partial: bool,
) -> torch.Tensor:
    x, weight, bias = autocast(x, weight, bias)
    needs_gradient = x.requires_grad or weight.requires_grad
    needs_gradient |= bias is not None and bias.requires_grad
    if torch.is_grad_enabled() and needs_gradient:
        return _Product.apply(x, weight, bias, leaves, partial)
    return _product(x, weight, bias, leaves, partial)


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    leaves: int,
    partial: bool,
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = torch.ops.vllm.tree_product(rows, weight, bias, leaves, partial)
    return out.view(*x.shape[:-1], weight.shape[0])


class _Product(torch.autograd.Function):
    """No sum in its gradient is over the axis that the ranks divide."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        leaves: int,
        partial: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias, leaves, partial)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)  # what the sum of the ranks was rounded to
        x_grad = grad @ weight if ctx.needs_input_grad[0] else None
        return x_grad, *parameter_gradients(ctx, grad, x), None, None


def parameter_gradients(
    ctx: Any, grad: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Those of weight and bias, the second and the third input of a linear layer.

    Args:
        ctx: Of an autograd function, which says which of them are needed.
        grad: `[..., outputs]`.
        x: `[..., features]`.

    """
    weight_grad = bias_grad = None
    rows = grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[1]:
        weight_grad = rows.mT @ x.reshape(-1, x.shape[-1])
    if ctx.needs_input_grad[2]:
        bias_grad = rows.sum(0)
    return weight_grad, bias_grad
