# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A digest of all that tracing a module may burn into its graph.

vLLM drops Dynamo's guards and finds compiled code again by its config and by the
traced files. Neither shows which functions, closures and constants a registered
callable has put into its module, so that these are digested here: by their contents,
and never by an address or by the order of a set, which change from process to process.

How far code is followed depends on whose it is:

- of Python, NumPy, torch and vLLM: by name, because their versions are fixed;
- of other installed packages: functions, and what these name; data by type only;
- of anybody else: everything.

Whatever cannot be determined raises `UndeterminedError`, and then no cache may be used.
"""

from __future__ import annotations

import builtins
import enum
import functools
import hashlib
import importlib.util
import logging
import sys
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.library import CustomOpDef
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vllm.compilation.code_references import (
    find_by_name,
    is_fixed,
    is_installed,
    names_read,
)

ATOMS = (type(None), bool, int, float, complex, str, bytes, type(...), range)
# What they are as text is all there is to them.
VALUES = (
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
)

DESCRIPTORS = (
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.WrapperDescriptorType,
)
# What is followed also where data is taken by its type.
CODE = (
    type,
    property,
    staticmethod,
    classmethod,
    types.FunctionType,
    types.BuiltinFunctionType,
    functools._lru_cache_wrapper,
    *DESCRIPTORS,
)
# What a class has for introspection only.
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
# Tables of `nn.Module` that forward does not read, and those that it does.
STATE_DICT_HOOKS = ("_state_dict_", "_load_state_dict_")
HOOKS = {
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
}
GLOBAL_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks")
# Bytes of an instance: without anything, and more with `__dict__`, with `__weakref__`.
_BARE = type("_", (), {"__slots__": ()}).__basicsize__
_DICT = type("_", (), {"__slots__": ("__dict__",)}).__basicsize__ - _BARE
_WEAKREF = type("_", (), {"__slots__": ("__weakref__",)}).__basicsize__ - _BARE
_POINTER = type("_", (), {"__slots__": ("a",)}).__basicsize__ - _BARE


class UndeterminedError(Exception):
    """What a module computes cannot be read from it with certainty."""


def module_digest(module: nn.Module) -> str:
    """A SHA-256 of `module`, equal in every process for modules that trace alike.

    The values of parameters and buffers are left out, because they are inputs of the
    graph; those of other tensors are read.

    Raises:
        UndeterminedError: It depends on an object whose contents cannot be read. The
            message names where that object is.

    """
    writer = _Writer()
    try:
        writer.write(module)
        for hooks in GLOBAL_HOOKS:
            writer.write_at(hooks, list(getattr(nn_module, hooks).values()))
    except UndeterminedError:
        raise
    except Exception as error:  # of an object that does not let itself be read
        raise UndeterminedError(f"{writer.place}: {error!r}") from error
    return writer.hexdigest()


class _Writer:
    """Writes objects into a hash. One that comes again is written as its number.

    So cycles end, two cyclic structures are equal only if they have the same shape, and
    a class or function of thousands of submodules is read once.
    """

    def __init__(self, open_sets: frozenset[int] = frozenset()) -> None:
        self._hash = hashlib.sha256()
        self._numbers: dict[tuple[int, bool], int] = {}
        self._kept: list[Any] = []  # whose ids would be reused if they were freed
        self._path: list[str] = []
        self._slots: dict[type, list[str]] = {}
        self._open_sets = open_sets
        self._lenient = False  # inside an installed package

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    @property
    def place(self) -> str:
        return ".".join(self._path) or "the module"

    @contextmanager
    def leniently(self, lenient: bool) -> Iterator[None]:
        """What is data, of a package that always makes it in the same way, by type."""
        before, self._lenient = self._lenient, lenient
        yield
        self._lenient = before

    def tag(self, *words: object) -> None:
        """Write words that no other sequence of words is written as."""
        self._hash.update(repr(words).encode(errors="surrogatepass"))

    def unknown(self, value: Any, why: str) -> None:
        raise UndeterminedError(f"{self.place}: a {_name(type(value))} {why}")

    def write_at(self, place: str, value: Any) -> None:
        """Write `value`, which an error finds at `place`."""
        self._path.append(place)
        self.write(value)
        self._path.pop()

    def write(self, value: Any) -> None:
        kind = type(value)
        if kind in ATOMS:
            self.tag(kind.__name__, repr(value))
        elif isinstance(value, VALUES):
            self.tag(_name(kind), value)
        elif isinstance(value, types.ModuleType):
            self.tag("module", value.__name__)
            if not self._lenient and not is_installed(value.__name__):
                self.unknown(value, f"({value.__name__}), which may be read anywhere")
        elif kind is tuple:
            self._sequence(value)
        elif kind in (set, frozenset):
            self._set(value)
        elif isinstance(value, types.CodeType):
            self._code(value)
        elif isinstance(value, types.CellType):
            self._cell(value)
        elif self._lenient and kind not in (dict, list) and not isinstance(value, CODE):
            self.tag("of type", _name(kind))
        else:
            lenient, self._lenient = (
                self._lenient,
                self._lenient and kind in (dict, list),
            )
            if self._is_new(value):
                self._first_time(value)
            self._lenient = lenient

    def _is_new(self, value: Any) -> bool:
        """Number an object, or write the number that it has."""
        key = id(value), self._lenient
        number = self._numbers.setdefault(key, len(self._kept))
        if number < len(self._kept):
            self.tag("again", number)
            return False
        self._kept.append(value)
        return True

    def _first_time(self, value: Any) -> None:
        kind = type(value)
        if isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, functools._lru_cache_wrapper):
            self._parts("cached", value.__wrapped__)
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, torch.Tensor):
            self._tensor(value, values=not isinstance(value, nn.Parameter))
        elif isinstance(value, types.MethodType):
            self._parts("method", value.__func__, value.__self__)
        elif isinstance(value, types.BuiltinFunctionType):
            owner = value.__self__
            self.tag("builtin", value.__module__, value.__qualname__)
            if owner is not None and not isinstance(owner, types.ModuleType):
                self.write(owner)
        elif isinstance(value, DESCRIPTORS):
            self.tag(kind.__name__, _name(value.__objclass__), value.__name__)
        elif isinstance(value, types.MethodWrapperType):
            self._parts("method-wrapper", value.__name__, value.__self__)
        elif isinstance(value, property):
            self._parts("property", value.fget, value.fset, value.fdel)
        elif isinstance(value, functools.cached_property):
            self._parts("cached_property", value.func, value.attrname)
        elif isinstance(value, staticmethod | classmethod):
            self._parts(kind.__name__, value.__func__)
        elif isinstance(value, enum.Enum):
            self._parts("enum", kind, value.name, value._value_)
        elif isinstance(value, types.UnionType):
            self._parts("union", value.__args__)
        elif isinstance(value, logging.Logger):
            self.tag("logger", value.name)
        elif isinstance(value, weakref.ReferenceType):
            self._parts("weakref", value())
        elif isinstance(value, np.ndarray | np.generic):
            self._array(value)
        elif isinstance(value, np.ufunc):
            self.tag("ufunc", value.__name__, value.signature, value.types)
        elif isinstance(value, torch.Generator):
            self._parts("generator", value.device, value.get_state())
        elif isinstance(value, dist.ProcessGroup):
            self._parts("group", value.size(), value.rank(), value.group_name)
        elif isinstance(value, CustomOpDef):
            # The graph has its name, the shapes that its fake kernel gives, and what
            # Inductor sees of it, if it is a `triton_op`.
            op = vars(value)
            self._parts("operator", str(value), op["_abstract_fn"])
            self._sequence(op["_torch_dispatch_fns"].values())
        elif kind.__module__.startswith("triton.") and hasattr(value, "cache_key"):
            self._parts("triton", value.cache_key)  # of its source and what that calls
        elif kind.__module__.startswith("vllm.config"):
            self.tag(_name(kind))  # vLLM's key has it
        else:
            self._object(value)

    def _parts(self, tag: str, *values: Any) -> None:
        self.tag(tag, len(values))
        for value in values:
            self.write(value)

    def _sequence(self, values: Iterable[Any]) -> None:
        values = list(values)
        self.tag("sequence", len(values))
        for index, value in enumerate(values):
            self.write_at(str(index), value)

    def _mapping(self, values: Mapping[Any, Any], keys: Iterable[Any]) -> None:
        keys = list(keys)
        self.tag("mapping", len(keys))
        for key in keys:
            self.write(key)
            self.write_at(
                str(key) if type(key) in ATOMS else type(key).__name__, values[key]
            )

    def _set(self, values: set[Any] | frozenset[Any]) -> None:
        """By the digests of the members, each read on its own, in their order."""
        if id(values) in self._open_sets:
            return self.unknown(values, "that contains itself")
        digests = []
        for value in values:
            if type(value).__hash__ is object.__hash__ and not isinstance(value, CODE):
                return self.unknown(
                    values, f"of a {_name(type(value))}, told by identity"
                )
            writer = _Writer(self._open_sets | {id(values)})
            writer._path, writer._lenient = self._path, self._lenient
            writer.write(value)
            digests.append(writer.hexdigest())
        self.tag("set", *sorted(digests), "end")

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
        # By its variables, because a decorator takes over the name of what it wraps.
        home = function.__globals__.get("__name__") or ""
        code = function.__code__
        names: tuple[tuple[str, ...], ...] = ()
        # If not, it was made by a call, and differs from its like by its closure.
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
        """What a function reads by a global name and attributes of it."""
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
            if attribute not in vars(value):  # made when it is first asked for
                if not is_installed(value.__name__):
                    self.unknown(value, f"({value.__name__}) without {attribute}")
                return
            value = vars(value)[attribute]
        self.write(value)

    def _class(self, cls: type) -> None:
        self.tag("class", _name(cls), *map(_name, cls.__mro__), "end")
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

    def _mapping_of_names(self, values: Mapping[str, Any]) -> None:
        self._mapping(values, sorted(values))

    def _module(self, module: nn.Module) -> None:
        self.write(type(module))
        # Hooks are numbered through the process; only their order counts.
        hook_ids = sorted({key for name in HOOKS for key in vars(module).get(name, ())})
        for name, value in sorted(vars(module).items()):
            if name.startswith(STATE_DICT_HOOKS):
                continue
            if name in ("_parameters", "_buffers"):
                self.tag(name, *value, "end")
                for key, tensor in value.items():
                    self._path.append(key)
                    self._held(tensor)
                    self._path.pop()
            elif name == "_modules":
                self._mapping(value, value)
            elif name in HOOKS and not value:
                continue
            elif name in HOOKS:
                self.tag(name, *map(hook_ids.index, value), "end")
                self._path.append(name)
                self._sequence(value.values())
                self._path.pop()
            else:
                self.tag(name)
                self.write_at(name, value)

    def _held(self, tensor: torch.Tensor | None) -> None:
        """A parameter or buffer: an input of the graph, so not its values."""
        if tensor is None:
            self.tag("none")
        elif self._is_new(tensor):
            self._tensor(tensor, values=False)

    def _tensor(self, tensor: torch.Tensor, values: bool) -> None:
        self.tag("tensor", tensor.dtype, tensor.device, tensor.requires_grad)
        self.write(type(tensor))
        self._mapping_of_names(vars(tensor))
        if nn.parameter.is_lazy(tensor):
            return
        if is_traceable_wrapper_subclass(tensor):
            names, context = tensor.__tensor_flatten__()
            self.write(context)
            for name in names:
                part = getattr(tensor, name)
                if isinstance(part, torch.Tensor):
                    self._tensor(part, values)
                else:
                    self.write(part)
            return
        if tensor.layout is not torch.strided:
            return self.unknown(tensor, f"of layout {tensor.layout}")
        self.tag(tuple(tensor.shape), tensor.stride())
        if values and not tensor.is_meta:
            contents = tensor.detach().cpu().contiguous().flatten()
            self._hash.update(contents.view(torch.uint8).numpy().data)

    def _array(self, array: np.ndarray | np.generic) -> None:
        self.tag("array", array.dtype, array.shape)
        if array.dtype.hasobject:
            self._sequence(array.ravel())
        else:
            self._hash.update(np.ascontiguousarray(array).tobytes())

    def _object(self, value: Any) -> None:
        """Any other object: its class, its attributes, and what it contains."""
        kind = type(value)
        self.tag("object")
        self.write(kind)
        self._mapping_of_names(getattr(value, "__dict__", {}))
        if kind not in self._slots:
            self._slots[kind] = sorted(_slots(kind))
        slots = self._slots[kind]
        for name in slots:
            self.tag(name, hasattr(value, name))
            self.write_at(name, getattr(value, name, None))
        if isinstance(value, dict | types.MappingProxyType):
            contents = dict(value)
            self._mapping(contents, contents)
            self.write(getattr(value, "default_factory", None))
        elif isinstance(value, list | tuple):
            self._sequence(value)
        elif isinstance(value, set | frozenset):
            self._set(frozenset(value))
        elif isinstance(value, bool | int | float | complex | str | bytes | bytearray):
            base: Any = next(c for c in kind.__mro__ if c in (*ATOMS, bytearray))
            self.tag(base.__name__, base.__repr__(value))
        elif _has_hidden_state(kind, len(slots)):
            self._pickled(value)

    def _pickled(self, value: Any) -> None:
        """What a class written in C tells of its instances."""
        try:
            reduced = value.__reduce_ex__(2)
        except Exception as error:
            return self.unknown(value, f"({error})")
        if isinstance(reduced, str):
            return self.tag("global", reduced)
        # The callable, its arguments, the state; then what a list and a dict contain.
        self._parts("pickled", *reduced[:3])
        for items in reduced[3:5]:
            self._sequence(items or ())


def _name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


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


def _slots(cls: type) -> set[str]:
    """The names of all slots, as their descriptors have them."""
    return {
        name
        for base in cls.__mro__
        for name, value in vars(base).items()
        if isinstance(value, types.MemberDescriptorType) and "__slots__" in vars(base)
    }


def _has_hidden_state(cls: type, slots: int) -> bool:
    """Whether instances have more than attributes, as those of C types do."""
    size = _BARE + slots * _POINTER
    size += _DICT * bool(cls.__dictoffset__) + _WEAKREF * bool(cls.__weakrefoffset__)
    return cls.__basicsize__ > size or bool(cls.__itemsize__)


def _absolute(function: types.FunctionType, name: str) -> str:
    package = function.__globals__.get("__package__") or ""
    return importlib.util.resolve_name(name, package)
