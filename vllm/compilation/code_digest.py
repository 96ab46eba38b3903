# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Writes code into a digest: functions, classes, and what these name.

How far code is followed depends on whose it is:

- of Python, NumPy, torch and vLLM: by name, because their versions are fixed;
- of other installed packages: functions, and what these name; data by type only;
- of anybody else: everything.
"""

from __future__ import annotations

import builtins
import importlib.util
import sys
import types
from typing import Any

import torch

from vllm.compilation.code_references import (
    find_by_name,
    is_fixed,
    is_installed,
    names_read,
)
from vllm.compilation.digest_writer import ATOMS, DigestWriter, name_of

# Members of a class that only introspection reads.
INTROSPECTION = {
    "__annotations__",
    "__dict__",
    "__doc__",
    "__firstlineno__",
    "__module__",
    "__orig_bases__",
    "__parameters__",
    "__qualname__",
    "__static_attributes__",
    "__weakref__",
    "_abc_impl",
}
# Code that names one of these may read any variable.
REFLECTION = {"__import__", "eval", "exec", "globals"}


class CodeWriter(DigestWriter):
    """Writes functions, code objects, their variables, and classes."""

    def _cell(self, cell: types.CellType) -> None:
        try:
            contents = cell.cell_contents
        except ValueError:
            return self.tag("empty cell")
        self._parts("cell", contents)

    def _code(self, code: types.CodeType) -> None:
        self.tag("code", code.co_code.hex(), code.co_flags)
        self.tag(code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
        self.tag(code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        self.tag(getattr(code, "co_exceptiontable", b"").hex())
        self._sequence(code.co_consts)

    def _function(self, function: types.FunctionType) -> None:
        # Its globals say whose it is, because `functools.wraps` changes `__module__`.
        home = function.__globals__.get("__name__") or ""
        code = function.__code__
        names: tuple[tuple[str, ...], ...] = ()
        # A function that is not found by its name was made by a call, and differs by
        # its closure from others that the same call made.
        found = find_by_name(function.__module__, function.__qualname__) is function
        if is_fixed(home):
            if found and is_fixed(function.__module__ or ""):
                return self.tag("function", function.__module__, function.__qualname__)
        else:
            names = names_read(code)
        self.tag("function")
        installed = is_installed(home) and is_installed(function.__module__ or "")
        with self.leniently(found and installed):
            self.write(code)
            self._parts("defaults", function.__defaults__)
            self._mapping_of_names(function.__kwdefaults__ or {})
            cells = function.__closure__ or ()
            for name, cell in zip(code.co_freevars, cells, strict=True):
                self.write_at(f"{function.__name__}().{name}", cell)
        with self.leniently(is_installed(home)):
            self._mapping_of_names(vars(function))
            for chain in names:
                self._path.append(f"{function.__name__}().{'.'.join(chain)}")
                self._named(function, chain)
                self._path.pop()

    def _named(self, function: types.FunctionType, chain: tuple[str, ...]) -> None:
        """Write what a function reads by a global name and attributes of it."""
        first, *attributes = chain
        self.tag("named", first)
        if first.startswith("import "):
            value: Any = sys.modules.get(_absolute(function, first.split()[1]))
            if value is None:
                if not self._lenient and not is_fixed(first.split()[1]):
                    self.unknown(function, f"with an {first} that was not run yet")
                return
        elif first in function.__globals__:
            value = function.__globals__[first]
        else:
            if first in REFLECTION and not self._lenient:
                self.unknown(function, f"that calls {first}() and may read anything")
            return self.write(getattr(builtins, first, "undefined"))
        for attribute in attributes:
            if not isinstance(value, types.ModuleType) or value is torch.ops:
                break
            self.tag(attribute)
            if attribute not in vars(value):  # made by the module's __getattr__
                if not is_installed(value.__name__):
                    self.unknown(value, f"({value.__name__}) without {attribute}")
                return
            value = vars(value)[attribute]
        self.write(value)

    def _class(self, cls: type) -> None:
        self.tag("class", name_of(cls), *map(name_of, cls.__mro__), "end")
        if type(cls) is not type:
            self.write(type(cls))
        for base in cls.__mro__:
            if base is not cls:
                self.write(base)
        found = find_by_name(cls.__module__, cls.__qualname__) is cls
        installed = found and is_installed(cls.__module__)
        fixed = found and is_fixed(cls.__module__)
        members = {k: v for k, v in vars(cls).items() if k not in INTROSPECTION}
        if fixed or (installed and "forward" not in members):
            members = {k: v for k, v in members.items() if _is_foreign(v, cls)}
        with self.leniently(installed):
            self._mapping_of_names(members)


def _is_foreign(member: Any, cls: type) -> bool:
    """Whether a member of an installed class was put there by somebody else."""
    if isinstance(member, staticmethod | classmethod):
        member = member.__func__
    elif isinstance(member, property):
        member = member.fget
    if not isinstance(member, types.FunctionType):
        return type(member) in ATOMS and not is_fixed(cls.__module__)
    return not is_fixed(member.__globals__.get("__name__") or "") and (
        member.__globals__.get("__name__") != cls.__module__
    )


def _absolute(function: types.FunctionType, name: str) -> str:
    """The full name of a module that `function` imports, maybe by a relative name."""
    package = function.__globals__.get("__package__") or ""
    return importlib.util.resolve_name(name, package)
