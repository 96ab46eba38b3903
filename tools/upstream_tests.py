# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`python -m tools upstream-tests`: a patched vLLM still passes vLLM's own tests.

The tests that upstream.toml lists run on two composed trees, without and with the
patch set. A test may fail in both, for want of an optional package or a GPU; no test
may change its outcome.
"""

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools import ROOT, BuildError
from tools.compose import compose
from tools.upstream import release, upstream_tests

FOLDER = ROOT / "build" / "upstream-tests"
NOT_PASSED = ("error", "failure", "skipped")


def main() -> int:
    """Print the outcomes before and after; 1 if a test's outcome differs."""
    suite = _suite()
    trees = [
        compose(FOLDER / name, release(), "cpu", patched=name == "after")
        for name in ("before", "after")
    ]
    with ThreadPoolExecutor() as pool:  # of processes: each run is one
        before, after = pool.map(lambda tree: _run(suite, tree), trees)
    for name, outcomes in (("before", before), ("after", after)):
        counts = sorted(Counter(outcomes.values()).items())
        print(
            f"{name:6} {', '.join(f'{count} {outcome}' for outcome, count in counts)}"
        )
    differing = sorted(t for t in before | after if before.get(t) != after.get(t))
    for test in differing:
        change = f"{before.get(test, 'absent')} -> {after.get(test, 'absent')}"
        print(f"FAIL   {test}: {change}")
    if not differing:
        print(f"ok     {len(before)} of upstream's tests, all with the same outcome")
    return bool(differing)


def _suite() -> Path:
    """A folder with upstream's tests and nothing that shadows the tree under test."""
    suite = compose(FOLDER / "suite", release(), "cpu", source=True, patched=False)
    for path in suite.iterdir():
        if path.name not in ("tests", "pyproject.toml"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    # freeing a GPU's memory after each test takes a second and fails without one
    (suite / "no_cleanup.py").write_text(
        "def pytest_collection_modifyitems(items):\n"
        "    for item in items:\n"
        "        item.add_marker('skip_global_cleanup')\n"
    )
    return suite


def _run(suite: Path, tree: Path) -> dict[str, str]:
    """Each test's outcome with the vLLM of `tree`."""
    report = FOLDER / f"{tree.name}.xml"
    report.unlink(missing_ok=True)
    # the tree's distribution counts, too: by its version vLLM finds the CPU
    paths = [tree, suite / "tests" / "vllm_test_utils"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "VLLM_CACHE_ROOT": str(FOLDER / f"{tree.name}-cache"),
        "HF_HUB_OFFLINE": "1",  # a flaky network would look like a difference
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "no_cleanup", "--junitxml", str(report), *upstream_tests()]
    run = subprocess.run(
        command, cwd=suite, env=environment, capture_output=True, text=True
    )
    if run.returncode not in (0, 1) or not report.exists():
        raise BuildError(
            f"Upstream's tests did not run on the tree {tree.name}: "
            f"{run.stdout[-2000:]}{run.stderr[-2000:]}"
        )
    results = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = sorted(child.tag for child in case if child.tag in NOT_PASSED)
        test = f"{case.get('classname')}::{case.get('name')}"
        results[test] = " and ".join(outcomes) or "passed"
    return results
