# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The run without the patch set is kept, and looked at again where it matters."""

import pytest

from tools import upstream_tests
from tools.upstream_tests import Results

FILES = ["tests/test_a.py", "tests/b/test_c.py"]
PASSED = {"tests.test_a::x": "passed", "tests.b.test_c.Class::y": "failure"}


@pytest.fixture
def runs(repository, monkeypatch):
    """Stands in for the runs: tree to outcomes, and what was asked for."""
    outcomes = {"before": PASSED, "after": PASSED}
    asked = []

    def run(suite, tree, files, part=0, parts=1):
        asked.append((tree, tuple(files), part, parts))
        return Results(outcomes[tree], dict.fromkeys(outcomes[tree], 1.0))

    monkeypatch.setattr(upstream_tests, "_run", run)
    monkeypatch.setattr(upstream_tests, "_suite", lambda: None)
    monkeypatch.setattr(upstream_tests, "_tree", lambda name: name)
    monkeypatch.setattr(upstream_tests, "upstream_tests", lambda: FILES)
    return outcomes, asked


def test_the_run_before_is_kept(runs, capsys):
    _, asked = runs
    assert upstream_tests.main() == 0
    assert {run[0] for run in asked} == {"before", "after"}
    asked.clear()
    assert upstream_tests.main() == 0
    assert {run[0] for run in asked} == {"after"}
    assert sorted(run[2:] for run in asked) == [(0, 2), (1, 2)]
    assert "2 of upstream's tests, all with the same outcome" in capsys.readouterr().out


def test_other_tests_are_another_run(runs, monkeypatch):
    _, asked = runs
    upstream_tests.main()
    asked.clear()
    monkeypatch.setattr(upstream_tests, "upstream_tests", lambda: FILES[:1])
    upstream_tests.main()
    assert "before" in {run[0] for run in asked}


def test_a_change_is_an_error(runs, capsys):
    outcomes, _ = runs
    outcomes["after"] = PASSED | {"tests.test_a::x": "failure"}
    assert upstream_tests.main() == 1
    assert "FAIL   tests.test_a::x: passed -> failure" in capsys.readouterr().out


def test_what_was_kept_is_run_again_where_it_differs(runs):
    outcomes, asked = runs
    upstream_tests.main()
    asked.clear()
    outcomes["before"] = outcomes["after"] = {"tests.b.test_c.Class::y": "passed"}
    outcomes["after"] = PASSED | outcomes["after"]
    assert upstream_tests.main() == 0
    assert ("before", ("tests/b/test_c.py",), 0, 1) in asked
