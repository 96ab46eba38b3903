# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The documentation says what the code does, and says all of it."""

import ast
import importlib
import json
import re
import tomllib
from pathlib import Path

import pytest
from doc_blocks import DOCS, FENCE, ROOT
from test_earlier_paths import PUBLIC

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted(DOCS.rglob("*.md"))
MODULES = sorted((ROOT / "vllm").rglob("*.py"))


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return [
        code for lang, _, code in FENCE.findall(page.read_text()) if lang == language
    ]


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def slug(heading: str) -> str:
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


# ---- The reference ---------------------------------------------------------------


def defined(tree: ast.Module) -> dict[str, ast.AST]:
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return {node.name: node for node in tree.body if isinstance(node, kinds)}


def public(tree: ast.Module) -> dict[str, ast.AST]:
    """The classes and functions that a module offers; `__all__` decides if it is."""
    offered = {name: n for name, n in defined(tree).items() if not name.startswith("_")}
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            offered = {
                name: offered.get(name) or imported(tree, name) for name in names
            }
    return offered


def imported(tree: ast.Module, name: str) -> ast.AST:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and name in {a.name for a in node.names}:
            source = ROOT / f"{str(node.module).replace('.', '/')}.py"
            return defined(ast.parse(source.read_text()))[name]
    raise AssertionError(f"__all__ has {name}, which is not there")


def interface(node: ast.AST, where: str = "") -> list[str]:
    """What a caller sees of a class or function, one line for each part."""
    if isinstance(node, ast.ClassDef):
        lines = [f"class {node.name}"]
        for part in node.body:
            lines += interface(part, f"{node.name}.")
        return lines
    if isinstance(node, ast.AnnAssign):
        name = ast.unparse(node.target)
        value = f" = {ast.unparse(node.value)}" if node.value else ""
        return (
            []
            if name.startswith("_")
            else [f"{where}{name}: {ast.unparse(node.annotation)}{value}"]
        )
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        if node.name.startswith("_") and node.name != "__init__":
            return []
        decorators = "".join(
            f"@{name} "
            for name in map(ast.unparse, node.decorator_list)
            if name in ("property", "classmethod", "staticmethod", "contextmanager")
        )
        returns = ast.unparse(node.returns) if node.returns else ""
        return [
            f"{decorators}{where}{node.name}({ast.unparse(node.args)}) -> {returns}"
        ]
    return []


ERRORS = DOCS / "models/errors.md"
SECTIONS = {
    section.partition("`")[0]: section
    for section in re.split(
        r"^## `(?=vllm\.)", (DOCS / "reference.md").read_text(), flags=re.M
    )[1:]
}


@pytest.mark.parametrize("module", SECTIONS)
def test_the_reference_has_the_signatures_of_the_code(module):
    path = ROOT / f"{module.replace('.', '/')}.py"
    if not path.exists():
        path = path.with_suffix("") / "__init__.py"
    code = public(ast.parse(path.read_text()))
    stubs = defined(ast.parse(FENCE.search(SECTIONS[module])[3]))
    for name in sorted(code.keys() | stubs.keys()):
        wanted = interface(code[name]) if name in code else []
        documented = interface(stubs[name]) if name in stubs else []
        assert documented == wanted, (
            f"Edit {name} in the section `{module}` of docs/reference.md. The code:\n"
            + "\n".join(wanted)
        )


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_every_module_is_in_the_design(path):
    if path.with_name("__init__.py") in MODULES:  # a package is listed as one
        path = path.parent
    assert f"| `{dotted(path)}` |" in (DOCS / "design.md").read_text(), (
        f"Add `{dotted(path)}` to the table of modules in docs/design.md, and give it "
        "a section in docs/reference.md if users import it."
    )


def test_every_patch_is_in_the_design():
    listed = re.findall(
        r"^\| `(\d{4}-[\w-]+)` \|", (DOCS / "design.md").read_text(), re.M
    )
    series = tomllib.loads((ROOT / "patches/series.toml").read_text())
    tables = (series["generic-models"], series["robustness"])
    names = [entry["patch"] for table in tables for entry in table if "patch" in entry]
    assert listed == names, (
        "Edit the tables of patches in docs/design.md: they have to list "
        "patches/series.toml, in that order."
    )


def test_every_earlier_path_is_in_the_design():
    _, _, after = (DOCS / "design.md").read_text().partition("## Forwarded paths")
    table, _, _ = after.partition("\n## ")
    assert set(re.findall(r"^\| `(vllm[\w.]+)` \|", table, re.M)) == PUBLIC.keys()


@pytest.mark.parametrize("picture", sorted((DOCS / "assets").glob("flow_*.svg")))
def test_the_pictures_of_the_design_name_what_the_code_has(picture):
    code = re.findall(r'class="code"[^>]*>([^<]+)<', picture.read_text())
    names = set(re.findall(r"[A-Za-z_]\w{3,}", " ".join(code))) - {"with", "cu_seqlens"}
    kinds = ast.ClassDef | ast.FunctionDef
    trees = [ast.walk(ast.parse(path.read_text())) for path in MODULES]
    there = {node.name for nodes in trees for node in nodes if isinstance(node, kinds)}
    assert names and names <= there, (
        f"Edit {page_id(picture)}: our modules define no {sorted(names - there)}."
    )


def strings(path: Path) -> set[str]:
    """The texts in the code of a file, with `…` for what is filled in.

    Comments and docstrings are none.
    """
    tree = ast.parse(path.read_text())
    statements = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [
                str(part.value) if isinstance(part, ast.Constant) else "…"
                for part in node.values
            ]
            found.add("".join(parts))
        elif isinstance(node, ast.Constant) and id(node) not in statements:
            found.add(str(node.value))
    return found


def test_every_error_in_the_docs_is_one_that_the_code_raises():
    """`…` in a message stands for one value, where the code has one."""
    table, _, _ = ERRORS.read_text().partition("These messages come from vLLM itself")
    quoted = re.findall(r"^\| `([^`]+)` \|", table, re.M)
    assert quoted
    texts = set().union(*map(strings, MODULES))
    for message in quoted:
        # Two values side by side are shown as one.
        assert any(message in re.sub("…[…']*…", "…", text) for text in texts), (
            f"No code raises {message!r} any more: edit the table of errors in "
            f"{page_id(ERRORS)}."
        )


# ---- Versions and examples ---------------------------------------------------------


def test_the_releases_are_those_of_upstream_toml():
    upstream = tomllib.loads((ROOT / "upstream.toml").read_text())
    default, releases = upstream["default"], list(upstream["release"])
    columns = [f"{r} (default)" if r == default else r for r in releases]
    assert f"| vLLM | {' | '.join(columns)} |" in (ROOT / "README.md").read_text(), (
        "Edit the table `What is supported` in README.md: upstream.toml has "
        f"{', '.join(columns)}."
    )
    version = f"## [{default}+generic.{upstream['generic']}]"
    assert version in (ROOT / "CHANGELOG.md").read_text(), (
        f"Add a section {version} to CHANGELOG.md."
    )


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    found = {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
    return found | {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.py")), ids=page_id)
def test_every_example_is_run_by_a_test_and_in_the_docs(path):
    tests = sorted((ROOT / "tests/examples").rglob("*.py"))
    if 'if __name__ == "__main__"' not in path.read_text():
        programs = [*tests, *(ROOT / "examples").rglob("*.py")]
        configs = (ROOT / "examples").rglob("config.json")
        assert any(path.stem in imports(p) for p in programs if p != path) or any(
            f"{path.stem}." in config.read_text() for config in configs
        ), f"Nothing imports {page_id(path)}."
        return
    named = [text for test in tests for text in strings(test)]
    assert any(text.endswith(path.name) for text in named), (
        f"Add a test to tests/examples/ that runs {page_id(path)}."
    )
    assert any(page_id(path) in page.read_text() for page in PAGES), (
        f"Name {page_id(path)} in docs/index.md."
    )


# ---- Code blocks and links ---------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_code_blocks_are_well_formed(page):
    where = f"Edit the code block in {page_id(page)}: "
    for code in blocks(page, "python"):
        try:
            tree = ast.parse(code)
        except SyntaxError as error:
            pytest.fail(f"{where}{error.msg} in {error.text!r}.")
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom):
                continue
            if str(node.module).split(".")[0] not in ("vllm", "torch"):
                continue
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), (
                    f"{where}{node.module} has no {alias.name}."
                )
    for code in blocks(page, "json"):
        json.loads(code)
    for code in blocks(page, "toml"):
        tomllib.loads(code)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    main = (ROOT / "tools/__main__.py").read_text()
    commands = set(re.findall(r'command\(\s*"([\w-]+)"', main))
    text = page.read_text()
    for target in re.findall(r"(?:`|\$ )make ([\w-]+)", text):
        assert target in targets, f"Edit {page_id(page)}: no `make {target}`."
    for command in re.findall(r"python -m tools ([a-z][\w-]*)", text):
        assert command in commands, f"Edit {page_id(page)}: no `tools {command}`."


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_resolve(page):
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"Edit {page_id(page)}: {target} does not exist."
        if anchor:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", file.read_text()), re.M)
            assert anchor in map(slug, headings), (
                f"Edit {page_id(page)}: {page_id(file)} has no heading for #{anchor}."
            )


def test_hooks_fetch_nothing():
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    repos = re.findall(r"^ *- repo: (\S+)", config, re.M)
    assert repos == ["local"], "Edit .pre-commit-config.yaml: local hooks only."
