# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention that a trainer's module writes out, as a call of a training kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .calls import AttentionCall
from .trial import SeenAttention
from .written_out import FOLLOWED, SOFTMAX, Product, Scores

_DROPOUT = (F.dropout, torch.dropout)


@dataclass
class _Pending:
    """Scores that are not computed, and what has become of zeros in their place."""

    scores: Scores
    stand_in: torch.Tensor  # [..., tokens, tokens]
    is_weights: bool = False
    dropout: float = 0.0


class TrainedScores:
    """Follows the scores of one forward of a submodule.

    Zeros stand for them, and go through what the module does with scores. So they
    become the mask, which may differ from batch to batch.

    Args:
        seen: What the trial has seen, by the turn of the product with values.

    """

    def __init__(self, seen: Mapping[int, SeenAttention]) -> None:
        self._seen = seen
        begin = [one.scores for one in seen.values() if one.scores is not None]
        self._begin = {site.turn: site for site in begin}
        self._turn = 0
        self._pending = WeakIdKeyDictionary()

    def product(self, func: Any, args: Any, kwargs: Any) -> AttentionCall | Any:
        """The call of attention that a product ends, or the product's result."""
        turn, self._turn = self._turn, self._turn + 1
        product = Product.of(func, args)
        if product is None:
            return func(*args, **kwargs)
        pending = self._pending.pop(product.left, None)
        if pending is not None:
            return self._call(self._seen[turn], pending, product)
        site = self._begin.get(turn)
        if site is None:
            return func(*args, **kwargs)
        scores = Scores(site, product)
        return self._hold(_Pending(scores, product.left.new_zeros(scores.shape)))

    def among(self, func: Any, args: Any, kwargs: Any) -> _Pending | None:
        """The scores that a call goes on with, if it does."""
        if func not in FOLLOWED:
            return None
        given = (x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
        return next((self._pending[x] for x in given if x in self._pending), None)

    def follow(self, pending: _Pending, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of such a call."""
        if func in SOFTMAX:
            pending.is_weights = True
        elif not pending.is_weights:
            with torch.no_grad():
                result = func(*args, **kwargs)
            if result is not None:
                pending.stand_in = result
        elif func in _DROPOUT:
            pending.dropout = _probability(*args, **kwargs)
        return self._hold(pending)

    def _hold(self, pending: _Pending) -> torch.Tensor:
        self._pending[pending.stand_in] = pending
        return pending.stand_in

    def _call(
        self, seen: SeenAttention, pending: _Pending, last: Product
    ) -> AttentionCall:
        cap = seen.soft_cap
        scores = replace(
            pending.scores,
            scale=seen.scale if cap is None else cap,
            inner_scale=None if cap is None else seen.scale / cap,
            seen=pending.stand_in,
        )
        return replace(scores.attend(last), dropout=pending.dropout)


def _probability(
    weights: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> float:
    return p if training else 0.0
