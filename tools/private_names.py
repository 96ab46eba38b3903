# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Private names of other projects that our modules use are listed in tools/names.toml.

A private name begins with one underscore. All is read from the syntax.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tools import ROOT, BuildError, names, series
from tools.imports import absolute, dotted

# Public, though they look private.
PUBLIC = {"_asdict", "_exit", "_fields", "_make", "_replace", "_current_frames", "_"}


def check_listed() -> str:
    """Every private name of another project is in tools/names.toml, and no other."""
    listed = {
        name: entry
        for project, entries in names.listing().items()
        if project != "releases"
        for name, entry in entries.items()
    }
    for project, entries in names.listing().items():
        for name, entry in entries.items() if project != "releases" else ():
            wanted = {"in", "why"} | (set() if project == "vllm" else {"seen"})
            if lacking := sorted(wanted - entry.keys()):
                raise BuildError(
                    f"tools/names.toml, {project}, {name}: it lacks "
                    f"{' and '.join(lacking)}."
                )
    uses = private_names()
    unlisted = [
        f"{place}: {name}"
        for name, places in uses.items()
        for place in places[:1]
        if name not in listed
    ]
    unused = [name for name in listed if name not in uses]
    if unlisted:
        raise BuildError(
            "private names of another project are not listed. Use public ones, or add "
            "them to tools/names.toml, with the releases they were seen in:\n"
            + "\n".join(unlisted)
        )
    if unused:
        raise BuildError(
            f"tools/names.toml lists {', '.join(unused)}, which no module uses any "
            "more: take the lines out."
        )
    return f"{len(listed)} names"


def private_names() -> dict[str, list[str]]:
    """Private names that our modules use and do not define, to their places."""
    files = {
        name: ast.parse((ROOT / name).read_text())
        for name in [*series.new_modules(), *series.own_package()]
        if name.endswith(".py")
    }
    own = {Path(name).stem for name in files} | {
        word for tree in files.values() for word in _defined(tree)
    }
    uses: dict[str, list[str]] = {}
    for name, tree in files.items():
        for node, word in _private_words(tree, name):
            if word not in own:
                uses.setdefault(word, []).append(f"{name}:{node}")
    return dict(sorted(uses.items()))


def _is_private(word: str) -> bool:
    return bool(re.fullmatch(r"_[A-Za-z]\w*", word)) and word not in PUBLIC


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("self", "cls", "ctx")
        ):
            yield node.attr
        elif (  # vars(object)["_name"] = …
            isinstance(node, ast.Subscript)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.slice, ast.Constant)
        ):
            yield str(node.slice.value)


def _private_words(tree: ast.Module, name: str) -> Iterator[tuple[int, str]]:
    """The private names in a file, with their lines."""
    modules = [*series.new_modules(), *series.own_package()]
    ours = {dotted(module) for module in modules}
    # the pieces of f-strings are no names
    formatted = (node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr))
    pieces = {id(piece) for node in formatted for piece in node.values}
    for node in ast.walk(tree):
        words: list[str] = []
        if isinstance(node, ast.Attribute):
            words = [node.attr]
        elif isinstance(node, ast.Import):
            words = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, name)
            if base not in ours:
                words = [*base.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = [] if id(node) in pieces else [node.value]
        for word in words:
            if _is_private(word):
                yield getattr(node, "lineno", 1), word
