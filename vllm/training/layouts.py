# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How vLLM's parallel layers divide the parameters of a model in training."""

from __future__ import annotations

from torch import nn

from vllm.model_executor.parameters.layout import Layout, layer_layout


def divided_parameters(module: nn.Module) -> dict[str, Layout]:
    """The layout of each divided parameter by its name, or by each name if it is tied.

    Parameters that every rank holds whole are left out.
    """
    layouts = {}
    for prefix, layer in module.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            layout = layer_layout(layer, parameter)
            if layout is not None:
                layouts[f"{prefix}.{name}" if prefix else name] = layout
    return layouts
