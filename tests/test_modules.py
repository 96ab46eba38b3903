# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The modules of both packages: no circle of imports, none too long to read at once."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vllm", "vllm_generic")
FILES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
MOST_LINES = 450


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements that can run, also those inside functions.

    An import that was moved into a function hides a circle and does not open it.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not (
            isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        ):
            yield from imports(child)


def import_graph(root: Path, package: str) -> dict[str, set[str]]:
    """Which modules of a package in `root` each of them imports.

    A package's `__init__` counts where it is named, not where a module of it is.
    """
    paths = {module_name(path, root): path for path in (root / package).rglob("*.py")}
    graph: dict[str, set[str]] = {name: set() for name in paths}
    for name, path in paths.items():
        for node in imports(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                source = node.module or ""
                if node.level:
                    parents = path.relative_to(root).parts[: -node.level]
                    source = ".".join([*parents, *filter(None, [source])])
                inside = [f"{source}.{alias.name}" for alias in node.names]
                targets = [n if n in paths else source for n in inside]
            graph[name].update(target for target in targets if target in paths)
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of imports, its first module also last; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]  # it names the imported module first
    return []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_of_imports(package: str) -> None:
    graph = import_graph(ROOT, package)
    assert len(graph) == sum(path.is_relative_to(ROOT / package) for path in FILES)
    found = circle(graph)
    assert not found, (
        f"A circle of imports: {' -> '.join(found)}. Move what both ends need into a "
        "module below them."
    )


@pytest.mark.parametrize(
    "there, back",
    [
        ("from package import b", "import package.a"),
        ("from package.b import name", "from .a import name"),
        ("try:\n    from . import b\nexcept ImportError:\n    pass", "from . import a"),
        ("if name:\n    import package.b", "class C:\n    from package.a import x"),
        ("from package import b", "def late():\n    from package import a"),
        ("from package import name", "import package.a"),  # by way of __init__
        ("from package.a import name", ""),  # itself
    ],
)
def test_a_circle_is_found(there: str, back: str, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("from package.b import name")
    (package / "a.py").write_text(there)
    (package / "b.py").write_text(back)
    found = circle(import_graph(tmp_path, "package"))
    assert "package.a" in found and found[0] == found[-1]
    graph = import_graph(tmp_path, "package")
    assert all(b in graph[a] for a, b in zip(found, found[1:], strict=False))


def test_an_import_for_types_alone_makes_no_circle(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import b")
    (tmp_path / "b.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a"
    )
    assert import_graph(tmp_path, ".") == {"a": {"b"}, "b": set()}
    assert circle(import_graph(tmp_path, ".")) == []


@pytest.mark.parametrize(
    "path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_no_module_is_too_long(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MOST_LINES, (
        f"{path.relative_to(ROOT)} has {lines} lines, more than {MOST_LINES}. Divide "
        "it by what its parts are for."
    )
