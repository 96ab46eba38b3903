# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Initial values of parameters that do not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from vllm.training.layouts import divided_parameters


def initialize_parameters(
    module: nn.Module, initialize: Callable[[str, torch.Tensor], object]
) -> None:
    """Give every parameter its initial values, the same for any number of ranks.

    vLLM's layers leave their parameters uninitialized. Each rank fills each whole
    parameter and keeps its part of it. Seed the random generator before, with the same
    seed on every rank: `initialize` has to draw the same values on all of them.

    Args:
        module: A model that has vLLM's parallel layers among its own.
        initialize: Called as `initialize(name, tensor)` for each whole parameter, in
            the order of `named_parameters`, to fill the tensor in place.

    """
    layouts = divided_parameters(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            layout = layouts.get(name)
            if layout is None:
                initialize(name, parameter)
                continue
            whole = parameter.new_empty(layout.shape)
            initialize(name, whole)
            layout.padding_of(parameter).zero_()
            layout.load(parameter, whole)
