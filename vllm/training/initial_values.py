# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Initial values of parameters that do not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from vllm.model_executor.parallel_context import ParallelContext
from vllm.training.layouts import divided_parameters, local_of


def initialize_parameters(
    module: nn.Module,
    initialize: Callable[[str, torch.Tensor], object],
    context: ParallelContext | None = None,
) -> None:
    """Give every parameter its initial values, the same for any number of ranks.

    vLLM's layers leave their parameters uninitialized. Each rank fills each whole
    parameter and keeps its part of it. Seed the random generator before, with the same
    seed on every rank: `initialize` has to draw the same values on all of them.

    Args:
        module: A model with vLLM's parallel layers, Megatron's, or DTensors.
        initialize: Called as `initialize(name, tensor)` for each whole parameter, in
            the order of `named_parameters`, to fill the tensor in place.
        context: This rank's place; needed for Megatron's layers, which do not know it.

    """
    layouts = divided_parameters(module, context)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            layout, local = layouts.get(name), local_of(parameter)
            if layout is None:
                initialize(name, local)
                continue
            whole = local.new_empty(layout.shape)
            initialize(name, whole)
            layout.padding_of(local).zero_()
            layout.load(local, whole)
