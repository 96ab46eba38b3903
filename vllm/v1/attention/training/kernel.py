# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What every kernel of training attention takes, and what several of them compute."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from vllm.v1.attention.training.sequences import Sequences


class AttentionParams(NamedTuple):
    """The options of one call; `TrainableAttention` says what each means."""

    scale: float
    causal: bool
    sliding_window: int | None
    logits_soft_cap: float | None
    dropout: float
    deterministic: bool
    sinks: torch.Tensor | None = None  # [heads]


# (q, k, v, sequences, params) -> output, where q and the output are
# [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim]
AttentionKernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Sequences, AttentionParams],
    torch.Tensor,
]

# of q, k and v, in their shapes and dtypes
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def empty_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Gradients:
    """Contiguous tensors that a backward kernel writes its results into."""
    contiguous = torch.contiguous_format
    dq, dk, dv = (torch.empty_like(x, memory_format=contiguous) for x in (q, k, v))
    return dq, dk, dv


def sink_gradient(
    grad_out: torch.Tensor, sinks: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> torch.Tensor:
    """The gradient of the sinks, `[heads]`, in their dtype.

    A sink is a key without a value, so its gradient is that of any key's score with
    P * dP = 0: `-p_sink * (out . grad_out)`, summed over the tokens.

    Args:
        grad_out: `[tokens, heads, head_dim]`.
        sinks: `[heads]`, scores that take part in the softmax without a value.
        out: `[tokens, heads, head_dim]`, the forward's.
        lse: `[tokens, heads]`, the log-sum-exp of the scores, sinks included.
    """
    delta = (out.to(lse.dtype) * grad_out).sum(-1)  # [tokens, heads]
    share = torch.exp(sinks.to(lse.dtype) - lse)  # [tokens, heads]
    return -(share * delta).sum(0).to(sinks.dtype)
