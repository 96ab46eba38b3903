# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`python -m tools upstream-tests`: a patched vLLM still passes vLLM's own tests.

The tests that upstream.toml lists run on two composed trees, without and with the
patch set. A test may fail in both, for want of an optional package or a GPU; no test
may change its outcome. The run without does not depend on this repository, so its
outcomes are kept in the user's cache folder.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from tools import ROOT, BuildError
from tools.compose import compose
from tools.upstream import cache_dir, release, upstream_tests

FOLDER = ROOT / "build" / "upstream-tests"
NOT_PASSED = ("error", "failure", "skipped")
WORKERS = 2
"""Test processes at once; more would not find memory on a small machine."""
SLOWEST = 5

# Freeing a GPU's memory after each test takes a second and fails without one.
PLUGIN = """
import os

def pytest_collection_modifyitems(items):
    part, parts = map(int, os.environ["GENERIC_TESTS_PART"].split("/"))
    # sorted: some parameters are sets, whose order is another in each process
    names = set(sorted({item.nodeid for item in items})[part::parts])
    items[:] = [item for item in items if item.nodeid in names]
    for item in items:
        item.add_marker("skip_global_cleanup")
"""


@dataclass
class Results:
    """What one run of the tests gave."""

    outcomes: dict[str, str]
    """Test to outcome."""
    seconds: dict[str, float]
    """Test to duration."""

    def __or__(self, other: "Results") -> "Results":
        return Results(self.outcomes | other.outcomes, self.seconds | other.seconds)


def main() -> int:
    """Print the outcomes before and after; 1 if a test's outcome differs."""
    cache = _cache()
    known = _kept(cache)
    suite = _suite()
    with ThreadPoolExecutor(WORKERS) as pool:  # of processes: each run is one
        if known:
            print(f"before: as in {cache}", flush=True)
        else:
            before_run = pool.submit(_run, suite, _tree("before"), upstream_tests())
        after_tree = _tree("after")
        parts = WORKERS if known else 1  # the other worker runs the tests before
        after_runs = [
            pool.submit(_run, suite, after_tree, upstream_tests(), part, parts)
            for part in range(parts)
        ]
        before = known or before_run.result()
        after = Results({}, {})
        for run in after_runs:
            after |= run.result()
    if known and (differing := _differing(before, after)):
        # what was kept may have been a failure by chance
        again = [n for n in upstream_tests() if any(_is_in(t, n) for t in differing)]
        if again:
            before |= _run(suite, _tree("before"), again)
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps(asdict(before)))
    return _report(before, after)


def _tree(name: str) -> Path:
    return compose(FOLDER / name, release(), "cpu", patched=name == "after")


def _differing(before: Results, after: Results) -> list[str]:
    old, new = before.outcomes, after.outcomes
    return sorted(test for test in old | new if old.get(test) != new.get(test))


def _is_in(test: str, file: str) -> bool:
    """Whether a test, as the report names it, is one of a test file."""
    name = test.partition("::")[0]
    module = file.removesuffix(".py").replace("/", ".")
    return name == module or name.startswith(f"{module}.")


def _report(before: Results, after: Results) -> int:
    for name, results in (("before", before), ("after", after)):
        counts = sorted(Counter(results.outcomes.values()).items())
        summary = ", ".join(f"{count} {outcome}" for outcome, count in counts)
        print(f"{name:6} {summary}, in {sum(results.seconds.values()):.0f} s of tests")
    for test, seconds in Counter(after.seconds).most_common(SLOWEST):
        print(f"{seconds:6.1f} s {test}")
    differing = _differing(before, after)
    for test in differing:
        old = before.outcomes.get(test, "absent")
        print(f"FAIL   {test}: {old} -> {after.outcomes.get(test, 'absent')}")
    if not differing:
        print(
            f"ok     {len(before.outcomes)} of upstream's tests, all with the same "
            "outcome"
        )
    return bool(differing)


def _kept(cache: Path) -> Results | None:
    try:
        return Results(**json.loads(cache.read_text()))
    except FileNotFoundError:
        return None


def _cache() -> Path:
    """Where the outcomes without the patch set are kept.

    They depend on the release, the tests, this Python and what is installed for it.
    """
    installed = sorted(
        f"{found.name}=={found.version}"
        for found in metadata.distributions()
        if found.name and found.name.lower() != "vllm"
    )
    wheel = release().wheel("cpu")
    facts = [release().sdist.sha256, wheel.sha256, *upstream_tests(), *installed]
    facts += [sys.version, platform.machine()]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return cache_dir() / "upstream-tests" / f"{digest[:16]}.json"


def _suite() -> Path:
    """A folder with upstream's tests and nothing that shadows the tree under test."""
    suite = compose(FOLDER / "suite", release(), "cpu", source=True, patched=False)
    for path in suite.iterdir():
        if path.name not in ("tests", "pyproject.toml"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (suite / "generic_plugin.py").write_text(PLUGIN)
    return suite


def _run(
    suite: Path, tree: Path, files: list[str], part: int = 0, parts: int = 1
) -> Results:
    """Run one of `parts` of the tests in `files` with the vLLM of `tree`."""
    name = f"{tree.name}-{part}"
    report = FOLDER / f"{name}.xml"
    report.unlink(missing_ok=True)
    # the tree's distribution counts, too: by its version vLLM finds the CPU
    paths = [tree, suite / "tests" / "vllm_test_utils"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "VLLM_CACHE_ROOT": str(FOLDER / f"{name}-cache"),
        "GENERIC_TESTS_PART": f"{part}/{parts}",
        "HF_HUB_OFFLINE": "1",  # a flaky network would look like a difference
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "generic_plugin", "--junitxml", str(report), *files]
    run = subprocess.run(
        command, cwd=suite, env=environment, capture_output=True, text=True
    )
    if run.returncode not in (0, 1) or not report.exists():
        raise BuildError(
            f"Upstream's tests did not run on the tree {tree.name}: "
            f"{run.stdout[-2000:]}{run.stderr[-2000:]}"
        )
    results = Results({}, {})
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = sorted(child.tag for child in case if child.tag in NOT_PASSED)
        test = f"{case.get('classname')}::{case.get('name')}"
        results.outcomes[test] = " and ".join(outcomes) or "passed"
        results.seconds[test] = float(case.get("time") or 0)
    return results
