# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The norm of all gradients of a divided model, and clipping by it."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.parallel_context import ParallelContext
from vllm.training.layouts import divided_parameters, local_of


@torch.no_grad()
def clip_grad_norm_(
    module: nn.Module, max_norm: float, context: ParallelContext | None = None
) -> torch.Tensor:
    """Scale all gradients so that their norm, over all ranks, is at most `max_norm`.

    This is `torch.nn.utils.clip_grad_norm_` with every element of the whole model
    counted once: what several ranks hold counts on the first of them.

    Args:
        module: A model with vLLM's parallel layers, Megatron's, or DTensors, divided
            over vLLM's tensor-parallel group.
        max_norm: What the norm may be at most.
        context: This rank's place; needed for Megatron's layers, which do not know it.

    Returns:
        The norm before clipping: a float32 scalar with the same value on all ranks.

    Raises:
        ValueError: a DTensor is divided over other ranks than the group's.

    """
    layouts, group = divided_parameters(module, context), get_tp_group()
    grads = {}
    counted: list[torch.Tensor] = []
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            continue
        if (
            isinstance(parameter, DTensor)
            and parameter.device_mesh.size() != group.world_size
        ):
            raise ValueError(
                f"{name} is a DTensor on {parameter.device_mesh.size()} ranks, and "
                f"vLLM's tensor-parallel group has {group.world_size}. Use "
                "torch.nn.utils.clip_grad_norm_, which counts DTensors on any mesh."
            )
        grad = grads[name] = local_of(parameter.grad)
        if (layout := layouts.get(name)) is not None:
            parts = layout.parts_of(grad)
            counted += [local for box, local in parts if box.replica == 0]
        elif group.rank_in_group == 0:
            counted.append(grad)
    # Not torch.nn.utils.get_total_norm, which returns bfloat16 for bfloat16 gradients.
    square = torch.zeros((), device=group.device)
    for grad in counted:
        square += torch.linalg.vector_norm(grad, dtype=torch.float32).square()
    torch.distributed.all_reduce(square, group=group.device_group)
    norm = square.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as PyTorch does
    for grad in grads.values():
        grad.mul_(scale)
    return norm
