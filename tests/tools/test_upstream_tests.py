# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What does not pass with the patch set runs without it as well."""

import pytest

from tools import upstream_tests
from tools.upstream_tests import Results

PASSES, FAILS = "tests/test_a.py::x", "tests/b/test_c.py::Class::y"
OUTCOMES = {PASSES: "passed", FAILS: "failure"}


@pytest.fixture
def runs(repository, monkeypatch):
    """Stands in for the runs: tree to outcomes, and what was asked for."""
    outcomes = {"before": OUTCOMES, "after": OUTCOMES}
    asked = []

    def run(suite, tree, only=None):
        asked.append((tree, only))
        found = {t: o for t, o in outcomes[tree].items() if only is None or t in only}
        return Results(found, dict.fromkeys(found, 1.0))

    monkeypatch.setattr(upstream_tests, "_run", run)
    monkeypatch.setattr(upstream_tests, "_suite", lambda: None)
    monkeypatch.setattr(upstream_tests, "_tree", lambda name: name)
    return outcomes, asked


def test_only_what_does_not_pass_runs_without_the_patch_set(runs, capsys):
    outcomes, asked = runs
    assert upstream_tests.main() == 0
    assert asked == [("after", None), ("before", [FAILS])]
    printed = capsys.readouterr().out
    assert "1 failure, 1 passed, in 2 s of tests" in printed
    assert "ok     2 of upstream's tests" in printed
    asked.clear()
    outcomes["after"] = {PASSES: "passed"}
    assert upstream_tests.main() == 0
    assert asked == [("after", None)]


@pytest.mark.parametrize(
    ("before", "change"),
    [(OUTCOMES, "passed -> error"), ({FAILS: "failure"}, "absent -> error")],
)
def test_a_change_is_an_error(runs, capsys, before, change):
    outcomes, _ = runs
    outcomes["before"], outcomes["after"] = before, OUTCOMES | {PASSES: "error"}
    assert upstream_tests.main() == 1
    assert f"FAIL   {PASSES}: {change}" in capsys.readouterr().out


PROGRAM = """
import pytest

@pytest.mark.parametrize("x", ["a b", "c"])
def test_passes(x): pass

class Test:
    def test_fails(self): assert 0

def test_skips(): pytest.skip()

def test_errors(missing): pass
"""


def test_every_outcome_of_every_part_is_found(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(upstream_tests, "FOLDER", tmp_path)
    monkeypatch.setattr(upstream_tests, "upstream_tests", lambda: ["test_it.py"])
    (tmp_path / "test_it.py").write_text(PROGRAM)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = skip_global_cleanup\n")
    (tmp_path / "generic_plugin.py").write_text(upstream_tests.PLUGIN)
    results = upstream_tests._run(tmp_path, tmp_path / "tree")
    assert results.outcomes == {
        "test_it.py::test_passes[a b]": "passed",
        "test_it.py::test_passes[c]": "passed",
        "test_it.py::Test::test_fails": "failure",
        "test_it.py::test_skips": "skipped",
        "test_it.py::test_errors": "error",
    }
    assert results.seconds.keys() == results.outcomes.keys()
    chosen = ["test_it.py::test_skips"]
    again = upstream_tests._run(tmp_path, tmp_path / "tree", chosen)
    assert again.outcomes == {"test_it.py::test_skips": "skipped"}
