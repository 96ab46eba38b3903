# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Adapters of a mixture's experts, each of which gets some of a batch's tokens.

Which adapter a row has is not known inside an expert. So the block that holds the
experts is called once for each adapter of the batch, with the rows of that adapter
alone. Which rows there are has to be known on the host: in a trainer, and in an engine
on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .adapter import Adapter
from .site_hooks import BatchRows, SiteHook


class Mixture:
    """Calls a block of experts with the rows of one adapter at a time.

    Args:
        name: of the block, for errors.
        block: its first argument is `[..., hidden]`, all tokens of a batch, and its
            output is a tensor or a tuple of tensors with the same leading axes or with
            `[tokens, ...]`. No token may depend on another.
        rows: which row has which adapter.
        hooks: of its experts, by name.

    """

    def __init__(
        self,
        name: str,
        block: nn.Module,
        rows: BatchRows,
        hooks: Mapping[str, SiteHook],
    ) -> None:
        self.name = name
        self.block = block
        self.rows = rows
        self.stacks = {name: hook for name, hook in hooks.items() if hook.site.experts}
        self._has_layers = len(self.stacks) < len(hooks)
        self._is_changed = True

    def attach(self) -> None:
        own = self.block.forward

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._forward(own, x, *args, **kwargs)

        self.block.forward = forward

    def detach(self) -> None:
        # what `attach` has put before the method of the class
        self.block.__dict__.pop("forward", None)

    def look_at(self, adapters: Iterable[Adapter]) -> None:
        """Whether to call the block once, if none of `adapters` changes its experts.

        Experts that are layers have hooks that have to know the rows' adapter in any
        case.
        """
        self._is_changed = self._has_layers or any(
            name in adapter.factors for adapter in adapters for name in self.stacks
        )

    def _forward(self, own: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (self._is_changed and self.rows.any_adapter):
            return own(x, *args, **kwargs)
        rows = self.rows.slots if self.rows.host is None else self.rows.host
        assert rows is not None and not rows.is_cuda
        tokens = x.numel() // x.shape[-1]
        if tokens < self.rows.tokens:
            raise RuntimeError(
                f"{self.name} was called with {tokens} rows in a batch of "
                f"{self.rows.tokens} tokens; adapters of its experts need all of them. "
                "Leave the experts out by target_modules."
            )
        rows = rows[:tokens]
        slots = rows.unique().tolist()
        flat = x.reshape(tokens, x.shape[-1])
        outputs, places = [], []
        try:
            for slot in slots:
                self.rows.only = slot
                if len(slots) == 1:
                    with self._weights_of(slot):
                        return own(x, *args, **kwargs)
                where = (rows == slot).nonzero().squeeze(1).to(x.device)
                part = flat[where]
                if x.dim() == 3:  # [1, tokens, hidden], as rows of one sequence
                    part = part.unsqueeze(0)
                with self._weights_of(slot):
                    outputs.append(own(part, *args, **kwargs))
                places.append(where)
        finally:
            self.rows.only = None
        order = torch.cat(places).argsort()
        if isinstance(outputs[0], tuple):
            parts = zip(*outputs, strict=True)
            return tuple(_joined(list(part), order, x) for part in parts)
        return _joined(outputs, order, x)

    @contextmanager
    def _weights_of(self, slot: int) -> Iterator[None]:
        """Within the context, stacks have the adapter's products added to them.

        The sum is an attribute of the module, which Python finds before it asks
        `nn.Module` for the parameter of that name. So the parameter stays what it is.
        """
        changed = [(s, s.changed_stack(slot)) for s in self.stacks.values()]
        try:
            for stack, weight in changed:
                if weight is not None:
                    vars(stack.site.module)[stack.site.own_name] = weight
            yield
        finally:
            for stack, _ in changed:
                vars(stack.site.module).pop(stack.site.own_name, None)


def mixtures_of(
    module: nn.Module, hooks: Mapping[str, SiteHook], rows: BatchRows
) -> dict[str, Mixture]:
    """By name, the blocks of `module` whose experts are among those of `hooks`."""
    blocks: dict[str, dict[str, SiteHook]] = {}
    for name, hook in hooks.items():
        if hook.site.mixture is not None:
            blocks.setdefault(hook.site.mixture, {})[name] = hook
    return {
        name: Mixture(name, module.get_submodule(name), rows, own)
        for name, own in blocks.items()
    }


def _joined(
    parts: list[torch.Tensor], order: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """The outputs of parts of the tokens, in the order of the batch."""
    has_axes_of_x = parts[0].dim() == x.dim()
    axis = parts[0].dim() - 2
    whole = torch.cat(parts, axis).index_select(axis, order)
    return whole.reshape(*x.shape[:-1], -1) if has_axes_of_x else whole
