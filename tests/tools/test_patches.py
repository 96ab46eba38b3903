# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Applying to a tree and reverting: all or nothing, exact, and undone byte for byte."""

import compileall
import errno
import subprocess
import sys
from pathlib import Path

import pytest

from tools import BuildError, patches

from .conftest import (
    ENGINE,
    ENGINE_PATCH_NAME,
    MODULE,
    PATCH,
    REGISTRY_PATCH_NAME,
    UPSTREAM,
    VERSION,
)


def content(tree: Path) -> dict[str, bytes]:
    """Every file of a tree, git's own aside."""
    return {
        path.relative_to(tree).as_posix(): path.read_bytes()
        for path in tree.rglob("*")
        if path.is_file() and ".git" not in path.relative_to(tree).parts
    }


def git(folder: Path, *command: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e@localhost"]
    subprocess.run(
        ["git", *identity, *command], cwd=folder, check=True, capture_output=True
    )


def test_apply_lays_the_change_and_revert_undoes_it(repository, tmp_path):
    tree = repository.tree(tmp_path / "tree")
    (tree / "vllm" / "registry.py").chmod(0o640)
    before = content(tree)
    written = patches.apply(tree)
    assert sorted(written) == [
        "vllm/callables.py",
        "vllm/registry.py",
        "vllm/v1/engine.py",
        "vllm_generic/service.py",
    ]
    assert "wrap(model)" in (tree / "vllm/registry.py").read_text()
    assert (tree / "vllm/v1/engine.py").read_text().startswith("first = 100\n")
    assert (tree / "vllm/callables.py").read_text() == MODULE
    assert (tree / "vllm/registry.py").stat().st_mode & 0o777 == 0o640
    patches.revert(tree)
    assert content(tree) == before
    assert (tree / "vllm/registry.py").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("place", ["", "inner/site-packages"])
def test_a_git_checkout_around_the_tree_changes_nothing(repository, tmp_path, place):
    checkout = tmp_path / "checkout"
    tree = repository.tree(checkout / place)
    git(checkout, "init")
    git(checkout, "add", ".")
    git(checkout, "commit", "-m", "upstream")
    before = content(tree)
    patches.apply(tree)
    assert "wrap(model)" in (tree / "vllm/registry.py").read_text()
    patches.revert(tree)
    assert content(tree) == before


def test_a_scratch_folder_inside_a_git_checkout_changes_nothing(
    repository, tmp_path, monkeypatch
):
    git(tmp_path, "init")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    tree = repository.tree(tmp_path / "tree")
    patches.apply(tree)
    assert "wrap(model)" in (tree / "vllm/registry.py").read_text()


def test_applying_twice_is_refused(repository, tmp_path):
    tree = repository.tree(tmp_path / "tree")
    patches.apply(tree)
    laid = content(tree)
    with pytest.raises(BuildError, match="already applied to .*: .* revert it first"):
        patches.apply(tree)
    assert content(tree) == laid


def test_a_tree_that_was_built_with_the_patch_set_is_refused(repository, tmp_path):
    tree = repository.tree(tmp_path / "tree")
    patches.lay(tree, VERSION)
    laid = content(tree)
    with pytest.raises(BuildError, match="already has vllm/callables.py"):
        patches.apply(tree)
    with pytest.raises(BuildError, match="Nothing to revert"):
        patches.revert(tree)
    assert content(tree) == laid


def test_a_lost_anchor_is_named_and_leaves_the_tree_untouched(repository, tmp_path):
    tree = repository.tree(tmp_path / "tree")
    (tree / "vllm/v1/engine.py").write_text(ENGINE.replace("first", "zeroth"))
    before = content(tree)
    with pytest.raises(BuildError) as raised:
        patches.apply(tree)
    assert f"{ENGINE_PATCH_NAME} does not apply" in str(raised.value)
    assert "vllm/v1/engine.py" in str(raised.value)
    assert "line 1" in str(raised.value)
    assert "«first = 1»" in str(raised.value)
    assert content(tree) == before


def test_a_lost_file_is_named(repository, tmp_path):
    tree = repository.tree(tmp_path / "tree")
    (tree / "vllm/v1/engine.py").unlink()
    with pytest.raises(BuildError, match="vLLM has no vllm/v1/engine.py"):
        patches.apply(tree)


def test_white_space_is_not_ignored(repository, tmp_path, monkeypatch):
    config = repository.write("gitconfig", "[apply]\n\tignoreWhitespace = change\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    tree = repository.tree(tmp_path / "tree")
    registry = UPSTREAM["vllm/registry.py"].replace("    models", "      models")
    (tree / "vllm/registry.py").write_text(registry)
    with pytest.raises(BuildError, match="0001-registry.patch does not apply"):
        patches.apply(tree)


def test_an_offset_is_allowed(repository, tmp_path):
    tree = repository.tree(tmp_path / "tree")
    registry = tree / "vllm/registry.py"
    registry.write_text("# a\n" * 30 + registry.read_text())
    # git takes a hunk at line 1 for the beginning of the file
    repository.write(REGISTRY_PATCH_NAME, PATCH.replace("-1,3 +1,4", "-2,3 +2,4"))
    patches.apply(tree)
    assert "wrap(model)" in registry.read_text()


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_full_disk_leaves_the_tree_as_it_was(
    repository, tmp_path, monkeypatch, failing
):
    tree = repository.tree(tmp_path / "tree")
    before = content(tree)
    write, calls = patches._write, []

    def full(path, data):
        calls.append(path)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(patches, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        patches.apply(tree)
    assert content(tree) == before


def test_a_killed_apply_can_be_reverted(repository, tmp_path):
    tree = repository.tree(tmp_path / "tree")
    before = content(tree)
    kill = (
        "import os, sys, pathlib; from tools import patches, series\n"
        "root, tree = map(pathlib.Path, sys.argv[1:])\n"
        "patches.ROOT = series.ROOT = root\n"
        "write = patches._write\n"
        "def killed(path, data):\n"
        "    if path.name == 'engine.py': os._exit(9)\n"
        "    write(path, data)\n"
        "patches._write = killed\n"
        "patches.apply(tree)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", kill, str(repository.root), str(tree)],
        cwd=Path(patches.__file__).parents[1],
    )
    assert result.returncode == 9
    assert content(tree) != before
    patches.revert(tree)
    assert content(tree) == before


@pytest.mark.parametrize("name", ["vllm/registry.py", "vllm/callables.py"])
def test_revert_refuses_to_lose_an_edit(repository, tmp_path, name):
    tree = repository.tree(tmp_path / "tree")
    patches.apply(tree)
    (tree / name).write_text((tree / name).read_text() + "# mine\n")
    edited = content(tree)
    with pytest.raises(BuildError, match=f"{name} in .* was edited"):
        patches.revert(tree)
    assert content(tree) == edited


def test_revert_does_not_depend_on_the_patches_of_today(repository, tmp_path):
    tree = repository.tree(tmp_path / "tree")
    before = content(tree)
    patches.apply(tree)
    repository.write(REGISTRY_PATCH_NAME, PATCH.replace("wrap", "other"))
    repository.write("vllm/callables.py", "# edited in the repository\n")
    patches.revert(tree)
    assert content(tree) == before


def test_a_new_package_goes_with_its_bytecode(repository, tmp_path):
    repository.write("vllm/extra/__init__.py", "")
    tree = repository.tree(tmp_path / "tree")
    patches.apply(tree)
    compileall.compile_dir(tree, quiet=1)
    assert list((tree / "vllm/extra/__pycache__").iterdir())
    patches.revert(tree)
    assert not (tree / "vllm/extra").exists()


def test_a_folder_without_vllm_is_refused(tmp_path):
    with pytest.raises(BuildError, match="holds no vLLM: name the folder"):
        patches.apply(tmp_path)


def test_git_is_asked_for(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="install git"):
        patches.apply(repository.tree(tmp_path / "tree"))


def test_the_version_of_a_tree(repository, tmp_path):
    tree = repository.tree(tmp_path / "tree")
    assert patches.tree_version(tree) == VERSION
    (tree / "vllm/_version.py").unlink()
    assert patches.tree_version(tree) is None
