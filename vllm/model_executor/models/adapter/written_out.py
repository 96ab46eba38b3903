# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention that a module writes out: `softmax(q @ k.T * scale, masked) @ v`.

The trial follows the scores from the first product to the second, and compares them
with what a scale, a cap and a mask make of the first. In an engine step no scores are
computed: a tensor without memory stands for them until the second product is reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .calls import AttentionCall, UnservableError
from .masks import HIDDEN
from .sites import Site, line_of_model

T = torch.Tensor
PRODUCT = "matmul"  # by which the calls of all of these are counted
PRODUCTS = (torch.matmul, T.matmul, T.__matmul__, torch.bmm, T.bmm, torch.einsum)
SOFTMAX = (F.softmax, torch.softmax, T.softmax)
_TANH = (torch.tanh, T.tanh, F.tanh)
_MULTIPLY = (
    torch.mul,
    torch.multiply,
    T.mul,
    T.__mul__,
    T.__rmul__,
    T.mul_,
    T.__imul__,
)
_DIVIDE = (torch.div, T.div, T.__truediv__, T.div_, T.__itruediv__, torch.true_divide)
# Before the softmax these may only hide keys, which is checked there by the values.
# After it they may not change the weights, which is checked at each call.
_OTHERS = (
    *(torch.add, T.add, T.__add__, T.__radd__, T.add_, T.__iadd__, T.__sub__),
    *(torch.masked_fill, T.masked_fill, T.masked_fill_, torch.where, T.where),
    *(F.dropout, torch.dropout, T.to, T.float, T.type, T.type_as, T.clone),
    *(T.contiguous, T.__setitem__),
)
FOLLOWED = frozenset((*SOFTMAX, *_TANH, *_MULTIPLY, *_DIVIDE, *_OTHERS))


@dataclass(frozen=True)
class Product:
    """One product of two tensors, whichever function computes it.

    Args:
        operands: What was given.
        left: `[..., rows, inner]`, the operand itself where its axes are in this order.
        right: `[..., inner, columns]`.
        result: From `[..., rows, columns]` to the axes that the function gives.

    """

    operands: tuple[torch.Tensor, torch.Tensor]
    left: torch.Tensor
    right: torch.Tensor
    result: Callable[[torch.Tensor], torch.Tensor] = lambda out: out

    @staticmethod
    def of(func: Any, args: Any) -> Product | None:
        """That of a call of one of `PRODUCTS`; None if it is of another form."""
        if func is not torch.einsum:
            return Product(tuple(args[:2]), *args[:2]) if len(args) > 1 else None
        equation, *operands = args
        if len(operands) == 1:
            operands = list(operands[0])
        inputs, _, output = equation.replace(" ", "").partition("->")
        names = inputs.split(",")
        if len(operands) != 2 or len(names) != 2 or "." in equation:
            return None
        left, right = names
        batch = [x for x in output if x in left and x in right]
        rows = [x for x in output if x not in right]
        columns = [x for x in output if x not in left]
        inner = [x for x in left if x in right and x not in output]
        if not len(rows) == len(columns) == len(inner) == 1:
            return None
        wanted = ([*batch, *rows, *inner], [*batch, *inner, *columns])
        if any(sorted(x) != sorted(y) for x, y in zip(names, wanted, strict=True)):
            return None
        first, second = (
            x if [*name] == order else x.permute([name.index(axis) for axis in order])
            for x, name, order in zip(operands, names, wanted, strict=True)
        )
        found = [*batch, *rows, *columns]
        axes = [found.index(x) for x in output]
        given = operands[0], operands[1]
        return Product(given, first, second, lambda out: out.permute(axes))


@dataclass(frozen=True)
class Scores:
    """The scores of one attention, as far as they are computed.

    Args:
        site: Of the product that began them.
        first: That product, of queries `[..., tokens, head_dim]` and keys
            `[..., head_dim, tokens]`.
        product: Its result, `[..., tokens, tokens]`; None in an engine step.
        scale: What it was multiplied by since, or since its tanh.
        inner_scale: What it was multiplied by before its tanh, if it has one.
        seen: Which keys a query sees, bool, after the softmax.

    """

    site: Site
    first: Product
    product: torch.Tensor | None = None
    scale: float = 1.0
    inner_scale: float | None = None
    seen: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        query, key = self.first.left.shape, self.first.right.shape
        heads = torch.broadcast_shapes(query[:-2], key[:-2])
        return (*heads, query[-2], key[-1])

    def attend(self, last: Product) -> AttentionCall:
        """The attention that the product with values ends."""
        # The axes before the last two are [heads], or [batch, heads, ...].
        axes = self.shape[:-2]
        batch = axes[0] if len(axes) > 1 else 1

        def flat(x: torch.Tensor) -> torch.Tensor:
            x = x.expand(*axes, *x.shape[-2:])
            return x.reshape(batch, -1, *x.shape[-2:])  # [batch, heads, tokens, dim]

        cap = None if self.inner_scale is None else self.scale
        return AttentionCall(
            flat(self.first.left),
            flat(self.first.right.transpose(-2, -1)),
            flat(last.right),
            None if self.seen is None else flat(self.seen),
            causal=False,
            scale=self.scale * (1.0 if self.inner_scale is None else self.inner_scale),
            soft_cap=cap,
            result=lambda out: last.result(out.reshape(*axes, *out.shape[-2:])),
        )


class WrittenOut:
    """Follows scores in a trial.

    Args:
        tokens: Their number, a size that no parameter has.

    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._scores = WeakIdKeyDictionary()

    def weights(self, func: Any, args: Any) -> tuple[Scores, Product] | None:
        """The scores whose weights this call multiplies with values, if it does."""
        product = Product.of(func, args) if func in PRODUCTS else None
        found = None if product is None else self._scores.get(product.left)
        if product is None or found is None or found.seen is None:
            return None
        return found, product

    def follow(
        self,
        func: Any,
        site: Site | None,
        args: Any,
        kwargs: Any,
        results: Sequence[torch.Tensor],
    ) -> None:
        """Note what a call does with scores.

        Raises:
            UnservableError: It does something with them that vLLM cannot do.

        """
        scores = self._of((args, kwargs))
        shape = (self._tokens, self._tokens)
        if len(results) != 1 or results[0].shape[-2:] != shape:
            if results and scores is not None and scores.seen is not None:
                raise _unknown("its weights go somewhere else than to values")
            return
        (result,) = results  # [..., tokens, tokens]
        product = Product.of(func, args) if func in PRODUCTS else None
        if product is not None and scores is None and result.dim() > 2:
            assert site is not None
            found = result.detach().clone()
            self._scores[result] = Scores(site, product, found)
        elif scores is None:
            if func in SOFTMAX:
                raise _unknown("its scores are not one product of queries and keys")
        elif func in SOFTMAX:
            seen = _seen(scores, args[0], result)
            self._scores[result] = replace(scores, seen=seen)
        elif func in _TANH and scores.seen is None and scores.inner_scale is None:
            scores = replace(scores, inner_scale=scores.scale, scale=1.0)
            self._scores[result] = scores
        elif func in FOLLOWED:
            if scores.seen is not None:
                self._check_unchanged(args, kwargs, result)
            elif func in _MULTIPLY + _DIVIDE:
                factor = _factor(func, args)
                scores = replace(scores, scale=scores.scale * factor)
            self._scores[result] = scores
        elif scores.seen is not None:
            raise _unknown("its weights go somewhere else than to values")

    def _of(self, given: Any) -> Scores | None:
        leaves = (x for x in tree_leaves(given) if isinstance(x, torch.Tensor))
        return next((self._scores[x] for x in leaves if x in self._scores), None)

    def _check_unchanged(self, args: Any, kwargs: Any, result: torch.Tensor) -> None:
        leaves = (x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
        weights = next(x for x in leaves if x in self._scores)
        if not torch.allclose(weights.float(), result.float(), atol=1e-2):
            raise _unknown("its weights are changed after the softmax")


class Placeholders:
    """What stands for scores in an engine step.

    Args:
        sites: Of the products that begin them.

    """

    def __init__(self, sites: frozenset[Site]) -> None:
        self._sites = sites
        self._scores: dict[int, tuple[torch.Tensor, Scores]] = {}

    @property
    def counts_products(self) -> bool:
        return bool(self._sites)

    def begin(self, site: Site, product: Product) -> torch.Tensor | None:
        """What stands for the product at `site`; None if that begins no scores."""
        if site not in self._sites:
            return None
        scores = Scores(site, product)
        stand_in = product.left.new_zeros(()).expand(scores.shape)
        self._scores[id(stand_in)] = stand_in, scores
        return stand_in

    def among(self, args: Any, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """The one among the arguments of a call, if any."""
        if not self._scores:
            return None
        found = (self._scores.get(id(x)) for x in tree_leaves((args, kwargs)))
        return next((pair[0] for pair in found if pair is not None), None)

    def end(self, weights: Any) -> Scores | None:
        """The scores that `weights` stand for, whose product with values is next."""
        found = self._scores.pop(id(weights), None)
        return None if found is None else found[1]


def _seen(scores: Scores, given: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Which keys each query sees, by what the softmax was given.

    Raises:
        UnservableError: It was given something else than a scale, a cap and a mask
            make of the first product.

    """
    assert scores.product is not None
    given, weights = given.float(), weights.float()
    expected = scores.product.float()
    if scores.inner_scale is not None:
        expected = torch.tanh(scores.inner_scale * expected)
    expected = scores.scale * expected
    if not torch.allclose(weights, given.softmax(-1), atol=1e-2):
        raise _unknown("its softmax is not over the keys")
    seen = given > HIDDEN
    rounding = (
        1e-4 if scores.first.left.dtype in (torch.float32, torch.float64) else 2e-2
    )
    bound = rounding * expected.abs().amax()
    if not bool(((given - expected).abs()[seen] <= bound).all()):
        raise _unknown(
            "between its product and its softmax is more than a number as its scale, a "
            "cap and a mask"
        )
    return seen


def _factor(func: Any, args: Any) -> float:
    """What a call multiplies scores by; NaN if that is not one constant number."""
    numbers = [x for x in args[:2] if not isinstance(x, torch.Tensor) or x.numel() == 1]
    # A parameter gets another value when the checkpoint is loaded.
    if len(numbers) != 1 or isinstance(numbers[0], nn.Parameter):
        return math.nan
    number = float(numbers[0])
    if func not in _DIVIDE:
        return number
    return 1 / number if args[1] is numbers[0] else math.nan


def _unknown(why: str) -> UnservableError:
    return UnservableError(
        f"attention is written out at {line_of_model()}, and {why}; call "
        "F.scaled_dot_product_attention there, whose keys and values can be taken to "
        "vLLM's cache"
    )
