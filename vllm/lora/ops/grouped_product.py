# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The operator of every LoRA: each row of a batch times the factor of its own adapter.

A LoRA adds `B(A x)`. Both products are `torch.ops.vllm.lora_grouped_product`, the first
one (`shrink=True`) from the width of the layer to the rank, the second one back. Both
factors are stored with the rank first, A as `[rank, in]` and B as `[rank, out]`, so
that an adapter of a smaller rank is a prefix of its slot.

The rows of one adapter are multiplied together and apart from all others. Their result
thus has the same bits whichever other adapters are in the batch, and in a trainer and
an engine that hold the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vllm.utils.torch_utils import direct_register_custom_op, vllm_lib

NO_ADAPTER = -1


def lora_grouped_product(
    x: torch.Tensor,
    rows: torch.Tensor,
    factors: list[torch.Tensor],
    ranks: torch.Tensor,
    shrink: bool,
) -> torch.Tensor:
    """Each row of `x` times the factor of its adapter, in the dtype of `x`.

    Args:
        x: `[tokens, width]` to shrink, `[tokens, most ranks]` to expand.
        rows: `[tokens]`, the slot of each row's adapter; -1 is a row without one. On
            the CPU where the process knows it, which spares a GPU the rows of others.
        factors: `[ranks of the slot, width]` for each slot.
        ranks: `[slots]`, how many ranks of each factor its adapter uses.
        shrink: from the width to the ranks, else from the ranks to the width.

    Returns:
        `[tokens, most ranks]` or `[tokens, width]`. Rows without an adapter are zeros:
        negative ones after an expansion, because only those leave the bits of
        whatever they are added to.

    """
    most = max(factor.shape[0] for factor in factors)
    width = factors[0].shape[1]
    out = x.new_full((x.shape[0], most if shrink else width), 0.0 if shrink else -0.0)
    if rows.is_cuda:
        return _by_masks(x, rows, factors, out, shrink)
    sizes = ranks.tolist()
    for slot, where in _rows_by_slot(rows):
        factor = factors[slot][: sizes[slot]].to(x.dtype)
        if shrink:
            out[where, : sizes[slot]] = x[where] @ factor.t()
        elif sizes[slot]:
            out[where] = x[where][:, : sizes[slot]] @ factor
    return out


def _by_masks(
    x: torch.Tensor,
    rows: torch.Tensor,
    factors: Sequence[torch.Tensor],
    out: torch.Tensor,
    shrink: bool,
) -> torch.Tensor:
    """The same without a look at `rows`, which a CUDA graph has no values of."""
    for slot, padded in enumerate(factors):
        factor = padded.to(x.dtype)
        size = factor.shape[0]
        if size == 0:
            continue
        mine = (rows == slot).unsqueeze(1)
        if shrink:
            out[:, :size] = torch.where(mine, x @ factor.t(), out[:, :size])
        else:
            out = torch.where(mine, x[:, :size] @ factor, out)
    return out


def lora_factor_gradients(
    narrow: torch.Tensor,
    wide: torch.Tensor,
    rows: torch.Tensor,
    factors: list[torch.Tensor],
    ranks: torch.Tensor,
) -> list[torch.Tensor]:
    """Gradients of all `factors`: for each slot, a sum over its rows.

    Args:
        narrow: `[tokens, most ranks]`, what shrinking gave or its gradient.
        wide: `[tokens, width]`, what expanding gave or its gradient.
        rows: as of `lora_grouped_product`.
        factors: as of `lora_grouped_product`.
        ranks: as of `lora_grouped_product`.

    """
    gradients = [torch.zeros_like(factor) for factor in factors]
    if rows.is_cuda:
        for slot, factor in enumerate(factors):
            mine = (rows == slot).unsqueeze(1)
            part = torch.where(mine, narrow[:, : factor.shape[0]], 0)
            gradients[slot].copy_(part.t() @ torch.where(mine, wide, 0))
        return gradients
    sizes = ranks.tolist()
    for slot, where in _rows_by_slot(rows):
        size = sizes[slot]
        gradients[slot][:size] = narrow[where][:, :size].t() @ wide[where]
    return gradients


def _rows_by_slot(rows: torch.Tensor) -> list[tuple[int, slice | torch.Tensor]]:
    """Where the rows of each slot are; a slice if they lie together."""
    found: dict[int, list[slice]] = {}
    slots, counts = torch.unique_consecutive(rows, return_counts=True)
    start = 0
    for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
        if slot != NO_ADAPTER:
            found.setdefault(slot, []).append(slice(start, start + count))
        start += count
    return [
        (slot, runs[0] if len(runs) == 1 else (rows == slot).nonzero().squeeze(1))
        for slot, runs in found.items()
    ]


def _product_fake(
    x: torch.Tensor,
    rows: torch.Tensor,
    factors: list[torch.Tensor],
    ranks: torch.Tensor,
    shrink: bool,
) -> torch.Tensor:
    most = max(factor.shape[0] for factor in factors)
    return x.new_empty((x.shape[0], most if shrink else factors[0].shape[1]))


def _gradients_fake(
    narrow: torch.Tensor,
    wide: torch.Tensor,
    rows: torch.Tensor,
    factors: list[torch.Tensor],
    ranks: torch.Tensor,
) -> list[torch.Tensor]:
    return [torch.empty_like(factor) for factor in factors]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, rows, factors, ranks, ctx.shrink = inputs
    ctx.wants_x = ctx.needs_input_grad[0]
    ctx.wants_factors = any(factor.requires_grad for factor in factors)
    ctx.save_for_backward(x, rows, ranks, *factors)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    x, rows, ranks, *factors = ctx.saved_tensors
    gradient = gradient.contiguous()
    of_x, of_factors = None, [None] * len(factors)
    if ctx.wants_x:
        of_x = torch.ops.vllm.lora_grouped_product(
            gradient, rows, factors, ranks, not ctx.shrink
        )
    if ctx.wants_factors:
        narrow, wide = (gradient, x) if ctx.shrink else (x, gradient)
        of_factors = torch.ops.vllm.lora_factor_gradients(
            narrow, wide, rows, factors, ranks
        )
    return of_x, None, of_factors, None, None


for _function, _fake in (
    (lora_grouped_product, _product_fake),
    (lora_factor_gradients, _gradients_fake),
):
    direct_register_custom_op(
        _function.__name__,
        _function,
        fake_impl=_fake,
        dispatch_key="CompositeExplicitAutograd",
    )
torch.library.register_autograd(
    "vllm::lora_grouped_product", _backward, setup_context=_keep_inputs, lib=vllm_lib
)
