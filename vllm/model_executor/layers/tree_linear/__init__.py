# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Linear layers with the same bits in every tensor-parallel layout.

`tree`: the order of a sum over a divided axis, the only place that knows it; `product`:
the operator, with a kernel for each device; `linear`: layers that are made of it, with
gradients.
"""

from vllm.model_executor.layers.tree_linear.linear import (
    divided_linear,
    linear,
    whole_linear,
)
from vllm.model_executor.layers.tree_linear.tree import (
    layout_invariant,
    number_of_leaves,
)

__all__ = [
    "divided_linear",
    "layout_invariant",
    "linear",
    "number_of_leaves",
    "whole_linear",
]
