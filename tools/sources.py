# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The names that a release of vLLM defines, read from its sources without importing."""

import ast
import builtins
import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from tools.imports import absolute

# What classes of the standard library bring along, by the name of the base.
KNOWN_BASES: dict[str, type] = {
    "Enum": enum.Enum,
    "IntEnum": enum.IntEnum,
    "StrEnum": enum.StrEnum,
    **{name: object for name in ("ABC", "Generic", "Protocol")},
    **{name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)},
}
PLAIN_DECORATORS = ("cache", "lru_cache", "contextmanager", "staticmethod")


@dataclass(frozen=True)
class Module:
    """A module of vLLM, or one of ours."""

    dotted: str


@dataclass(frozen=True)
class Definition:
    """A class or function, and the module that defines it."""

    module: str
    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


Thing = Module | Definition
"""What a name stands for, as far as it can be told."""


class File:
    """A module's syntax, and the names it binds."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.tree = ast.parse(text)

    @cached_property
    def bound(self) -> dict[str, ast.stmt]:
        """What the module binds at its top level, to the last statement that does."""
        names: dict[str, ast.stmt] = {}
        for node in top_level(self.tree.body):
            for name in _bound_by(node):
                names[name] = node
        for part in ast.walk(self.tree):
            if isinstance(part, ast.Global):
                names |= {name: part for name in part.names if name not in names}
        return names

    @cached_property
    def lazy(self) -> set[str]:
        """The names that a module's `__getattr__` may answer to."""
        if "__getattr__" not in self.bound:
            return set()
        keys = {
            key.value
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Dict)
            for key in node.keys
            if isinstance(key, ast.Constant)
        }
        listed = self.bound.get("__all__")
        if isinstance(listed, ast.Assign | ast.AnnAssign) and listed.value is not None:
            elements = ast.walk(listed.value)
            keys |= {e.value for e in elements if isinstance(e, ast.Constant)}
        return {key for key in keys if isinstance(key, str)}

    @cached_property
    def words(self) -> set[str]:
        """Every identifier and short string in the file."""
        found: set[str] = set()
        for node in ast.walk(self.tree):
            for field in ("id", "attr", "name", "arg", "value"):
                word = getattr(node, field, None)
                if isinstance(word, str):
                    found.add(word)
        return found


def top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported, also in branches."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While):
            for field in ("body", "orelse", "finalbody"):
                yield from top_level(getattr(node, field, ()))
            for handler in getattr(node, "handlers", ()):
                yield from top_level(handler.body)


def _bound_by(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        for alias in node.names:
            yield alias.asname or alias.name.partition(".")[0]
    elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.For):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Name):
                    yield part.id


class Sources:
    """The Python files of one release, with ours among them."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self._contents = contents
        self._files: dict[str, File | None] = {}
        self.folders = {name.rpartition("/")[0] for name in contents}

    def file(self, module: str) -> File | None:
        """The module's file; None where there is none."""
        if module not in self._files:
            stem = module.replace(".", "/")
            paths = [f"{stem}.py", f"{stem}/__init__.py"]
            path = next((path for path in paths if path in self._contents), None)
            text = self._contents[path].decode() if path else ""
            self._files[module] = File(path, text) if path else None
        return self._files[module]

    def exists(self, module: str) -> bool:
        return self.file(module) is not None or module.replace(".", "/") in self.folders

    def has(self, module: str, name: str) -> bool:
        """Whether `from module import name` finds something."""
        if self.exists(f"{module}.{name}"):
            return True
        file = self.file(module)
        if file is None:
            return False
        if name in file.bound or name in file.lazy or name in DUNDERS:
            return True
        return any(self.has(star, name) for star in self._stars(file))

    def find(self, module: str, name: str) -> Thing | None:
        """What `name` in `module` stands for; None where that cannot be told."""
        seen: set[tuple[str, str]] = set()
        while (module, name) not in seen:
            seen.add((module, name))
            file = self.file(module)
            node = file.bound.get(name) if file else None
            if file is None or node is None:
                submodule = f"{module}.{name}"
                return Module(submodule) if self.exists(submodule) else None
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                return Definition(module, node)
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.asname == name and self.exists(alias.name):
                        return Module(alias.name)
                return None
            if not isinstance(node, ast.ImportFrom):
                return None
            (alias,) = (a for a in node.names if (a.asname or a.name) == name)
            module, name = absolute(node, file.path), alias.name
            if self.exists(f"{module}.{name}"):
                return Module(f"{module}.{name}")
        return None

    def members(self, kind: Definition) -> tuple[set[str], bool]:
        """The attributes of a class, and whether these are all that it can have."""
        node = kind.node
        names, complete = set(_members_of(node)), isinstance(node, ast.ClassDef)
        for base in getattr(node, "bases", ()):
            if isinstance(base, ast.Subscript):
                base = base.value
            found = (
                self.find(kind.module, base.id) if isinstance(base, ast.Name) else None
            )
            if isinstance(found, Definition) and found.node is not node:
                inherited, whole = self.members(found)
                names |= inherited
                complete &= whole
            elif ast.unparse(base).rpartition(".")[2] in KNOWN_BASES:
                names |= set(dir(KNOWN_BASES[ast.unparse(base).rpartition(".")[2]]))
            else:
                complete = False
        if "__getattr__" in names:
            complete = False
        return names | set(dir(type)), complete

    def keywords(self, called: Definition) -> set[str] | None:
        """The names of arguments that may be passed; None where that is open."""
        node = called.node
        if isinstance(node, ast.ClassDef):
            return None
        plain = all(
            ast.unparse(decorator).partition("(")[0].rpartition(".")[2]
            in PLAIN_DECORATORS
            for decorator in node.decorator_list
        )
        if node.args.kwarg or not plain:
            return None
        return {arg.arg for arg in [*node.args.args, *node.args.kwonlyargs]}

    def _stars(self, file: File) -> Iterator[str]:
        for node in top_level(file.tree.body):
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                yield absolute(node, file.path)


DUNDERS = {"__file__", "__name__", "__path__", "__doc__", "__spec__", "__dict__"}


def _members_of(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield part.name
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            yield part.id
        elif (
            isinstance(part, ast.Attribute)
            and isinstance(part.ctx, ast.Store)
            and isinstance(part.value, ast.Name)
            and part.value.id in ("self", "cls")
        ):
            yield part.attr
