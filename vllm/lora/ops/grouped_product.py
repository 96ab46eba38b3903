# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The operator of every LoRA: each row of a batch times the factor of its own adapter.

A LoRA adds `B(A x)`. Both products are `torch.ops.vllm.lora_grouped_product`, the first
one (`shrink=True`) from the width of the layer to the rank, the second one back. Both
factors are stored with the rank first, A as `[rank, in]` and B as `[rank, out]`, so
that an adapter of a smaller rank is a prefix of its slot.

The rows of one adapter are multiplied together and apart from all others. So their
result has the same bits whichever other adapters are in the batch, and it has the same
bits in a trainer and in an engine that hold the same rows.
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
        rows: `[tokens]`, the slot of each row's adapter; -1 is a row without one. On a
            GPU only an engine, whose CUDA graphs are recorded without knowing it, has
            it there; a trainer has it on the CPU.
        factors: `[ranks of the slot, width]` for each slot, or one stack of all,
            `[slots, most ranks, width]`, whose rows beyond an adapter's rank are zero.
        ranks: `[slots]`, how many ranks of each factor its adapter uses.
        shrink: from the width to the ranks, else from the ranks to the width.

    Returns:
        `[tokens, most ranks]` or `[tokens, width]`. Rows without an adapter are zeros:
        negative ones after an expansion, because only those leave the bits of
        whatever they are added to.

    """
    if rows.is_cuda:
        [stack] = factors
        if shrink:
            return shrink_stack(x, rows, stack)
        return expand_stack(x, rows, stack, ranks)
    slots = _as_slots(factors)
    most = max(factor.shape[0] for factor in slots)
    width = slots[0].shape[1]
    out = x.new_full((x.shape[0], most if shrink else width), 0.0 if shrink else -0.0)
    sizes = ranks.tolist()
    for slot, where in _rows_by_slot(rows):
        factor = slots[slot][: sizes[slot]].to(x.dtype)
        if shrink:
            out[where, : sizes[slot]] = x[where] @ factor.t()
        elif sizes[slot]:
            out[where] = x[where][:, : sizes[slot]] @ factor
    return out


def _as_slots(factors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    return factors[0].unbind() if factors[0].dim() == 3 else factors


def shrink_stack(
    x: torch.Tensor, rows: torch.Tensor, stack: torch.Tensor
) -> torch.Tensor:
    """One product with all adapters, of which each row keeps its own."""
    tokens, most = x.shape[0], stack.shape[1]
    every = x @ stack.to(x.dtype).flatten(0, 1).t()  # [tokens, slots * most]
    own = rows.clamp(min=0).to(torch.int64).view(-1, 1, 1).expand(-1, 1, most)
    narrow = every.view(tokens, -1, most).gather(1, own).squeeze(1)
    return torch.where((rows >= 0).unsqueeze(1), narrow, 0.0)


def expand_stack(
    x: torch.Tensor, rows: torch.Tensor, stack: torch.Tensor, ranks: torch.Tensor
) -> torch.Tensor:
    """Each row in its adapter's place among zeros, times all adapters.

    The zeros leave the bits of a row's own sum, as long as all factors are finite.
    """
    slots = torch.arange(stack.shape[0], device=rows.device)
    mine = rows.unsqueeze(1) == slots  # [tokens, slots]
    spread = torch.where(mine.unsqueeze(2), x[:, None, : stack.shape[1]], 0.0)
    wide = spread.flatten(1) @ stack.to(x.dtype).flatten(0, 1)
    changes = (rows >= 0) & (ranks[rows.clamp(min=0)] > 0)
    return torch.where(changes.unsqueeze(1), wide, -0.0)


def lora_add(
    output: torch.Tensor,
    x: torch.Tensor,
    rows: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    any_adapter: torch.Tensor,
) -> None:
    """Add the adapters' part to a layer's output, in place: in an engine.

    It is one operator, so that a CUDA graph that is recorded for batches without an
    adapter has nothing of it.

    Args:
        output: `[tokens, outputs]`.
        x: `[tokens, inputs]`.
        rows: as of `lora_grouped_product`.
        a: `[slots, most ranks, inputs]`.
        b: `[slots, most ranks, outputs]`.
        ranks: as of `lora_grouped_product`.
        scales: float32 `[slots]`.
        any_adapter: bool `[]` on the CPU, whether some row has an adapter.

    """
    if not any_adapter:
        return
    narrow = lora_grouped_product(x, rows, [a], ranks, True)
    narrow = scaled(narrow, rows, scales, output.dtype)
    output += lora_grouped_product(narrow, rows, [b], ranks, False)


def scaled(
    narrow: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """What shrinking gave, times the scale of each row's adapter, in `dtype`."""
    factors = scales[rows.clamp(min=0)].to(dtype)
    return narrow.to(dtype) * factors.unsqueeze(1)


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
        rows: as of `lora_grouped_product`, on the CPU.
        factors: as of `lora_grouped_product`, one for each slot.
        ranks: as of `lora_grouped_product`.

    """
    gradients = [torch.zeros_like(factor) for factor in factors]
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
    slots = _as_slots(factors)
    most = max(factor.shape[0] for factor in slots)
    return x.new_empty((x.shape[0], most if shrink else slots[0].shape[1]))


def _gradients_fake(
    narrow: torch.Tensor,
    wide: torch.Tensor,
    rows: torch.Tensor,
    factors: list[torch.Tensor],
    ranks: torch.Tensor,
) -> list[torch.Tensor]:
    return [torch.empty_like(factor) for factor in factors]


def _add_fake(
    output: torch.Tensor,
    x: torch.Tensor,
    rows: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    any_adapter: torch.Tensor,
) -> None:
    pass


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
direct_register_custom_op(
    lora_add.__name__,
    lora_add,
    mutates_args=["output"],
    fake_impl=_add_fake,
    dispatch_key="CompositeExplicitAutograd",
)
torch.library.register_autograd(
    "vllm::lora_grouped_product", _backward, setup_context=_keep_inputs, lib=vllm_lib
)
