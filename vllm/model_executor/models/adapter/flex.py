# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the functions that a call hands to `flex_attention` say about its scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .calls import AttentionCall

# By block mask: its values. A model gives one block mask to all of its layers.
_masks = WeakIdKeyDictionary()


class FlexMods(NamedTuple):
    """In the place of a mask: what changes the scores, and what hides keys.

    Args:
        score_mod: `score_mod(score, batch, head, query, key)`; None changes nothing.
        block_mask: A `BlockMask`; None hides nothing.

    """

    score_mod: Callable[..., torch.Tensor] | None
    block_mask: Any


def resolved(call: AttentionCall) -> AttentionCall:
    """`call` with a mask of values and its cap, if it has `FlexMods` in their place.

    An engine step needs neither, so that this is not done while a call is read.
    """
    if not isinstance(call.mask, FlexMods):
        return call
    score_mod, block_mask = call.mask
    mask = None if block_mask is None else _values(block_mask, call)
    if score_mod is None:
        return replace(call, mask=mask)
    from torch.nn.attention.flex_attention import create_mask

    batch, heads, queries, _ = call.query.shape
    keys = call.key.shape[-2]
    shown = create_mask(score_mod, batch, heads, queries, keys, call.query.device)
    cap, bias = _cap_of(score_mod, call)
    return replace(
        call,
        mask=shown if mask is None else mask & shown,
        soft_cap=cap,
        unservable=call.unservable or bias,
    )


def _values(block_mask: Any, call: AttentionCall) -> torch.Tensor:
    """Which keys it shows, `[1 or batch, 1 or heads, queries, keys]`."""
    from torch.nn.attention.flex_attention import create_mask

    mask = _masks.get(block_mask)
    if mask is None:
        batch, heads, queries, keys = block_mask.shape
        device = call.query.device
        mask = create_mask(block_mask.mask_mod, batch, heads, queries, keys, device)
        _masks[block_mask] = mask
    return mask


def _cap_of(
    score_mod: Callable[..., torch.Tensor], call: AttentionCall
) -> tuple[float | None, str | None]:
    """The soft cap that `score_mod` is, or else why it cannot be served."""
    device = call.query.device
    generator = torch.Generator().manual_seed(0)
    heads, tokens = call.query.shape[1], min(call.query.shape[-2], 64)
    shape = (1, heads, tokens, tokens)
    batch, head, query, key = torch.meshgrid(
        *(torch.arange(size, device=device) for size in shape), indexing="ij"
    )
    scores = torch.randn(shape, generator=generator, device="cpu").to(device)

    def changed(scores: torch.Tensor) -> torch.Tensor:
        return score_mod(scores, batch, head, query, key)

    result = changed(scores)
    shown = ~result.isneginf()
    if torch.equal(result[shown], scores[shown]):
        return None, None
    cap = float(changed(torch.full_like(scores, 1e6))[shown].amax())
    capped = cap * torch.tanh(scores / cap)
    if torch.allclose(result[shown], capped[shown], rtol=1e-4, atol=1e-5):
        return cap, None
    return None, (
        "its score_mod adds a bias to the scores, or changes them in another way than "
        "by cap * tanh(score / cap)"
    )
