# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Operators: a matrix product that is summed in a tree, and the rest of a tree.

An element of the result depends on nothing but the two rows that are multiplied: not on
the number of rows on either side, and not on what else is in the batch.
"""

from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

import vllm
from vllm.model_executor.layers.tree_linear.tree import tree_sum
from vllm.utils.torch_utils import direct_register_custom_op, vllm_lib


def tree_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    leaves: int,
    partial: bool,
) -> torch.Tensor:
    """`x @ weight.T + bias`, with the sum over the last axis in a tree.

    Args:
        x: `[rows, features]`.
        weight: `[outputs, features]`, of the dtype of `x`.
        bias: `[outputs]`, or None; added to the sum before it is rounded.
        leaves: A power of two that divides the features.
        partial: Leave the sum as it is, to be added to those of other ranks. It is
            then float32, or float64 for float64; there must be no bias.

    Returns:
        `[rows, outputs]`, in the dtype of `x` unless `partial`.

    """
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32):
        # late: vLLM has Triton only where there is a GPU
        from vllm.model_executor.layers.tree_linear.triton_product import (
            triton_tree_product,
        )

        return triton_tree_product(x, weight, bias, leaves, partial)
    if x.is_cuda:
        total = tree_sum(_by_leaves(x, weight, leaves))
    else:
        load_cpu_operator()
        total = torch.ops.vllm.tree_product_cpu(x, weight, leaves)
    return total if partial else round_sum(total, bias, x.dtype)


def tree_total(
    parts: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The sum of subtrees with its bias, rounded once.

    Args:
        parts: Float32 or float64 `[subtrees, rows, outputs]`, as of `tree_product` with
            `partial`, in the order of the features.
        bias: `[outputs]`, or None.
        dtype: Of the result.

    Returns:
        `[rows, outputs]`.

    """
    if parts.is_cuda and parts.dtype == torch.float32:
        # late, as above
        from vllm.model_executor.layers.tree_linear.triton_product import (
            triton_tree_total,
        )

        return triton_tree_total(parts.contiguous(), bias, dtype)
    return round_sum(tree_sum(parts), bias, dtype)


def tree_total_of_ranks(
    local: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    group_name: str,
) -> torch.Tensor:
    """`tree_total` of what the GPUs of a process group have.

    Args:
        local: Float32 or float64 `[rows, outputs]`, of this rank.
        bias: `[outputs]`, the same on all ranks, or None.
        dtype: Of the result.
        group_name: The `group_name` of the process group.

    Returns:
        `[rows, outputs]`, the same on all ranks.

    """
    # Its parameter is a subtype of str, which an operator cannot have.
    group = distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    if local.dtype == torch.float32:
        # late, as above
        from vllm.model_executor.layers.tree_linear import peer_sums

        room = peer_sums.room_of(group)
        if room is not None:
            return peer_sums.sum_of_peers(room, local, bias, dtype)
    parts = local.new_empty((group.size(), *local.shape))  # [ranks, rows, outputs]
    dist.all_gather(list(parts), local.contiguous(), group)
    return tree_total(parts, bias, dtype)


def round_sum(
    total: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """A finished sum with its bias, rounded once."""
    if bias is not None:
        total = total + bias.to(total.dtype)
    return total.to(dtype)


def _by_leaves(x: torch.Tensor, weight: torch.Tensor, leaves: int) -> torch.Tensor:
    # [leaves, rows, outputs]
    pairs = zip(x.chunk(leaves, 1), weight.chunk(leaves, 1), strict=True)
    return torch.stack([a @ b.t() for a, b in pairs])


@cache
def load_cpu_operator() -> None:
    """Load `torch.ops.vllm.tree_product_cpu`, of `csrc/cpu/tree_product.cpp`.

    Raises:
        RuntimeError: It was not compiled with this vLLM.

    """
    library = Path(vllm.__file__).with_name("_tree_product_C.so")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise RuntimeError(
            "VLLM_BATCH_INVARIANT=1 on a CPU needs the operator of csrc/cpu/"
            f"tree_product.cpp, which was not compiled with this vLLM: {error}. "
            "Install a C++ compiler and cmake and build it again."
        ) from None


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    leaves: int,
    partial: bool,
) -> torch.Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32) if partial else x.dtype
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


def _fake_total(
    parts: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    return parts.new_empty(parts.shape[1:], dtype=dtype)


def _fake_total_of_ranks(
    local: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    group_name: str,
) -> torch.Tensor:
    return torch.empty_like(local, dtype=dtype)


for operator, fake in (
    (tree_product, _fake),
    (tree_total, _fake_total),
    (tree_total_of_ranks, _fake_total_of_ranks),
):
    name = operator.__name__
    direct_register_custom_op(name, operator, fake_impl=fake, dispatch_key="CPU")
    vllm_lib.impl(name, operator, dispatch_key="CUDA")
