# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A forward in an engine step: attention, positions and head go where vLLM has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .calls import AttentionCall, UnservableError, name_of_function
from .readers import READERS
from .sites import Running, Site
from .tables import Tables
from .trial import Origin
from .written_out import FOLLOWED, PRODUCT, PRODUCTS, Placeholders, Product

Attend = Callable[[AttentionCall], torch.Tensor]


class HiddenStatesReached(BaseException):  # noqa: N818 - no error
    """Ends a forward before its head, because vLLM computes the logits separately.

    It is no `Exception`, so that no handler in the model takes it for a failure.
    """

    def __init__(self, hidden_states: torch.Tensor) -> None:
        super().__init__("the hidden states are computed")
        self.hidden_states = hidden_states


class Routing(TorchFunctionMode):
    """Routes the calls of one forward, and leaves all others as they are.

    Args:
        forward: The forward, which the module's hooks are told of.
        positions: `[tokens]`, of each token in its sequence.
        attention: What attends at each site; the result is
            `[1, heads, tokens, value_dim]`.
        origins: The calls whose results positions replace.
        tables: The module's tensors.
        cut: The call in front of the head, if it is known.
        scores: The products that begin the scores of attention that is written out.

    """

    def __init__(
        self,
        forward: Running,
        positions: torch.Tensor,
        attention: Mapping[Site, Attend],
        origins: Mapping[Site, Origin],
        tables: Tables,
        cut: Site | None,
        scores: frozenset[Site] = frozenset(),
    ) -> None:
        super().__init__()
        self._forward = forward
        self._placeholders = Placeholders(scores)
        self._positions = positions
        self._attention = attention
        self._origins = origins
        self._cut = cut
        names = {site.function for site in (*origins, *([cut] if cut else ()))}
        # By the tensor that a call takes: the name that calls with it are counted by.
        self._slices = _by_tensor(names, "slice of ", tables)
        self._products = _by_tensor(names, "linear of ", tables)
        self._counts_aranges = "arange" in names
        self._counts_selections = "selection" in names

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in READERS:
            site = self._forward.site(name_of_function(func))
            return self._attend(site, READERS[func](*args, **kwargs))
        if func in PRODUCTS and self._placeholders.counts_products:
            return self._product(func, args, kwargs)
        if func in FOLLOWED:
            scores = self._placeholders.among(args, kwargs)
            if scores is not None:
                return scores
        name = self._counted(func, args)
        if name is None:
            return func(*args, **kwargs)
        site = self._forward.site(name)
        if site == self._cut:
            raise HiddenStatesReached(args[0])
        origin = self._origins.get(site)
        if origin is None:
            return func(*args, **kwargs)
        if origin.kind == "arange":
            return self._arange(origin)
        return self._slice(origin, *args)

    def _counted(self, func: Any, args: Any) -> str | None:
        """The name by which calls like this one are counted, if they are."""
        if func is torch.arange:
            return "arange" if self._counts_aranges else None
        if func is torch.Tensor.__getitem__:
            name = self._slices.get(id(args[0]))
            if name is None and self._counts_selections and self._has_rows(args[0]):
                return "selection"
            return name
        if func is F.linear:
            return self._products.get(id(args[1]))
        return None

    def _has_rows(self, tensor: torch.Tensor) -> bool:
        return tensor.dim() in (2, 3) and tensor.shape[-2] == self._positions.shape[-1]

    def _product(self, func: Any, args: Any, kwargs: Any) -> Any:
        site = self._forward.site(PRODUCT)
        product = Product.of(func, args)
        if product is None:
            return func(*args, **kwargs)
        scores = self._placeholders.end(product.left)
        if scores is not None:
            return self._attend(site, scores.attend(product))
        placeholder = self._placeholders.begin(site, product)
        return func(*args, **kwargs) if placeholder is None else placeholder

    def _attend(self, site: Site, call: AttentionCall) -> Any:
        attend = self._attention.get(site)
        if attend is None:
            raise UnservableError(
                f"{site} was not called when the module was tried. Which attention "
                "calls a forward makes may not depend on the tokens."
            )
        return call.result(attend(call))

    def _arange(self, origin: Origin) -> torch.Tensor:
        values = self._positions
        if origin.step != 1:
            values = values * origin.step
        if origin.start != 0:
            values = values + origin.start
        return values.to(origin.dtype)

    def _slice(self, origin: Origin, table: torch.Tensor, index: Any) -> torch.Tensor:
        """`table[index]` with the positions for the first entries of its axis."""
        parts = list(index) if isinstance(index, tuple) else [index]
        parts[origin.axis] = slice(None)
        return table.index_select(origin.axis, self._positions)[tuple(parts)]


def _by_tensor(names: set[str], prefix: str, tables: Tables) -> dict[int, str]:
    return {
        id(tables.get(name.removeprefix(prefix))): name
        for name in names
        if name.startswith(prefix)
    }
