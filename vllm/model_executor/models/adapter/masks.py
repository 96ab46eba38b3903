# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which keys the mask of an attention call shows to each query, by its values."""

from __future__ import annotations

from typing import Any

import torch

# What models write for minus infinity: their dtype's least number, or one like -1e4.
HIDDEN = -9e3


class UnknownMaskError(ValueError):
    """A mask that vLLM's paged attention has no form for; the message says why."""


def window_of(mask: Any, causal: bool, tokens: int) -> int | None:
    """The keys that a token sees by its mask, itself included; None for all earlier.

    Args:
        mask: True, or 0, where a key is seen, and False, or a very negative number,
            elsewhere, `[..., tokens, tokens]`. None where the call has none.
        causal: Whether the call says so beside the mask.
        tokens: The number of queries and of keys.

    Raises:
        UnknownMaskError: It is neither causal nor a sliding window.

    """
    if mask is None:
        if causal:
            return None
        raise UnknownMaskError(
            "every token sees all tokens, also later ones. vLLM generates with causal "
            "attention only"
        )
    if not isinstance(mask, torch.Tensor):
        raise UnknownMaskError(f"its mask is a {type(mask).__name__}")
    if mask.dim() < 2 or mask.shape[-1] != tokens or mask.shape[-2] not in (1, tokens):
        raise UnknownMaskError(
            f"its mask has shape {list(mask.shape)} for {tokens} tokens"
        )
    seen = mask if mask.dtype == torch.bool else _seen(mask)
    seen = seen.expand(*seen.shape[:-2], tokens, tokens).reshape(-1, tokens, tokens)
    if not torch.equal(seen, seen[:1].expand_as(seen)):
        raise UnknownMaskError("its mask differs from head to head")
    pattern = seen[0]
    if causal:
        pattern = pattern & torch.ones_like(pattern).tril()
    if bool((pattern & torch.ones_like(pattern).triu(1)).any()):
        raise UnknownMaskError(
            "its mask shows later tokens to earlier ones, as those of encoders and "
            "prefixes do. vLLM generates with causal attention only"
        )
    window = int(pattern[-1].sum())
    expected = torch.ones_like(pattern).tril() & torch.ones_like(pattern).triu(
        1 - window
    )
    if not torch.equal(pattern, expected):
        raise UnknownMaskError(
            "its mask is neither causal nor a sliding window, as those of chunks, "
            "blocks and documents are not"
        )
    return window if window < tokens else None


def _seen(mask: torch.Tensor) -> torch.Tensor:
    """Where an additive mask, which is 0 or about minus infinity, shows a key.

    Raises:
        UnknownMaskError: It adds anything else.

    """
    seen = mask > HIDDEN
    if bool((mask[seen] != 0).any()):
        raise UnknownMaskError(
            "it adds a bias to its scores, as ALiBi and relative positions do. vLLM's "
            "paged attention takes none from a module"
        )
    return seen
