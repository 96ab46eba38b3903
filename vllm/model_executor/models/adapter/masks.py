# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which keys the mask of an attention call shows to each query, by its values."""

from __future__ import annotations

from dataclasses import dataclass
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
    rows = _rows(mask, tokens)
    if not torch.equal(rows, rows[:1].expand_as(rows)):
        raise UnknownMaskError("its mask differs from sequence to sequence")
    pattern = rows[0]
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


@dataclass(frozen=True)
class Documents:
    """What the mask of a batch says beside being causal.

    Args:
        window: The keys that a token sees, itself included; None for all earlier ones.
        present: int64 `[tokens]`, which places of the flattened batch have a token;
            None if all do, and each row is one document.
        cu_seqlens: int32 `[documents + 1]`, where documents begin among these.

    """

    window: int | None
    present: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None


def documents_of(mask: Any, causal: bool, batch: int, tokens: int) -> Documents:
    """The documents of a batch, where its mask shows each its own tokens only.

    A place that does not see itself has no token, as padding has none. One that does
    not see the place before it begins a document.

    Args:
        mask: As that of `window_of`, `[..., tokens, tokens]`, with an axis of `batch`,
            or 1, before the last three.
        causal: Whether the call says so beside the mask.
        batch: The number of rows.
        tokens: Of each row.

    Raises:
        UnknownMaskError: A token sees others, or does not see all of these.

    """
    pattern = _rows(mask, tokens)  # [1 or batch, tokens, tokens]
    if causal:
        pattern = pattern & torch.ones_like(pattern).tril()
    present = pattern.diagonal(dim1=-2, dim2=-1)  # [1 or batch, tokens]
    begins = present.clone()
    begins[:, 1:] &= ~pattern.diagonal(-1, dim1=-2, dim2=-1)
    document = begins.cumsum(-1)  # [1 or batch, tokens], from 1 on
    place = torch.arange(tokens, device=pattern.device)
    distance = place[:, None] - place
    expected = document[:, :, None] == document[:, None, :]
    expected &= present[:, :, None] & present[:, None, :] & (distance >= 0)
    # What places without a token see does not matter.
    pattern = pattern & present[:, :, None]
    window = int(pattern.sum(-1).amax())
    longest = int(expected.sum(-1).amax())
    if not torch.equal(pattern, expected & (distance < window)):
        raise UnknownMaskError(
            "its mask is neither causal nor a sliding window in each document"
        )
    found = None if window == longest else window
    if bool(present.all()) and int(begins.sum()) == len(begins):
        return Documents(found)
    present, begins = (x.expand(batch, tokens).flatten() for x in (present, begins))
    index = present.nonzero().squeeze(1)
    starts = begins[index].nonzero().squeeze(1)
    end = torch.tensor([len(index)], device=starts.device)
    return Documents(found, index, torch.cat([starts, end]).to(torch.int32))


def _rows(mask: Any, tokens: int) -> torch.Tensor:
    """Which keys a mask shows in each row of a batch, `[1 or batch, tokens, tokens]`.

    Raises:
        UnknownMaskError: That is not all that it says.

    """
    if not isinstance(mask, torch.Tensor):
        raise UnknownMaskError(f"its mask is a {type(mask).__name__}")
    if mask.dim() < 2 or mask.shape[-1] != tokens or mask.shape[-2] not in (1, tokens):
        raise UnknownMaskError(
            f"its mask has shape {list(mask.shape)} for {tokens} tokens"
        )
    seen = mask if mask.dtype == torch.bool else _seen(mask)
    seen = seen.expand(*seen.shape[:-2], tokens, tokens)
    seen = seen.reshape(*((1,) * (4 - seen.dim())), *seen.shape)  # [batch, heads, ...]
    if not torch.equal(seen, seen[:, :1].expand_as(seen)):
        raise UnknownMaskError("its mask differs from head to head")
    return seen[:, 0]


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
