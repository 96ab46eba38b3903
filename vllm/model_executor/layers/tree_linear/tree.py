# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The order in which a sum over a divided axis is added.

Floating-point sums depend on their order, and a tensor-parallel layer adds first what
each rank has, and then the ranks. So the axis is always divided into the same number of
leaves, whatever the number of ranks. Each leaf is summed by itself, and the leaves are
added in a binary tree. A rank holds whole subtrees, so that any number of ranks that
divides the leaves adds the same numbers in the same order:

    (((l0 + l1) + (l2 + l3)) + ((l4 + l5) + (l6 + l7)))
     |  rank 0 of 2         |   |  rank 1 of 2         |

All nodes are float32 (float64 for float64), and only the sum is rounded to the dtype
of the layer. Rounding nodes to bfloat16 would halve what ranks exchange, at twice the
error of one product.

The idea is that of tree-based invariant kernels, https://arxiv.org/abs/2511.17826.
"""

import math

import torch

import vllm.envs as envs
from vllm.logger import init_logger

logger = init_logger(__name__)


def layout_invariant() -> bool:
    """Whether results are to have the same bits in every tensor-parallel layout.

    They are with `VLLM_BATCH_INVARIANT=1`, unless `VLLM_BATCH_INVARIANT_LEAVES=1`.
    """
    return envs.VLLM_BATCH_INVARIANT and envs.VLLM_BATCH_INVARIANT_LEAVES > 1


def number_of_leaves(size: int, ranks: int = 1) -> int:
    """How many leaves the sum over an axis has, which `ranks` divide.

    It is `VLLM_BATCH_INVARIANT_LEAVES`, or the largest power of two in it that also
    divides the axis: the same in every layout. It is 1 outside of the batch-invariant
    mode, and where the ranks cannot hold whole subtrees, such as 3 or 16 ranks for 8
    leaves. Then the result has the bits of its own layout, and a warning says so.

    Args:
        size: The length of the whole axis.
        ranks: How many equal parts of it there are.

    Raises:
        ValueError: `VLLM_BATCH_INVARIANT_LEAVES` is no power of two.

    """
    if not envs.VLLM_BATCH_INVARIANT:
        return 1
    most = envs.VLLM_BATCH_INVARIANT_LEAVES
    if most < 1 or most & (most - 1):
        raise ValueError(
            f"VLLM_BATCH_INVARIANT_LEAVES is {most}; expected a power of two that is "
            "at least the largest tensor-parallel size, such as 8."
        )
    leaves = math.gcd(most, size)
    if leaves % ranks:
        if most > 1 and not torch.compiler.is_compiling():
            logger.warning_once(
                "A sum over %d features has %d leaves, which %d tensor-parallel ranks "
                "cannot hold: its bits are those of this number of ranks only. Use a "
                "power of two, at most VLLM_BATCH_INVARIANT_LEAVES (%d).",
                size,
                leaves,
                ranks,
                most,
            )
        return 1
    return leaves


def tree_sum(parts: torch.Tensor) -> torch.Tensor:
    """The sum of subtrees that lie side by side, `[subtrees, ...]` -> `[...]`.

    Args:
        parts: Float32 or float64, whose first axis is a power of two.

    """
    while parts.shape[0] > 1:
        parts = parts[0::2] + parts[1::2]
    return parts[0]
