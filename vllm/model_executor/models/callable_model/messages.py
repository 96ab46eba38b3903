# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Names, for error messages, of what users register, return and pass."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import cloudpickle
import torch


def name_of(factory: Any) -> str:
    if isinstance(factory, str):
        return f"callable {factory}"
    name = getattr(factory, "__qualname__", type(factory).__qualname__)
    return f"callable {getattr(factory, '__module__', '?')}.{name}"


def describe(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"a {type(value).__name__}"


def unpicklable_part(value: Any, path: str = "", depth: int = 4) -> str:
    """Names the innermost part of `value` that cloudpickle refuses."""
    for name, part in _parts(value):
        try:
            cloudpickle.dumps(part)
        except Exception:  # noqa: BLE001 - any refusal is what is looked for
            where = f"{path}.{name}" if path else name
            if depth > 0:
                return unpicklable_part(part, where, depth - 1)
            return f"{where} ({describe(part)})"
    return f"{path} ({describe(value)})" if path else describe(value)


def _parts(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, functools.partial):
        yield from {"func": value.func, **value.keywords}.items()
        yield from ((f"args[{i}]", arg) for i, arg in enumerate(value.args))
    elif inspect.ismethod(value):
        yield "self", value.__self__
    elif inspect.isfunction(value):
        variables = inspect.getclosurevars(value)
        yield from {**variables.nonlocals, **variables.globals}.items()
    elif isinstance(value, Mapping):
        yield from ((f"[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        yield from ((f"[{i}]", item) for i, item in enumerate(value))
    elif not isinstance(value, type):
        yield from getattr(value, "__dict__", {}).items()
