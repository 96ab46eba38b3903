# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A whole module that rounds as its divided form does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vllm.model_executor.layers.tree_linear.other_layers import sum_in_tree
from vllm.model_executor.models.plans.layers import (
    RowwiseLinear,
    WholeLinear,
    become,
)
from vllm.model_executor.models.plans.patterns import find_plan
from vllm.model_executor.models.plans.styles import Entry, match_styles
from vllm.model_executor.models.plans.tensor import match_splits

__all__ = ["sum_as_divided"]


def sum_as_divided(
    module: nn.Module, tp_plan: Mapping[str, Any] | None = None
) -> nn.Module:
    """Have a trainer's module sum as the ranks of any engine do, in place.

    A trainer that holds the whole module has to know which of its linear layers an
    engine divides, and how. Inside `batch_invariant()` these then compute the bits of
    every tensor-parallel layout. Outside of it, the module computes what it did.
    Layers that DTensor or megatron-core have divided are found without a plan.

    Args:
        module: Any module; its parameters, names and hooks stay as they are.
        tp_plan: What the engine divides, in the form of a module's own `tp_plan`:
            `rowwise` for layers whose inputs are divided, as by `RowParallelLinear`,
            and `colwise` for those whose outputs are, as by `QKVParallelLinear`, and
            for an output head. Default: the plans that the module has.

    Returns:
        `module`.

    Raises:
        ValueError: The plan does not fit the module.

    """
    plan = find_plan(module, "tp_plan", None, True) if tp_plan is None else tp_plan
    styles = match_styles(module, plan)
    match_splits(module, styles)  # checks the modules
    round_as_divided(module, styles)
    sum_in_tree(module)
    return module


def round_as_divided(module: nn.Module, styles: Mapping[str, Entry]) -> None:
    """The same for styles that were matched and checked."""
    names = {name for name, _ in module.named_modules()}
    for name, entry in styles.items():
        part = module.get_submodule(name) if name in names else None
        if not isinstance(part, nn.Linear):
            continue  # an embedding's rows are looked up: no sum
        if entry.style.split == "outputs":
            become(part, WholeLinear)
        elif entry.style.split == "inputs":
            become(
                part,
                RowwiseLinear,
                input_is_parallel=True,
                tp_rank=0,
                tp_size=1,
                blocks=entry.style.blocks,
            )
