# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`python -m tools check`: the patch set fits every supported release, and is whole."""

import ast
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import PurePosixPath

from tools import ROOT, BuildError, patches
from tools.compose import read_sdist
from tools.upstream import release


def main(versions: Iterable[str]) -> int:
    """Print one line for each check and return the number of failures."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("every patch is listed and has a header", check_listing),
        ("every new module is reachable", check_reachable),
        ("SPDX headers", check_spdx),
    ]
    for version in versions:
        checks.append((f"vLLM {version}", partial(check_release, version)))
    failures = 0
    for title, run in checks:
        try:
            print(f"ok    {title}: {run()}", flush=True)
        except BuildError as error:
            failures += 1
            print(f"FAIL  {title}: {error}", flush=True)
    return failures


def check_listing() -> str:
    """Every file in patches/ is in the series, and every one reads."""
    listed = {patch.path for patch in patches.series()}
    folder = ROOT / "patches"
    for path in sorted(folder.rglob("*.patch")):
        if folder / path.name not in listed:
            raise BuildError(
                f"{path.relative_to(ROOT)} is not in patches/series: add its name."
            )
        patches.read_patch(path)
    return f"{len(listed)} patches"


def check_release(version: str) -> str:
    """The patch set applies to the sdist of `version`, reverses and compiles."""
    paths, contents = set(), {}
    for name, content in read_sdist(release(version)):
        paths.add(name)
        if content is not None:
            contents[name] = content
    modules = patches.new_modules()
    folders = {parent for path in paths for parent in PurePosixPath(path).parents}
    for name in modules:
        if name in paths or PurePosixPath(name) in folders:
            raise BuildError(f"{name} exists in vLLM {version}: move ours elsewhere.")
        package = PurePosixPath(name).parent / "__init__.py"
        if str(package) not in paths and str(package) not in modules:
            raise BuildError(f"{name} is in no package: add {package}.")
    series = patches.series(version)
    touched = {name for patch in series for name in patch.files}
    originals = {name: contents[name] for name in touched if name in contents}
    patched = patches.run_series(series, originals)
    if patches.run_series(series, patched, reverse=True) != originals:
        raise BuildError(f"The series does not reverse to the files of vLLM {version}.")
    laid = patched | {name: (ROOT / name).read_bytes() for name in modules}
    for name, content in laid.items():
        if name.endswith(".py"):
            try:
                compile(content, name, "exec", dont_inherit=True)
            except SyntaxError as error:
                raise BuildError(
                    f"{name}, line {error.lineno}: {error.msg}, with vLLM {version}."
                ) from None
    return f"{len(series)} patches, {len(touched)} files, {len(modules)} new modules"


def check_reachable() -> str:
    """Every new module is hooked by a patch, documented, or imported by one that is."""
    files = {_dotted(name): name for name in patches.new_modules()}
    hooks = "\n".join(line for patch in patches.series() for line in patch.added)
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    prose = "\n".join(page.read_text() for page in pages if page.exists())
    pending = [
        module
        for module, name in files.items()
        if re.search(rf"\b{re.escape(module)}\b", hooks + prose)
        or _mentions(hooks, module)
        or not name.endswith(".py")
    ]
    reached = set(pending)
    while pending:
        module = pending.pop()
        if files[module].endswith(".py"):
            found = _imports(module, files[module]) & files.keys() - reached
            reached |= found
            pending += found
    packages = {parent for module in reached for parent in _parents(module)}
    lost = [name for module, name in files.items() if module not in reached | packages]
    if lost:
        raise BuildError(
            f"{lost[0]} is reachable from nothing: import it in a module that is, hook "
            f"it in a patch, or document {_dotted(lost[0])} in docs/ as a module that "
            "users import."
        )
    return f"{len(files)} new modules"


def check_spdx() -> str:
    """Every Python file of ours begins with vLLM's two SPDX lines."""
    lines = (
        "# SPDX-License-Identifier: Apache-2.0\n"
        "# SPDX-FileCopyrightText: Copyright contributors to the vLLM project\n"
    )
    folders = ("vllm", "tools", "tests", "examples", "benchmarks")
    files = [ROOT / "setup.py"]
    for folder in folders:
        files += sorted((ROOT / folder).rglob("*.py"))
    for path in files:
        text = path.read_text()
        if text.startswith("#!"):
            text = text.partition("\n")[2]
        if text and not text.startswith(lines):
            raise BuildError(
                f"{path.relative_to(ROOT)} must begin with these two lines:\n{lines}"
            )
    return f"{len(files)} files"


def _dotted(name: str) -> str:
    """The name under which Python imports a file of the tree."""
    path = PurePosixPath(name).with_suffix("")
    parts = path.parts[:-1] if path.name == "__init__" else path.parts
    return ".".join(parts)


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _mentions(hooks: str, module: str) -> bool:
    """Whether a hook imports the module by a relative name or from its package."""
    package, _, name = module.rpartition(".")
    return bool(
        re.search(rf"\bfrom {re.escape(package)} import .*\b{name}\b", hooks)
        or re.search(rf"\bfrom \.+[\w.]*\b{name} import\b", hooks)
        or re.search(rf"\bfrom \.+[\w.]* import .*\b{name}\b", hooks)
    )


def _imports(module: str, name: str) -> set[str]:
    """The modules that a new module imports anywhere in its code."""
    found: set[str] = set()
    package = module if name.endswith("__init__.py") else module.rpartition(".")[0]
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                kept = parents[: len(parents) - node.level + 1]
                base = ".".join([*kept, *([base] if base else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found
