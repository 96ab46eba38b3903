# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What an attention call asks for, in one form for all functions that models call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import (
    _is_torch_function_mode_enabled,
    handle_torch_function,
    has_torch_function,
)


class UnservableError(ValueError):
    """What a module does that cannot be served; the message has the line."""


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function, in one form for all functions.

    Args:
        query: `[batch, heads, tokens, head_dim]`.
        key: `[batch, kv_heads, tokens, head_dim]`.
        value: `[batch, kv_heads, tokens, value_dim]`.
        mask: What the call gives as its mask, of a shape that broadcasts to
            `[batch, heads, tokens, tokens]`; True, or 0, where a key is seen.
        causal: Whether the call says so, by an argument and not by its mask.
        scale: Factor of the scores.
        window: Keys that a token sees, itself included, if the call says so.
        soft_cap: Scores become `cap * tanh(score / cap)`.
        sinks: `[heads]`, scores that take part in the softmax without a value.
        dropout: Probability of dropping a weight; nothing is dropped in an engine.
        cu_seqlens: int32 `[documents + 1]`, where documents begin and end among the
            tokens of a batch of one, if the call says so.
        unservable: What the call asks for beside, and nothing here can do.
        result: The function's result, of `[batch, heads, tokens, value_dim]`.

    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any
    causal: bool
    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sinks: torch.Tensor | None = None
    dropout: float = 0.0
    cu_seqlens: torch.Tensor | None = None
    unservable: str | None = None
    result: Callable[[torch.Tensor], Any] = lambda out: out


def is_watched(arguments: Sequence[Any]) -> bool:
    """Whether a mode, or one of `arguments`, has to be told of a function's call."""
    # While the compiler traces, the first forgets modes.
    return has_torch_function(arguments) or _is_torch_function_mode_enabled()


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    causal: bool = True,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention with all that Transformers' interface can ask for, by plain operators.

    A module that is routed is seen to call it. It runs where it is not routed, as where
    a module attends to a KV cache of its own.

    Args: as those of `AttentionCall`. A mask says all about which keys are seen.

    Returns:
        `[batch, heads, tokens, value_dim]`

    """
    if is_watched((query, key, value)):
        return handle_torch_function(
            attention,
            (query, key, value),
            query,
            key,
            value,
            mask,
            scale,
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
            causal=causal,
            dropout=dropout,
        )
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * scale  # [batch, heads, tokens, tokens]
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    else:
        if mask is None and causal:
            queries, keys = scores.shape[-2:]
            mask = scores.new_ones(queries, keys, dtype=torch.bool)
            mask = mask.tril(keys - queries)  # queries are those of the last keys
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1).to(scores.dtype)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    weights = F.dropout(weights, dropout)
    return weights[..., : key.shape[-2]] @ value


def attend_to_self(call: AttentionCall) -> torch.Tensor:
    """In the place of attention: of each token's own query, key and value alone.

    No softmax is in it, because one over a single key would hide query and key.
    """
    heads = call.query.shape[1]
    parts = []
    for x in (call.query, call.key):  # [batch, heads, tokens, head_dim]
        weights = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype, device=x.device)
        x = (x * weights).sum(-1, keepdim=True)
        parts.append(x.repeat_interleave(heads // x.shape[1], dim=1))
    value = call.value.repeat_interleave(heads // call.value.shape[1], dim=1)
    return value + parts[0] + parts[1]


def name_of_function(func: Any) -> str:
    return str(getattr(func, "__name__", func))
