# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Has a module's own code call stand-ins, without a change of the code or its names.

A function finds what it calls by its names. A submodule whose methods lead to a known
attention function gets a subclass with copies of these methods, in which the function's
name means its stand-in. The module's file, its class and the library stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from vllm.model_executor.models.plans.layers import become

from .stand_ins import stand_in

# Their own code calls these functions by interfaces that are seen otherwise.
_NOT_THE_MODELS = ("torch", "transformers", "vllm")


def rebind(module: nn.Module) -> None:
    """Have the submodules of `module` call stand-ins; each stays the same object."""
    copies = _Copies()
    of_class: dict[type, dict[str, Any]] = {}
    for part in module.modules():
        for name, value in list(vars(part).items()):
            made = stand_in(value)
            if made is not None:
                setattr(part, name, made)
        own = type(part)
        if own not in of_class:
            of_class[own] = copies.members(own)
        if of_class[own]:
            become(part, type("Seen", (nn.Module,), dict(of_class[own])))


class _Copies:
    """Copies of functions in which names mean stand-ins."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[FunctionType, FunctionType]] = {}

    def members(self, own: type) -> dict[str, Any]:
        """What differs in a class, by its name there."""
        changed: dict[str, Any] = {}
        known: set[str] = set()
        for base in own.__mro__:
            if _is_of_a_library(base.__module__):
                continue
            for name, member in vars(base).items():
                if name in known:
                    continue
                known.add(name)
                is_static = isinstance(member, staticmethod)
                function = member.__func__ if is_static else member
                new = self.replaced(function)
                if new is not None:
                    changed[name] = staticmethod(new) if is_static else new
        return changed

    def replaced(self, value: Any) -> Any:
        """What a name with this value means in a copy; None if it stays."""
        made = stand_in(value)
        if made is not None:
            return made
        function = value
        if not isinstance(function, FunctionType):
            return None
        if _is_of_a_library(function.__module__ or ""):
            return None
        copy = self._copied(function)
        return None if copy is function else copy

    def _copied(self, function: FunctionType) -> FunctionType:
        known = self._made.get(id(function))
        if known is not None:
            return known[1]
        self._made[id(function)] = (function, function)  # while it is looked through
        names = {}
        attributes = set(_names(function.__code__))
        for name in attributes & function.__globals__.keys():
            value = function.__globals__[name]
            if isinstance(value, ModuleType):
                new = _with_stand_ins(value, attributes)
            else:
                new = self.replaced(value)
            if new is not None:
                names[name] = new
        cells = [self._cell(cell) for cell in function.__closure__ or ()]
        if not names and all(new is None for new in cells):
            return function
        closure = tuple(
            old if new is None else new
            for old, new in zip(function.__closure__ or (), cells, strict=True)
        )
        copy = FunctionType(
            function.__code__,
            {**function.__globals__, **names},
            function.__name__,
            function.__defaults__,
            closure or None,
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        copy.__dict__.update(vars(function))
        copy.__qualname__ = function.__qualname__
        self._made[id(function)] = (function, copy)
        return copy

    def _cell(self, cell: CellType) -> CellType | None:
        try:
            value = cell.cell_contents
        except ValueError:  # it is empty
            return None
        new = self.replaced(value)
        return None if new is None else CellType(new)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _with_stand_ins(module: ModuleType, names: set[str]) -> ModuleType | None:
    """A copy of `module` in which some of `names` are stand-ins; None if none is."""
    found: dict[str, Callable[..., Any]] = {}
    for name in names & vars(module).keys():
        made = stand_in(vars(module)[name])
        if made is not None:
            found[name] = made
    if not found:
        return None
    copy = ModuleType(module.__name__, module.__doc__)
    vars(copy).update(vars(module) | found)
    return copy


def _is_of_a_library(name: str) -> bool:
    return name.partition(".")[0] in (*_NOT_THE_MODELS, "builtins")
