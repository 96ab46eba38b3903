# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`python -m tools export`: the change as commits for a vLLM source tree."""

import os
import subprocess
import tempfile
from pathlib import Path

from tools import ROOT, BuildError, patches
from tools.compose import read_sdist
from tools.upstream import release

MODULES_MESSAGE = """\
Add the modules behind generic models

The new modules and their tests. Nothing imports them yet: each of the following
commits adds one hook to an existing file.
"""


def export(directory: Path, tree: Path | None = None) -> list[Path]:
    """Write the commit series into `directory`, which must be empty or missing.

    Args:
        tree: a plain vLLM source tree; by default the default release's sdist.

    Returns:
        The mails, in the order in which `git am` takes them.
    """
    if directory.exists() and any(directory.iterdir()):
        raise BuildError(f"{directory} is not empty: name an empty or a new folder.")
    series = patches.series(patches.tree_version(tree) if tree else release().upstream)
    added = patches.new_modules() + _tests()
    if tree:
        originals = patches.read_originals(tree, series)
        taken = [name for name in added if (tree / name).exists()]
    else:
        contents = dict(read_sdist(release()))
        touched = {name for patch in series for name in patch.files}
        originals = {n: contents[n] or b"" for n in sorted(touched) if n in contents}
        taken = [name for name in added if name in contents]
    if taken:
        raise BuildError(
            f"The vLLM source tree already has {', '.join(taken)}: name a plain tree, "
            "or rename ours."
        )
    with tempfile.TemporaryDirectory(prefix="vllm-generic-") as folder:
        scratch = Path(folder)
        _git(scratch, "init", "--quiet")
        _commit(scratch, originals, "upstream")
        _git(scratch, "tag", "upstream")
        modules = {name: (ROOT / name).read_bytes() for name in added}
        _commit(scratch, modules, MODULES_MESSAGE)
        for patch in series:
            originals = patches.run_series([patch], originals)
            trailers = [
                f"{key}: {patch.trailers[key]}"
                for key in patches.TRAILERS
                if key != "Drop-when"  # of use only while this is a patch set
            ]
            parts = [patch.subject, patch.message, "\n".join(trailers)]
            _commit(scratch, originals, "\n\n".join(parts))
        directory.mkdir(parents=True, exist_ok=True)
        _git(scratch, "format-patch", "--quiet", "-o", str(directory), "upstream")
    return sorted(directory.glob("*.patch"))


def _tests() -> list[str]:
    """Our tests of the new modules; those of this repository itself stay here."""
    stay = ("tools", "examples", "conftest.py", "test_docs.py")
    return sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("*.py")
        if path.relative_to(ROOT / "tests").parts[0] not in stay
    )


def _commit(repository: Path, contents: dict[str, bytes], message: str) -> None:
    for name, content in contents.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_bytes(content)
    _git(repository, "add", "--all", "--force")
    _git(repository, "commit", "--quiet", "--allow-empty", "-m", message)


def _git(repository: Path, *command: str) -> None:
    """Run git in the scratch repository as the author of this checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    for key, fallback in (
        ("name", "Contributors to the vLLM project"),
        ("email", "vllm@localhost"),
    ):
        configured = subprocess.run(
            ["git", "config", f"user.{key}"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
        for role in ("AUTHOR", "COMMITTER"):
            environment[f"GIT_{role}_{key.upper()}"] = configured or fallback
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
