# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The exported series, taken by a real `git am`."""

import subprocess
from pathlib import Path

import pytest

import tools
from tools import BuildError, export, imports, patches, series, upstream
from tools.compose import read_sdist

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
    listing = repository.root / "patches/series.toml"
    listing.write_text(
        listing.read_text().replace("callables.py", 'callables.py", "tests/*')
    )
    tree = repository.tree(tmp_path / "tree")
    branches = export.export(tmp_path / "out", tree if given else None)
    assert list(branches) == ["generic-models", "robustness/0101-engine"]
    am(tree, branches["generic-models"])
    reference = patches.lay(repository.tree(tmp_path / "laid"), VERSION)
    for name in reference:
        if name == "vllm_generic/service.py":  # it goes nowhere upstream
            assert not (tree / name).exists()
            continue
        laid = tmp_path / "laid" / name
        ours = (tree / name).read_bytes() == laid.read_bytes()
        assert ours == (name != "vllm/v1/engine.py")
    assert (tree / "tests/test_callables.py").exists()
    assert not (tree / "tests/tools").exists()
    assert not (tree / "tests/conftest.py").exists()
    assert git(tree, "log", "--format=%s").splitlines() == [
        "registry: register callables",
        "Add callables",
        "upstream",
    ]
    body = git(tree, "log", "-1", "--format=%b")
    assert "It registers them.\n\nWhy: A reason.\nUpstream: a reference" in body
    assert "Drop-when" not in body


def test_git_am_takes_each_patch_of_robustness(repository, tmp_path):
    tree = repository.tree(tmp_path / "tree")
    branches = export.export(tmp_path / "out")
    am(tree, branches["robustness/0101-engine"])
    assert (tree / "vllm/v1/engine.py").read_text().startswith("first = 100\n")
    assert not (tree / "vllm/callables.py").exists()
    assert "Why: A reason, on two lines." in git(tree, "log", "-1", "--format=%b")


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
@pytest.mark.parametrize("version", upstream.supported())
def test_git_am_takes_the_real_series(tmp_path, version):
    tree = tmp_path / "tree"
    every = series.series(version)
    touched = {name for patch in every for name in patch.files}
    # the rest of vLLM would only cost time
    for name, content in read_sdist(upstream.release(version)):
        if name in touched:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(content)
    (tree / "PKG-INFO").write_text(f"Version: {version}\n")
    originals = patches.read_originals(tree, every)
    assert originals
    is_default = version == upstream.release().upstream
    branches = export.export(tmp_path / "out", None if is_default else tree)
    git(tree, "init", "--quiet")
    git(tree, "add", "--all", "--force")
    git(tree, "commit", "--quiet", "-m", "upstream")
    git(tree, "tag", "plain")
    for branch, commits in export.branches().items():
        git(tree, "reset", "--quiet", "--hard", "plain")
        git(tree, "am", "--quiet", *map(str, branches[branch]))
        own = [commit.read(version) for commit in commits if commit.patch]
        for name, content in patches.run_series(own, originals).items():
            assert (tree / name).read_bytes() == content, (branch, name)
        for name in {name for commit in commits for name in imports.files_of(commit)}:
            assert (tree / name).read_bytes() == (tools.ROOT / name).read_bytes()
