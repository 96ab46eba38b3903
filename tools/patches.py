# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Laying the change on a tree of vLLM, and taking it off again.

Needs the standard library and git only, because it also runs on hosts that have
nothing else. A *tree* is any folder that holds the package `vllm/`: a site folder,
an unpacked sdist or wheel, a source checkout.

Diffs are applied in a scratch folder to copies of the files they touch, and the
results are written only when the whole series fits. `git apply` is thus never run
inside the tree, where it would skip files that belong to another repository.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tools import ROOT, BuildError
from tools.series import Patch, new_modules, own_package, series

RECORD = Path("vllm") / ".generic"
"""In an applied tree: what was laid, and the original of each file changed."""


def run_series(
    patches: Iterable[Patch], originals: dict[str, bytes], reverse: bool = False
) -> dict[str, bytes]:
    """Apply the diffs to `originals`, path to content, and return the results.

    Raises:
        BuildError: a diff does not fit exactly; it names the diff, the file and the
            line that was looked for.
    """
    patches = list(patches)
    with tempfile.TemporaryDirectory(prefix="vllm-generic-") as folder:
        scratch = Path(folder).resolve()
        for name, content in originals.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_bytes(content)
        for patch in reversed(patches) if reverse else patches:
            for name in patch.files:
                if name not in originals:
                    raise BuildError(
                        f"{patch.name} does not apply: vLLM has no {name}. Upstream "
                        "moved or removed it; port the patch to where the code is now."
                    )
            _git_apply(patch, scratch, reverse)
        return {name: (scratch / name).read_bytes() for name in originals}


def _git_apply(patch: Patch, scratch: Path, reverse: bool) -> None:
    if (
        not patch.diffs
    ):  # it changes nothing in this release, and git takes no such file
        return
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment |= {
        # a repository around the scratch folder would make git skip its files
        "GIT_CEILING_DIRECTORIES": str(scratch.parent),
        # the user's apply.whitespace and core.autocrlf would bend what is exact
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "LC_ALL": "C",
    }
    command = ["git", "apply", "--verbose", "--whitespace=nowarn", "-p1"]
    try:
        result = subprocess.run(
            [*command, *["--reverse"] * reverse, "-"],
            cwd=scratch,
            env=environment,
            input=patch.diff.encode(),
            capture_output=True,
        )
    except FileNotFoundError:
        raise BuildError(
            "git is not installed, and patches are applied with it: install git."
        ) from None
    if result.returncode == 0:
        return
    errors = result.stderr.decode(errors="replace")
    place = re.search(r"error: patch failed: (.+):(\d+)", errors)
    wanted = re.search(r"error: while searching for:\n(.*?)\nerror:", errors, re.S)
    direction = "reverse" if reverse else "apply"
    if place and wanted:
        present = (scratch / place[1]).read_text().splitlines()
        lines = wanted[1].splitlines()
        # all lines may be there, but no longer together
        anchor = next((line for line in lines if line not in present), lines[0])
        raise BuildError(
            f"{patch.name} does not {direction}: {place[1]} has no such lines around "
            f"line {place[2]} any more, beginning with «{anchor.strip()}». Port that "
            "hunk to this release of vLLM."
        )
    raise BuildError(f"{patch.name} does not {direction}: {errors.strip()}")


def read_originals(tree: Path, patches: Iterable[Patch]) -> dict[str, bytes]:
    """The files of `tree` that the patches change, path to content."""
    names = {name for patch in patches for name in patch.files}
    return {
        name: (tree / name).read_bytes()
        for name in sorted(names)
        if (tree / name).is_file()
    }


def tree_version(tree: Path) -> str | None:
    """The upstream version of a tree, None where it does not tell."""
    for source, pattern in (
        (tree / "PKG-INFO", r"^Version: ([\d.]+\d)"),
        (tree / "vllm" / "_version.py", r"^__version__ = .*'([\d.]+\d)[^']*'$"),
    ):
        if source.is_file() and (
            found := re.search(pattern, source.read_text(), re.MULTILINE)
        ):
            return found[1]
    return None


def lay(tree: Path, version: str | None, link: bool = False) -> list[str]:
    """Add the new modules and our own package to a tree and patch it, unrecorded.

    Args:
        tree: a tree of our own making: it is not restored when this fails.
        version: the tree's upstream version, for patch variants.
        link: symlink the new modules to this checkout instead of copying them.

    Returns:
        The paths written.
    """
    patches = series(version)
    modules = [*new_modules(), *own_package()]
    _check_collisions(tree, modules)
    results = run_series(patches, read_originals(tree, patches))
    for name, content in results.items():
        _write(tree / name, content)
    for name in modules:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        if link:
            (tree / name).symlink_to(ROOT / name)
        else:
            shutil.copyfile(ROOT / name, tree / name)
    return [*results, *modules]


def apply(tree: Path) -> list[str]:
    """Add the new modules and our own package to a tree, and patch it, for `revert`.

    Either the whole change is laid or the tree is as it was.

    Returns:
        The paths written.
    """
    _check_tree(tree)
    record = tree / RECORD
    if record.exists():
        raise BuildError(
            f"This patch set is already applied to {tree}: to bring it up to date, "
            "revert it first."
        )
    patches = series(tree_version(tree))
    modules = [*new_modules(), *own_package()]
    _check_collisions(tree, modules)
    originals = read_originals(tree, patches)
    results = run_series(patches, originals)
    contents = results | {name: (ROOT / name).read_bytes() for name in modules}
    # the record is complete before the first change, so a killed run can be reverted
    staging = Path(tempfile.mkdtemp(dir=tree / "vllm", prefix=".generic-"))
    try:
        for name in originals:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, staging / name)
        record_text = {
            "patched": {
                name: [_digest(originals[name]), _digest(content)]
                for name, content in results.items()
            },
            "modules": {name: _digest(contents[name]) for name in modules},
        }
        (staging / "record.json").write_text(json.dumps(record_text, indent=1))
        staging.rename(record)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    try:
        for name, content in contents.items():
            _write(tree / name, content)
    except BaseException:
        revert(tree)
        raise
    return list(contents)


def revert(tree: Path) -> list[str]:
    """Undo `apply`: every file is again what it was, byte for byte.

    Returns:
        The paths restored or removed.

    Raises:
        BuildError: nothing was applied, or a file was edited since; nothing changes.
    """
    _check_tree(tree)
    record = tree / RECORD
    if not (record / "record.json").exists():
        raise BuildError(f"Nothing to revert: no patch set was applied to {tree}.")
    laid = json.loads((record / "record.json").read_text())
    patched: dict[str, list[str]] = laid["patched"]
    modules: dict[str, str] = laid["modules"]
    # a run that was killed leaves some files as they were before it
    known = patched | {name: [digest] for name, digest in modules.items()}
    edited = [
        name
        for name, digests in known.items()
        if (tree / name).exists() and _digest((tree / name).read_bytes()) not in digests
    ]
    if edited:
        raise BuildError(
            f"{', '.join(edited)} in {tree} was edited after the patch set was "
            "applied: keep your edit elsewhere, put the file back and revert again."
        )
    for name in patched:
        if (record / name).exists():
            (record / name).replace(tree / name)
    for name in modules:
        _remove_module(tree / name, until=tree)
    shutil.rmtree(record)
    return list(known)


def _check_tree(tree: Path) -> None:
    if not (tree / "vllm" / "__init__.py").is_file():
        raise BuildError(
            f"{tree} holds no vLLM: name the folder that contains vllm/__init__.py, "
            "such as a site-packages folder or an unpacked sdist."
        )


def _check_collisions(tree: Path, modules: list[str]) -> None:
    taken = [name for name in modules if (tree / name).exists()]
    if taken:
        raise BuildError(
            f"{tree} already has {', '.join(taken)}: either the tree was built with "
            "this patch set, or upstream has a file of that name and ours must move."
        )


def _remove_module(path: Path, until: Path) -> None:
    """Remove a module with its bytecode and the folders that it leaves empty."""
    path.unlink(missing_ok=True)
    bytecode = path.parent / "__pycache__"
    for compiled in bytecode.glob(f"{path.stem}.*.pyc"):
        compiled.unlink()
    for folder in (bytecode, *path.parents):
        if folder == until:
            break
        with suppress(OSError):  # missing, or still in use by other files
            folder.rmdir()


def _write(path: Path, content: bytes) -> None:
    """Replace a file at once, keeping its mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.generic")
    try:
        partial.write_bytes(content)
        if path.exists():
            shutil.copymode(path, partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
