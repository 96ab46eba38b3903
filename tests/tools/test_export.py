# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The exported series, taken by a real `git am`."""

import subprocess
from pathlib import Path

import pytest

from tools import BuildError, export, patches, upstream
from tools.compose import compose

from .conftest import VERSION


def git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@localhost"]
    result = subprocess.run(
        ["git", *identity, *command], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def am(tree: Path, mails: list[Path]) -> None:
    """Commit a plain tree and take the mails on top of it."""
    git(tree, "init", "--quiet")
    git(tree, "add", "--all", "--force")
    git(tree, "commit", "--quiet", "-m", "upstream")
    git(tree, "am", *map(str, mails))


@pytest.mark.parametrize("given", [True, False])
def test_git_am_takes_the_series(repository, tmp_path, given):
    repository.write("tests/test_callables.py", "def test():\n    assert True\n")
    repository.write("tests/tools/test_tools.py", "")
    repository.write("tests/conftest.py", "")
    tree = repository.tree(tmp_path / "tree")
    mails = export.export(tmp_path / "out", tree if given else None)
    assert len(mails) == 3
    am(tree, mails)
    reference = patches.lay(repository.tree(tmp_path / "laid"), VERSION)
    for name in reference:
        laid = tmp_path / "laid" / name
        assert (tree / name).read_bytes() == laid.read_bytes()
    assert (tree / "tests/test_callables.py").exists()
    assert not (tree / "tests/tools").exists()
    assert not (tree / "tests/conftest.py").exists()
    assert git(tree, "log", "--format=%s").splitlines() == [
        "engine: count higher",
        "registry: register callables",
        "Add the modules behind generic models",
        "upstream",
    ]
    body = git(tree, "log", "-1", "--format=%b")
    assert "It counts.\n\nWhy: A reason, on two lines.\nUpstream: a reference" in body
    assert "Drop-when" not in body


def test_a_folder_in_use_is_refused(repository, tmp_path):
    with pytest.raises(BuildError, match="is not empty: name an empty or a new folder"):
        export.export(tmp_path)


def test_a_patched_tree_is_refused(repository, tmp_path):
    tree = repository.tree(tmp_path / "tree")
    patches.lay(tree, VERSION)
    with pytest.raises(BuildError, match="already has vllm/callables.py: name a plain"):
        export.export(tmp_path / "out", tree)
    assert not (tmp_path / "out").exists()


@pytest.mark.build
def test_git_am_takes_the_real_series(tmp_path):
    release = upstream.release()
    tree = compose(tmp_path / "tree", release, "cpu", source=True, patched=False)
    mails = export.export(tmp_path / "out")
    assert len(mails) == 1 + len(patches.series(release.upstream))
    am(tree, mails)
    laid = compose(tmp_path / "laid", release, "cpu", source=True)
    changed = {n for patch in patches.series(release.upstream) for n in patch.files}
    for name in [*changed, *patches.new_modules()]:
        assert (tree / name).read_bytes() == (laid / name).read_bytes(), name
