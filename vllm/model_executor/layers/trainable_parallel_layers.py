# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What vLLM's parallel layers compute where gradients are on.

Decorators, put on vLLM's own methods, choose: without gradients the method itself runs,
with its kernels; with gradients the same result comes from differentiable operators,
and every parameter gets the gradient that it would have on one device. In the
batch-invariant mode both come from operators whose bits do not depend on the layout.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm.distributed import differentiable_collectives as collectives
from vllm.distributed.parallel_state import GroupCoordinator, get_tp_group
from vllm.model_executor.layers.tree_linear import (
    divided_linear,
    layout_invariant,
    linear,
    number_of_leaves,
    whole_linear,
)
from vllm.model_executor.layers.tree_linear.linear import (
    autocast,
    parameter_gradients,
)
from vllm.platforms import current_platform

__all__ = [
    "differentiable_embedding",
    "differentiable_linear",
    "kept_if_layout_invariant",
    "summed_in_a_tree",
]


def differentiable_linear(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates `Unquantized*Method.apply(layer, x, bias)`."""

    @functools.wraps(apply)
    def apply_or_train(
        self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or layer.weight.requires_grad):
            return _linear(layer, x, bias)
        if layout_invariant():
            return whole_linear(x, layer.weight, bias)
        return apply(self, layer, x, bias)

    return apply_or_train


def differentiable_embedding(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates `VocabParallelEmbedding.forward(input_)`."""

    @functools.wraps(forward)
    def look_up_or_train(self: Any, input_: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.tp_size > 1 and self.weight.requires_grad:
            return _embedding(self, input_)
        return forward(self, input_)

    return look_up_or_train


def summed_in_a_tree(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates `RowParallelLinear.forward(input_)`."""

    @functools.wraps(forward)
    def forward_or_tree(self: Any, input_: torch.Tensor) -> Any:
        # late: the modules of these layers import this one
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        leaves = number_of_leaves(self.input_size, self.tp_size)
        unquantized = type(self.quant_method) is UnquantizedLinearMethod
        if leaves == 1 or not unquantized or not self.reduce_results:
            return forward(self, input_)
        group = get_tp_group() if self.tp_size > 1 else None
        if group is not None and not self.input_is_parallel:
            parts = collectives.copy(input_, group).chunk(self.tp_size, dim=-1)
            input_ = parts[self.tp_rank]
        bias = None if self.skip_bias_add else self.bias
        output = divided_linear(input_, self.weight, bias, leaves, group)
        if not self.return_bias:
            return output
        return output, self.bias if self.skip_bias_add else None

    return forward_or_tree


def kept_if_layout_invariant(process: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates `Unquantized*Method.process_weights_after_loading(layer)`.

    On a CPU it packs the weight for a kernel whose bits depend on the layer's shape.
    """

    @functools.wraps(process)
    def process_or_keep(self: Any, layer: nn.Module) -> None:
        if not (current_platform.is_cpu() and layout_invariant()):
            process(self, layer)

    return process_or_keep


def _linear(layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # late: the modules of these layers import this one
    from vllm.model_executor.layers.linear import (
        ColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        VocabParallelEmbedding,
    )

    weight = layer.weight
    if weight.numel() == 0:
        raise RuntimeError(
            f"The weight of this {type(layer).__name__} was packed for serving on a "
            "CPU and has no gradient any more. Train a module of its own, before "
            "process_weights_after_loading."
        )
    if layer.tp_size == 1:
        return linear(x, weight, bias)

    group = get_tp_group()
    if isinstance(layer, QKVParallelLinear) and layer.num_kv_head_replicas > 1:
        weight = _share_kv_heads(layer, weight, group)
        bias = None if bias is None else _share_kv_heads(layer, bias, group)
    if isinstance(layer, ColumnParallelLinear | VocabParallelEmbedding):
        return _ColumnLinear.apply(*autocast(x, weight, bias), group)
    output = linear(x, weight, bias)
    bias_elsewhere = isinstance(layer, RowParallelLinear) and layer.tp_rank > 0
    if bias_elsewhere and layer.bias is not None and not layer.skip_bias_add:
        # Rank 0 adds the bias, and the sum over the ranks brings it to all.
        output = _AddedElsewhere.apply(output, layer.bias)
    return output


def _embedding(layer: Any, input_: torch.Tensor) -> torch.Tensor:
    # [...] -> [..., hidden]
    if layer.num_added_embeddings:
        raise NotImplementedError(
            f"{layer.num_added_embeddings} embeddings were added to the vocabulary of "
            f"{layer.org_vocab_size}; only a vocabulary without any can be trained."
        )
    shard = layer.shard_indices
    index = input_.long() - shard.org_vocab_start_index
    elsewhere = (index < 0) | (index >= shard.num_org_elements)
    output = F.embedding(index.masked_fill(elsewhere, 0), layer.weight)
    output = output.masked_fill(elsewhere.unsqueeze(-1), 0)
    if not getattr(layer, "reduce_results", True):  # newer than 0.26
        return output
    group = getattr(layer, "parallel_group", None) or get_tp_group()
    return collectives.all_reduce(output, group)


class _ColumnLinear(torch.autograd.Function):
    """`F.linear` of an `x` that is the same on all ranks; its gradient is summed.

    The ranks exchange the gradient of `x` while they compute that of the weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        group: Any,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return linear(x, weight, bias)

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            finish = collectives.start_sum(grad @ weight, ctx.group)
        of_parameters = parameter_gradients(ctx, grad, x)
        x_grad = finish() if ctx.needs_input_grad[0] else None
        return x_grad, *of_parameters, None


class _AddedElsewhere(torch.autograd.Function):
    """`output`, to which another rank adds `bias`: both get the gradient."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.bias_shape = bias.shape
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, grad.sum_to_size(ctx.bias_shape)


def _share_kv_heads(
    layer: Any, parameter: torch.Tensor, group: GroupCoordinator
) -> torch.Tensor:
    """`parameter` of the fused projection, whose KV rows several ranks share."""
    num_query_rows = layer.num_heads * layer.head_size
    return _SumOfReplicas.apply(
        parameter, group, num_query_rows, layer.num_kv_head_replicas
    )


class _SumOfReplicas(torch.autograd.Function):
    """Sums the gradients of the rows from `start` on over neighbouring ranks."""

    @staticmethod
    def forward(
        ctx: Any, parameter: torch.Tensor, group: Any, start: int, replicas: int
    ) -> torch.Tensor:
        ctx.group, ctx.start, ctx.replicas = group, start, replicas
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        # [q | k | v, ...]; summed in one order, so that the replicas stay equal
        q, kv = grad.split([ctx.start, grad.shape[0] - ctx.start])
        shares = collectives.all_gather(kv.unsqueeze(0), ctx.group, dim=0)
        first = ctx.group.rank_in_group // ctx.replicas * ctx.replicas
        kv = shares[first : first + ctx.replicas].sum(0)
        return torch.cat([q, kv]), None, None, None
