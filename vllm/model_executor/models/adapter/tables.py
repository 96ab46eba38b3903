# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The tensors that a module holds, such as tables of its rotary embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Tables:
    """Names of a module's parameters, buffers and other tensors, by the tensor.

    Args:
        module: What a factory built.

    """

    def __init__(self, module: nn.Module) -> None:
        self._names: dict[int, str] = {}
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for path, part in module.named_modules():
            for name, tensor in _tensors(part):
                full = f"{path}.{name}" if path else name
                self._names.setdefault(id(tensor), full)
                self._places[full] = (part, name)

    def name_of(self, tensor: torch.Tensor) -> str | None:
        return self._names.get(id(tensor))

    def get(self, name: str) -> torch.Tensor:
        """The tensor that has this name now."""
        part, attribute = self._places[name]
        return getattr(part, attribute)


def _tensors(part: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for table in (part._parameters, part._buffers, vars(part)):
        for name, value in table.items():
            if isinstance(value, torch.Tensor):
                yield name, value


def sliced_axis(table: torch.Tensor, index: Any, tokens: int) -> int | None:
    """The axis along which `table[index]` takes its first `tokens` entries.

    None if it is any other index.
    """
    parts = index if isinstance(index, tuple) else (index,)
    axis = None
    for place, part in enumerate(parts):
        if part is Ellipsis or not isinstance(part, slice):
            return None
        if part == slice(None):
            continue
        first = part.start in (None, 0) and part.step in (None, 1)
        if not first or part.stop != tokens or axis is not None:
            return None
        axis = place
    return axis
