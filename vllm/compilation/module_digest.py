# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A digest of all that tracing a module may burn into its graph.

vLLM drops Dynamo's guards and finds compiled code again by its config and by the
traced files. Neither shows which functions, closures and constants a registered
callable has put into its module, so these are digested here, by their contents.
`code_digest` says how far code is followed.

Whatever cannot be determined raises `UndeterminedError`, and then no cache may be used.
"""

from __future__ import annotations

import enum
import functools
import logging
import types
import weakref
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.library import CustomOpDef
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vllm.compilation.code_digest import CodeWriter
from vllm.compilation.code_references import is_installed
from vllm.compilation.digest_writer import (
    ATOMS,
    CODE,
    DESCRIPTORS,
    UndeterminedError,
    name_of,
)

__all__ = ["UndeterminedError", "module_digest"]

# Types whose instances `repr` describes completely.
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
# The bytes of an instance without attributes, and how many more it has for `__dict__`,
# for `__weakref__` and for each slot.
_BARE = type("_", (), {"__slots__": ()}).__basicsize__
_DICT = type("_", (), {"__slots__": ("__dict__",)}).__basicsize__ - _BARE
_WEAKREF = type("_", (), {"__slots__": ("__weakref__",)}).__basicsize__ - _BARE
_POINTER = type("_", (), {"__slots__": ("a",)}).__basicsize__ - _BARE


def module_digest(module: nn.Module) -> str:
    """A SHA-256 of `module`, equal in every process for modules with equal graphs.

    The values of parameters and buffers are left out, because they are inputs of the
    graph; those of other tensors are read.

    Raises:
        UndeterminedError: It depends on an object whose contents cannot be read. The
            message names where that object is.

    """
    writer = _ModuleWriter()
    try:
        writer.write(module)
        for hooks in GLOBAL_HOOKS:
            writer.write_at(hooks, list(getattr(nn_module, hooks).values()))
    except UndeterminedError:
        raise
    except Exception as error:  # raised by an object that is being read
        raise UndeterminedError(f"{writer.place}: {error!r}") from error
    return writer.hexdigest()


class _ModuleWriter(CodeWriter):
    """Writes modules, their tensors, and any other object that a module may hold."""

    def __init__(self, open_sets: frozenset[int] = frozenset()) -> None:
        super().__init__(open_sets)
        self._slots: dict[type, list[str]] = {}

    def write(self, value: Any) -> None:
        kind = type(value)
        if kind in ATOMS:
            self.tag(kind.__name__, repr(value))
        elif isinstance(value, VALUES):
            self.tag(name_of(kind), value)
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
            self.tag("of type", name_of(kind))
        else:
            lenient, self._lenient = (
                self._lenient,
                self._lenient and kind in (dict, list),
            )
            if self._is_new(value):
                self._first_time(value)
            self._lenient = lenient

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
            self.tag(kind.__name__, name_of(value.__objclass__), value.__name__)
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
            # The graph contains its name, the shapes that its fake kernel computes,
            # and, of a `triton_op`, what Inductor traces.
            op = vars(value)
            self._parts("operator", str(value), op["_abstract_fn"])
            self._sequence(op["_torch_dispatch_fns"].values())
        elif kind.__module__.startswith("triton.") and hasattr(value, "cache_key"):
            self._parts("triton", value.cache_key)  # of its source and what that calls
        elif kind.__module__.startswith("vllm.config"):
            self.tag(name_of(kind))  # vLLM's key has it
        else:
            self._object(value)

    def _module(self, module: nn.Module) -> None:
        self.write(type(module))
        # Hooks are numbered throughout the process, so only their order is written.
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
        """Write a parameter or buffer, but not its values, which are inputs."""
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
        """Write any other object: its class, its attributes, and what it contains."""
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
        """Write what an instance of a class written in C gives to `pickle`."""
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
