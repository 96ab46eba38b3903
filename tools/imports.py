# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which of our modules import or hook which, by their syntax alone."""

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import PurePosixPath

from tools import ROOT, series


def dotted(name: str) -> str:
    """The name under which Python imports a file of the tree."""
    path = PurePosixPath(name).with_suffix("")
    parts = path.parts[:-1] if path.name == "__init__" else path.parts
    return ".".join(parts)


def parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def absolute(node: ast.ImportFrom, name: str) -> str:
    """The module that a `from … import` in the file `name` names."""
    base = node.module or ""
    if not node.level:
        return base
    module = dotted(name)
    package = module if name.endswith("__init__.py") else module.rpartition(".")[0]
    kept = package.split(".")
    kept = kept[: len(kept) - node.level + 1]
    return ".".join([*kept, *([base] if base else [])])


@cache
def _tree(text: str) -> ast.Module:
    return ast.parse(text)


def imports(name: str, at_start: bool = False) -> set[str]:
    """The modules, and names in them, that a new module imports.

    Args:
        at_start: only what it imports while it is imported itself.
    """
    found: set[str] = set()
    tree = _tree((ROOT / name).read_text())
    for node in _at_start(tree.body) if at_start else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, name)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def _at_start(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _at_start(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                yield from _at_start(getattr(node, field, ()))


def hooked(lines: Iterable[str], modules: Iterable[str]) -> set[str]:
    """Those of our modules, dotted, that lines which patches add name or import."""
    text = "\n".join(lines)
    return {module for module in modules if _mentions(text, module)}


def documented(prose: str, modules: Iterable[str]) -> set[str]:
    """Those of our modules, dotted, that a page of the docs names in full."""
    return {m for m in modules if re.search(rf"\b{re.escape(m)}\b", prose)}


def _mentions(text: str, module: str) -> bool:
    package, _, name = module.rpartition(".")
    return any(
        re.search(pattern, text)
        for pattern in (
            rf"\b{re.escape(module)}\b",
            rf"\bfrom {re.escape(package)} import .*\b{name}\b",
            rf"\bfrom \.+[\w.]*\b{name} import\b",
            rf"\bfrom \.+[\w.]* import .*\b{name}\b",
        )
    )


def closure(modules: Iterable[str]) -> set[str]:
    """`modules`, dotted, with all of ours that they import and their packages."""
    files = {dotted(name): name for name in series.new_modules()}
    reached = set(modules)
    pending = list(reached)
    while pending:
        module = pending.pop()
        if files[module].endswith(".py"):
            found = imports(files[module]) & files.keys() - reached
            reached |= found
            pending += found
    packages = {parent for module in reached for parent in parents(module)}
    return reached | packages & files.keys()


def files_of(commit: series.Commit) -> list[str]:
    """The new modules and tests that are exported with a commit.

    A commit of generic models has those that its patterns take and none before did. A
    patch of the other series brings the modules that it hooks.
    """
    modules, tests = series.new_modules(), series.new_tests()
    taken = set(series.matching(commit.patterns, [*modules, *tests]))
    if commit.series == series.INDEPENDENT:
        files = {dotted(name): name for name in modules}
        hooks = commit.read().added if commit.patch else []
        taken |= {files[module] for module in closure(hooked(hooks, files))}
    else:
        for other in series.commits():
            if other == commit:
                break
            if other.series == commit.series:
                taken -= set(series.matching(other.patterns, taken))
    return sorted(taken)
