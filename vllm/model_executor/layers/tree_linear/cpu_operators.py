# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The batch-invariant operators of a CPU: PyTorch's products, replaced by ours.

PyTorch's choose a kernel by the number of rows and columns. Its softmax, norms and
means work row by row, so they are left as they are.
"""

import torch

from vllm.model_executor.layers.tree_linear.product import (
    load_cpu_operator,
    round_sum,
)


def register_cpu_operators(library: torch.library.Library) -> None:
    """Replace the products of two matrices on a CPU, as long as `library` lives.

    Args:
        library: Of the namespace `aten`, for implementations.

    Raises:
        RuntimeError: The operator that replaces them was not compiled.

    """
    load_cpu_operator()
    library.impl("mm", _mm, "CPU")
    library.impl("mm.out", _mm_out, "CPU")
    library.impl("addmm", _addmm, "CPU")
    library.impl("addmm.out", _addmm_out, "CPU")


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`[rows, size] x [size, columns]`, before the sum is rounded."""
    if not a.is_floating_point():  # exact in any order
        return (a.unsqueeze(2) * b.unsqueeze(0)).sum(1, dtype=a.dtype)
    return torch.ops.vllm.tree_product_cpu(a, b.t(), 1)


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _product(a, b).to(a.dtype)


def _mm_out(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    return out.resize_(a.shape[0], b.shape[1]).copy_(_mm(a, b))


def _addmm(
    bias: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    total = _product(a, b)
    if alpha != 1:
        total = total * alpha
    if beta == 0:  # what is in `bias` then does not count, not even NaN
        return total.to(a.dtype)
    return round_sum(total, bias if beta == 1 else bias.to(total.dtype) * beta, a.dtype)


def _addmm_out(
    bias: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: torch.Tensor,
) -> torch.Tensor:
    total = _addmm(bias, a, b, beta=beta, alpha=alpha)
    return out.resize_(total.shape).copy_(total)
