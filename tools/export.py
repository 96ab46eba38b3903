# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`python -m tools export`: the change as commits for a vLLM source tree.

    generic-models/            one branch: new modules by feature, and their hooks
    robustness/<patch>/        a branch for each patch, with what it needs

Each folder is taken by `git am --signoff` on a plain tree.
"""

import functools
import os
import subprocess
import tempfile
from pathlib import Path

from tools import ROOT, BuildError, imports, patches, series
from tools.compose import read_sdist
from tools.series import Commit
from tools.upstream import release


def export(directory: Path, tree: Path | None = None) -> dict[str, list[Path]]:
    """Write the branches into `directory`, which must be empty or missing.

    Args:
        tree: a plain vLLM source tree; by default the default release's sdist.

    Returns:
        Branch, which is a folder of `directory`, to its mails, in the order in which
        `git am` takes them.
    """
    if directory.exists() and any(directory.iterdir()):
        raise BuildError(f"{directory} is not empty: name an empty or a new folder.")
    version = patches.tree_version(tree) if tree else release().upstream
    every = series.series(version)
    added = {name for commit in series.commits() for name in imports.files_of(commit)}
    if tree:
        originals = patches.read_originals(tree, every)
        taken = sorted(name for name in added if (tree / name).exists())
    else:
        contents = dict(read_sdist(release()))
        touched = {name for patch in every for name in patch.files}
        originals = {n: contents[n] or b"" for n in sorted(touched) if n in contents}
        taken = sorted(name for name in added if name in contents)
    if taken:
        raise BuildError(
            f"The vLLM source tree already has {', '.join(taken)}: name a plain tree, "
            "or rename ours."
        )
    written = {}
    for branch, commits in branches().items():
        mails = directory / branch
        _write(mails, commits, originals, version)
        written[branch] = sorted(mails.glob("*.patch"))
    return written


def branches() -> dict[str, list[Commit]]:
    """Each branch that is exported, to its commits."""
    found: dict[str, list[Commit]] = {}
    for commit in series.commits():
        if commit.series == series.INDEPENDENT:
            branch = f"{commit.series}/{commit.patch}"
            found[branch] = [*series.needed(commit), commit]
        else:
            found.setdefault(commit.series, []).append(commit)
    return found


def _write(
    mails: Path, commits: list[Commit], originals: dict[str, bytes], version: str | None
) -> None:
    with tempfile.TemporaryDirectory(prefix="vllm-generic-") as folder:
        scratch = Path(folder)
        _git(scratch, "init", "--quiet")
        _commit(scratch, originals, "upstream")
        _git(scratch, "tag", "upstream")
        for commit in commits:
            files = {
                name: (ROOT / name).read_bytes() for name in imports.files_of(commit)
            }
            message = f"{commit.subject}\n\n{commit.message.strip()}"
            if commit.patch:
                patch = commit.read(version)
                originals = patches.run_series([patch], originals)
                files |= originals
                trailers = [
                    f"{key}: {patch.trailers[key]}"
                    for key in series.TRAILERS
                    if key != "Drop-when"  # of use only while this is a patch set
                ]
                parts = [patch.subject, patch.message, "\n".join(trailers)]
                message = "\n\n".join(parts)
            _commit(scratch, files, message)
        mails.mkdir(parents=True)
        _git(scratch, "format-patch", "--quiet", "-o", str(mails), "upstream")


def _commit(repository: Path, contents: dict[str, bytes], message: str) -> None:
    for name, content in contents.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_bytes(content)
    _git(repository, "add", "--all", "--force")
    _git(repository, "commit", "--quiet", "--allow-empty", "-m", message)


@functools.cache
def _identity() -> dict[str, str]:
    """Git's variables for the author of this checkout."""
    variables = {}
    for key, fallback in (
        ("name", "Contributors to the vLLM project"),
        ("email", "vllm@localhost"),
    ):
        configured = subprocess.run(
            ["git", "config", f"user.{key}"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
        for role in ("AUTHOR", "COMMITTER"):
            variables[f"GIT_{role}_{key.upper()}"] = configured or fallback
    return variables


def _git(repository: Path, *command: str) -> None:
    """Run git in the scratch repository as the author of this checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment |= _identity()
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    result = subprocess.run(
        ["git", *command],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise BuildError(f"git {command[0]} failed: {result.stderr.strip()}")
