# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The norm of all gradients of a divided model, and clipping by it."""

from __future__ import annotations

import torch
from torch import nn

from vllm.distributed.parallel_state import get_tp_group
from vllm.training.layouts import divided_parameters


@torch.no_grad()
def clip_grad_norm_(module: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale all gradients so that their norm, over all ranks, is at most `max_norm`.

    This is `torch.nn.utils.clip_grad_norm_` with every element of the whole model
    counted once: what several ranks hold counts on the first of them.

    Returns:
        The norm before clipping: a float32 scalar with the same value on all ranks.

    """
    layouts, group = divided_parameters(module), get_tp_group()
    counted: list[torch.Tensor] = []
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            continue
        if (layout := layouts.get(name)) is not None:
            parts = layout.parts_of(parameter.grad)
            counted += [local for box, local in parts if box.replica == 0]
        elif group.rank_in_group == 0:
            counted.append(parameter.grad)
    # Not torch.nn.utils.get_total_norm: that of bfloat16 gradients is in bfloat16.
    square = torch.zeros((), device=group.device)
    for grad in counted:
        square += torch.linalg.vector_norm(grad, dtype=torch.float32).square()
    torch.distributed.all_reduce(square, group=group.device_group)
    norm = square.sqrt()
    torch.nn.utils.clip_grads_with_norm_(module.parameters(), max_norm, norm)
    return norm
