# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The command line: its help, its exit codes and its sentences."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools import __main__ as main

COMMANDS = (
    *("compose", "apply", "revert", "develop", "check", "export"),
    *("refresh", "upstream-tests"),
)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tools", *map(str, arguments)])
    return main.main()


def test_help_lists_every_command():
    result = subprocess.run(
        [sys.executable, "-m", "tools", "--help"],
        cwd=Path(main.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    for command in COMMANDS:
        assert f"\n    {command}" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(monkeypatch, capsys, command):
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, command, "--help")
    assert exit.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 3


def test_apply_and_revert(repository, tmp_path, monkeypatch, capsys):
    tree = repository.tree(tmp_path / "tree")
    assert run(monkeypatch, "apply", tree) == 0
    assert f"Applied to {tree}: 4 files written" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="^error: This patch set is already applied"):
        run(monkeypatch, "apply", tree)
    assert run(monkeypatch, "revert", tree) == 0
    assert f"Reverted in {tree}: 4 files" in capsys.readouterr().out


def test_compose(repository, tmp_path, monkeypatch, capsys):
    tree = tmp_path / "tree"
    assert run(monkeypatch, "compose", tree, "--device", "cpu") == 0
    assert (tree / "vllm/callables.py").exists()
    assert "Composed vLLM 1.2.3+generic.7.cpu in" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="exists: name a folder that does not"):
        run(monkeypatch, "compose", tree, "--device", "cpu")


def test_check_fails_with_an_exit_code(repository, monkeypatch, capsys):
    repository.write("setup.py", "")
    repository.write("vllm/stray.py", "")
    assert run(monkeypatch, "check", "--version", "1.2.3") > 0
    assert "FAIL  every new module is reachable: vllm/stray.py" in (
        capsys.readouterr().out
    )


def test_export(repository, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "export", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "generic-models: 2 commits\nrobustness/0101-engine: 1 commits\n" in out
