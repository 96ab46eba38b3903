# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A hash into which objects are written: the base of every digest of a module.

Two objects are written as the same bytes only if they have the same contents, in every
process: an address, or the order of a set, is never written.
"""

from __future__ import annotations

import functools
import hashlib
import types
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Immutable values that `repr` describes completely.
ATOMS = (type(None), bool, int, float, complex, str, bytes, type(...), range)
DESCRIPTORS = (
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.WrapperDescriptorType,
)
# Kinds of code. Code is read even where data is written by its type alone.
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


class UndeterminedError(Exception):
    """An object's contents cannot be read, so no digest can stand for the module."""


class DigestWriter(ABC):
    """Writes objects into a hash. A repeated object is written as its number.

    Cyclic structures therefore end, two of them are equal only if they have the same
    shape, and a class or function that thousands of submodules share is read once.
    Subclasses say in `write` how each kind of object is written.

    Args:
        open_sets: The ids of the sets whose members are being written.

    """

    def __init__(self, open_sets: frozenset[int] = frozenset()) -> None:
        self._hash = hashlib.sha256()
        self._numbers: dict[tuple[int, bool], int] = {}
        # Keeps what was numbered alive, because a freed object's id is used again.
        self._kept: list[Any] = []
        self._path: list[str] = []
        self._open_sets = open_sets
        self._lenient = False  # whether data is written by its type alone

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    @property
    def place(self) -> str:
        """Where in the module the object is that is being written."""
        return ".".join(self._path) or "the module"

    @contextmanager
    def leniently(self, lenient: bool) -> Iterator[None]:
        """Within the block, write data by its type alone if `lenient`.

        That is enough inside an installed package, which always makes its data in the
        same way.
        """
        before, self._lenient = self._lenient, lenient
        yield
        self._lenient = before

    def tag(self, *words: object) -> None:
        """Write `words`, as bytes that no other sequence of words has."""
        self._hash.update(repr(words).encode(errors="surrogatepass"))

    def unknown(self, value: Any, why: str) -> None:
        """Raise `UndeterminedError` for `value`, which is where `place` says."""
        raise UndeterminedError(f"{self.place}: a {name_of(type(value))} {why}")

    @abstractmethod
    def write(self, value: Any) -> None:
        """Write any object.

        Raises:
            UndeterminedError: Its contents cannot be read.

        """

    def write_at(self, place: str, value: Any) -> None:
        """Write `value`; `place` is its name in errors."""
        self._path.append(place)
        self.write(value)
        self._path.pop()

    def _is_new(self, value: Any) -> bool:
        """Give an object a number and return True, or write the number that it has."""
        key = id(value), self._lenient
        number = self._numbers.setdefault(key, len(self._kept))
        if number < len(self._kept):
            self.tag("again", number)
            return False
        self._kept.append(value)
        return True

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

    def _mapping_of_names(self, values: Mapping[str, Any]) -> None:
        self._mapping(values, sorted(values))

    def _set(self, values: set[Any] | frozenset[Any]) -> None:
        """Write the sorted digests of the members, because a set has no order."""
        if id(values) in self._open_sets:
            return self.unknown(values, "that contains itself")
        digests = []
        for value in values:
            if type(value).__hash__ is object.__hash__ and not isinstance(value, CODE):
                return self.unknown(
                    values, f"of a {name_of(type(value))}, told by identity"
                )
            writer = type(self)(self._open_sets | {id(values)})
            writer._path, writer._lenient = self._path, self._lenient
            writer.write(value)
            digests.append(writer.hexdigest())
        self.tag("set", *sorted(digests), "end")


def name_of(kind: Any) -> str:
    """The full name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"
