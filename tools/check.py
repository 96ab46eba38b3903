# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`python -m tools check`: the patch set fits every supported release, and is whole."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import PurePosixPath

from tools import (
    ROOT,
    BuildError,
    diffs,
    imports,
    names,
    patches,
    private_names,
    series,
)
from tools.compose import read_sdist
from tools.imports import dotted
from tools.upstream import release, supported


def main(versions: Iterable[str]) -> int:
    """Print one line for each check and return the number of failures."""
    versions = list(versions)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("every patch is listed and has a header", check_listing),
        ("every new file is in a commit", check_commits),
        ("every new module is reachable", check_reachable),
        ("every private name is listed", private_names.check_listed),
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
    """Every file in patches/ is an entry of the series or an override, and reads."""
    commits = {commit.path: commit for commit in series.commits() if commit.patch}
    folder = ROOT / "patches"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(ROOT)
        if path.suffix == ".patch" and path not in commits:
            raise BuildError(f"{name} is not in patches/series.toml: add its entry.")
        if path.suffix == ".diff":
            patch = path.parents[1] / f"{path.stem}.patch"
            version = path.parent.name
            if patch not in commits or version not in supported():
                raise BuildError(
                    f"{name} overrides nothing: it lies in patches/<series>/<release>/ "
                    "and has the name of the patch, with '.diff' in the place of "
                    "'.patch'."
                )
            commits[patch].read(version)
    for commit in commits.values():
        commit.read()
    return f"{len(commits)} patches"


def check_commits() -> str:
    """Every new module and test is exported, after what it imports."""
    modules, tests = series.new_modules(), series.new_tests()
    exported: dict[str, str] = {}
    commits = series.commits()
    for commit in commits:
        title = commit.patch or commit.subject
        for pattern in commit.patterns:
            if not series.matching([pattern], [*modules, *tests]):
                raise BuildError(
                    f"patches/series.toml, {title}: {pattern} names no new module and "
                    "no test: correct it, or take it out."
                )
        files = imports.files_of(commit)
        exported |= dict.fromkeys(files, title)
        if commit.series == series.INDEPENDENT:
            continue
        known = {dotted(name) for name in exported}
        for name in files:
            if name in modules and name.endswith(".py"):
                wanted = imports.imports(name, at_start=True)
                later = wanted & {dotted(module) for module in modules} - known
                if later:
                    raise BuildError(
                        f"{name} imports {min(later)}, which is in no commit up to "
                        f"«{title}»: change the order in patches/series.toml."
                    )
    stay = set(series.matching(series.staying(), tests))
    lost = [name for name in [*modules, *tests] if name not in {*exported, *stay}]
    if lost:
        raise BuildError(
            f"{lost[0]} is in no commit: add it to the files of one in "
            "patches/series.toml, or, a test that needs both series, to `stay`."
        )
    return f"{len(commits)} commits, {len(exported)} files"


def check_release(version: str) -> str:
    """The patch set applies to the sdist of `version`, reverses and compiles."""
    paths, contents = set(), {}
    for name, content in read_sdist(release(version)):
        paths.add(name)
        if content is not None:
            contents[name] = content
    modules = series.new_modules()
    if taken := sorted(paths & set(series.new_tests())):
        raise BuildError(f"{taken[0]} exists in vLLM {version}: rename our test.")
    folders = {parent for path in paths for parent in PurePosixPath(path).parents}
    for name in modules:
        if name in paths or PurePosixPath(name) in folders:
            raise BuildError(f"{name} exists in vLLM {version}: move ours elsewhere.")
        package = PurePosixPath(name).parent / "__init__.py"
        if str(package) not in paths and str(package) not in modules:
            raise BuildError(f"{name} is in no package: add {package}.")
    every = series.series(version)
    touched = {name for patch in every for name in patch.files}
    originals = {name: contents[name] for name in touched if name in contents}
    patched = patches.run_series(every, originals)
    if patches.run_series(every, patched, reverse=True) != originals:
        raise BuildError(f"The series does not reverse to the files of vLLM {version}.")
    check_places(every, originals, version)
    for commit in series.commits():
        if commit.series == series.INDEPENDENT and commit.patch:
            alone = [other.read(version) for other in series.needed(commit)]
            check_places([*alone, commit.read(version)], originals, version)
    added = [*modules, *series.own_package()]
    laid = patched | {name: (ROOT / name).read_bytes() for name in added}
    for name, content in laid.items():
        if name.endswith(".py"):
            try:
                compile(content, name, "exec", dont_inherit=True)
            except SyntaxError as error:
                raise BuildError(
                    f"{name}, line {error.lineno}: {error.msg}, with vLLM {version}."
                ) from None
    resolved = names.check_names(contents | laid, version)
    return (
        f"{len(every)} patches, {len(touched)} files, {len(modules)} new modules, "
        f"{resolved} names"
    )


def check_places(
    patches: Iterable[series.Patch], originals: dict[str, bytes], version: str
) -> None:
    """Each hunk fits in one place of its file only, wherever upstream moves it."""
    files = {name: diffs.lines_of(content) for name, content in originals.items()}
    for patch in patches:
        for file in patch.diffs:
            content = files[file.path]
            for hunk in file.hunks:
                places = hunk.places(content)
                if not places:
                    raise BuildError(
                        f"{patch.name} does not apply on its own to {file.path}, line "
                        f"{hunk.start}, of vLLM {version}: choose context that no "
                        "other patch adds, or name that patch in `needs` of "
                        "patches/series.toml."
                    )
                if len(places) > 1:
                    lines = ", ".join(str(place + 1) for place in places)
                    raise BuildError(
                        f"{patch.name}: the hunk at line {hunk.start} of {file.path} "
                        f"fits at the lines {lines} of vLLM {version}: give it more "
                        "context."
                    )
            files[file.path] = file.apply(content)


def check_reachable() -> str:
    """Every new module is hooked by a patch, documented, or imported by one that is."""
    files = {dotted(name): name for name in series.new_modules()}
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    lines = [line for patch in series.series() for line in patch.added]
    prose = "\n".join(page.read_text() for page in pages if page.exists())
    roots = imports.hooked(lines, files) | imports.documented(prose, files)
    roots |= {module for module, name in files.items() if not name.endswith(".py")}
    reached = imports.closure(roots)
    lost = [name for module, name in files.items() if module not in reached]
    if lost:
        raise BuildError(
            f"{lost[0]} is reachable from nothing: import it in a module that is, hook "
            f"it in a patch, or document {dotted(lost[0])} in docs/ as a module that "
            "users import."
        )
    return f"{len(files)} new modules"


def check_spdx() -> str:
    """Every Python file of ours begins with vLLM's two SPDX lines."""
    lines = (
        "# SPDX-License-Identifier: Apache-2.0\n"
        "# SPDX-FileCopyrightText: Copyright contributors to the vLLM project\n"
    )
    folders = ("vllm", "vllm_generic", "tools", "tests", "examples", "benchmarks")
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
