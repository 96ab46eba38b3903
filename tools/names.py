# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The names of vLLM that our modules use exist in each release.

All is read from the syntax; nothing is imported. What is checked of vLLM's names:

- what is imported, and the attributes of imported modules and classes;
- attributes of arguments that are annotated with a class of vLLM;
- keyword arguments of vLLM's functions.

An import under `try`, with a handler of ImportError or AttributeError, may fail.
"""

import ast
import re
import tomllib
from dataclasses import dataclass
from typing import Any

from tools import ROOT, BuildError, series
from tools.imports import absolute
from tools.sources import Definition, Module, Sources, Thing

TOLERANT = ("ImportError", "ModuleNotFoundError", "AttributeError", "Exception")


@dataclass(frozen=True)
class Use:
    """A name of vLLM in one of our modules, which a release lacks."""

    place: str
    """file:line"""
    name: str
    optional: bool


def listing() -> dict[str, dict[str, Any]]:
    """tools/names.toml: project, then name, to where it is and was seen."""
    path = ROOT / "tools" / "names.toml"
    return tomllib.loads(path.read_text()) if path.exists() else {}


def check_names(contents: dict[str, bytes], version: str) -> int:
    """Resolve the names of vLLM that our modules use in a release's sources.

    Args:
        contents: the files of vLLM `version`, patched, with our modules.

    Returns:
        The number of names that were resolved.

    Raises:
        BuildError: names are missing; it gives a line for each.
    """
    sources = Sources(contents)
    ranges: dict[str, dict[str, str]] = listing().get("releases", {})
    count, lost = 0, []
    for name in [*series.new_modules(), *series.own_package()]:
        if name.endswith(".py"):
            file = _Resolver(name, sources)
            file.visit(file.tree)
            count += file.count
            lost += [
                use
                for use in file.lost
                if not use.optional and _in_range(version, ranges.get(use.name))
            ]
    for private, entry in listing().get("vllm", {}).items():
        owners = [entry["in"]] if isinstance(entry["in"], str) else entry["in"]
        files = [sources.file(owner) for owner in owners]
        present = any(file and private in file.words for file in files)
        if _in_range(version, entry) and not present:
            lost.append(Use("tools/names.toml", f"{owners[0]}.{private}", False))
    if lost:
        lines = [f"{use.place}: {use.name} is not in vLLM {version}" for use in lost]
        raise BuildError(
            "names of vLLM are lost. Use what took their place, or say in "
            "tools/names.toml for which releases they are:\n" + "\n".join(lines)
        )
    return count


def _in_range(version: str, entry: dict[str, str] | None) -> bool:
    """Whether a name is expected in a release: from `since` on, and not in `until`."""

    def key(text: str) -> list[int]:
        return [int(part) for part in text.split(".")]

    since, until = (entry or {}).get("since"), (entry or {}).get("until")
    return not (
        (since and key(version) < key(since)) or (until and key(version) >= key(until))
    )


class _Resolver(ast.NodeVisitor):
    """Walks over one of our modules and looks up what it uses of vLLM."""

    def __init__(self, name: str, sources: Sources) -> None:
        self.name = name
        self.sources = sources
        self.tree = ast.parse((ROOT / name).read_text())
        self.lost: list[Use] = []
        self.count = 0
        self._tolerant = 0
        self._scopes: list[dict[str, Thing | None]] = [{}]
        asked = [
            node.args[1].value
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "hasattr"
            and isinstance(node.args[1], ast.Constant)
        ]
        self._asked = set(asked)
        # imports that functions make are seen by name, too: mypy knows their scopes
        for statement in ast.walk(self.tree):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                self._bind(statement)

    def _bind(self, node: ast.Import | ast.ImportFrom) -> None:
        scope = self._scopes[0]
        for alias in node.names:
            if isinstance(node, ast.ImportFrom):
                base = absolute(node, self.name)
                if base.partition(".")[0] == "vllm":
                    thing = self._member(Module(base), alias.name)
                    scope[alias.asname or alias.name] = thing
            elif alias.name.partition(".")[0] == "vllm":
                if alias.asname:
                    scope[alias.asname] = Module(alias.name)
                else:
                    scope["vllm"] = Module("vllm")

    def _member(self, owner: Thing, name: str) -> Thing | None:
        if isinstance(owner, Module):
            return self.sources.find(owner.dotted, name)
        return None

    def _check(self, node: ast.AST, name: str, present: bool) -> None:
        self.count += 1
        if not present:
            place = f"{self.name}:{getattr(node, 'lineno', 1)}"
            self.lost.append(Use(place, name, bool(self._tolerant)))

    # ---- statements

    def visit_Import(self, node: ast.Import) -> None:  # noqa: N802
        for alias in node.names:
            if alias.name.partition(".")[0] == "vllm":
                self._check(node, alias.name, self.sources.exists(alias.name))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:  # noqa: N802
        base = absolute(node, self.name)
        if base.partition(".")[0] == "vllm":
            for alias in node.names:
                present = self.sources.has(base, alias.name)
                self._check(node, f"{base}.{alias.name}", present)

    def visit_Try(self, node: ast.Try) -> None:  # noqa: N802
        caught = " ".join(ast.unparse(h.type) for h in node.handlers if h.type)
        tolerant = _is_tolerant(caught)
        self._tolerant += tolerant
        for part in node.body:
            self.visit(part)
        self._tolerant -= tolerant
        for other in [*node.handlers, *node.orelse, *node.finalbody]:
            self.visit(other)

    def visit_With(self, node: ast.With) -> None:  # noqa: N802
        contexts = " ".join(ast.unparse(item) for item in node.items)
        tolerant = "suppress(" in contexts and _is_tolerant(contexts)
        self._tolerant += tolerant
        self.generic_visit(node)
        self._tolerant -= tolerant

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:  # noqa: N802
        self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:  # noqa: N802
        self._function(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:  # noqa: N802
        self._function(node)

    def _function(
        self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    ) -> None:
        arguments = [
            *node.args.posonlyargs,
            *node.args.args,
            *node.args.kwonlyargs,
            *filter(None, (node.args.vararg, node.args.kwarg)),
        ]
        scope: dict[str, Thing | None] = {arg.arg: None for arg in arguments}
        for arg in arguments:
            if arg not in (node.args.vararg, node.args.kwarg):
                scope[arg.arg] = self._annotated(arg.annotation)
        for part in ast.walk(node):  # what is assigned again has no known type
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                scope[part.id] = None
        self._scopes.append(scope)
        self.generic_visit(node)
        self._scopes.pop()

    def _annotated(self, annotation: ast.expr | None) -> Thing | None:
        """The class of vLLM that an annotation names; a union is none."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        thing = self._thing(annotation) if annotation is not None else None
        return thing if isinstance(thing, Definition) else None

    # ---- expressions

    def visit_Attribute(self, node: ast.Attribute) -> None:  # noqa: N802
        self.generic_visit(node)
        owner = self._thing(node.value)
        stored = not isinstance(node.ctx, ast.Load)
        if owner is None or stored or node.attr in self._asked:
            return
        name = f"{_title(owner)}.{node.attr}"
        if isinstance(owner, Module):
            present = self.sources.has(owner.dotted, node.attr)
            self._check(node, name, present)
        elif isinstance(owner.node, ast.ClassDef):
            members, complete = self.sources.members(owner)
            if complete or node.attr in members:
                self._check(node, name, node.attr in members)

    def visit_Call(self, node: ast.Call) -> None:  # noqa: N802
        self.generic_visit(node)
        called = self._thing(node.func)
        if isinstance(called, Definition):
            allowed = self.sources.keywords(called)
            for keyword in node.keywords if allowed is not None else ():
                if keyword.arg and allowed is not None:
                    name = f"{_title(called)}({keyword.arg}=)"
                    self._check(node, name, keyword.arg in allowed)

    def _thing(self, node: ast.expr | None) -> Thing | None:
        """What an expression stands for, where that can be told."""
        if isinstance(node, ast.Name):
            for scope in reversed(self._scopes):
                if node.id in scope:
                    return scope[node.id]
        elif isinstance(node, ast.Attribute):
            owner = self._thing(node.value)
            if isinstance(owner, Module):
                return self._member(owner, node.attr)
        return None


def _is_tolerant(errors: str) -> bool:
    return any(re.search(rf"\b{kind}\b", errors) for kind in TOLERANT)


def _title(thing: Thing) -> str:
    if isinstance(thing, Module):
        return thing.dotted
    return f"{thing.module}.{thing.node.name}"
