# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How the parameters of a model in training are divided."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.layout import Layout, layout_of


def divided_parameters(
    module: nn.Module, context: ParallelContext | None = None
) -> dict[str, Layout]:
    """The layout of each divided parameter by its name, or by each name if it is tied.

    Parameters that every rank holds whole are left out.

    Args:
        module: With vLLM's layers, Megatron's, or DTensors.
        context: This rank's place; needed for Megatron's layers, which do not know it.

    """
    place = context or ParallelContext()
    layouts = {}
    for prefix, layer in module.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            layout = layout_of(parameter, layer, place)
            if is_divided(layout):
                layouts[f"{prefix}.{name}" if prefix else name] = layout
    return layouts


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter or gradient."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_divided(layout: Layout) -> bool:
    """Whether a rank holds a part, has rows of padding, or shares with others."""
    return layout.axis is not None or layout.shape != layout.local_shape
