# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`python -m tools upstream-tests`: a patched vLLM still passes vLLM's own tests.

The tests that upstream.toml lists run on a tree with the patch set. Those that do not
pass, for want of an optional package or a GPU, run on one without it as well, where
their outcomes have to be the same.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tools import ROOT, BuildError
from tools.compose import compose
from tools.upstream import release, upstream_tests

FOLDER = ROOT / "build" / "upstream-tests"
WORKERS = 2
"""Test processes at once; more would not find memory on a small machine."""
SLOWEST = 5

# Freeing a GPU's memory after each test takes a second and fails without one.
PLUGIN = """
import json, os
from collections import defaultdict
from pathlib import Path

chosen = json.loads(os.environ["GENERIC_TESTS"])
outcomes, seconds = defaultdict(set), defaultdict(float)

def pytest_collection_modifyitems(items):
    # sorted: some parameters are sets, whose order is another in each process
    names = sorted({item.nodeid for item in items})
    if chosen["only"] is not None:
        names = [name for name in names if name in chosen["only"]]
    names = set(names[chosen["part"] :: chosen["parts"]])
    items[:] = [item for item in items if item.nodeid in names]
    for item in items:
        item.add_marker("skip_global_cleanup")

def pytest_runtest_logreport(report):
    seconds[report.nodeid] += report.duration
    found = outcomes[report.nodeid]
    if report.failed:
        found.add("failure" if report.when == "call" else "error")
    elif report.skipped:
        found.add("skipped")

def pytest_sessionfinish():
    named = {name: " and ".join(sorted(found)) for name, found in outcomes.items()}
    named = {name: outcome or "passed" for name, outcome in named.items()}
    Path(chosen["report"]).write_text(json.dumps([named, seconds]))
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
    """Print the outcomes; 1 if one that is not "passed" is another without patches."""
    suite = _suite()
    after = _run(suite, _tree("after"))
    others = sorted(t for t, outcome in after.outcomes.items() if outcome != "passed")
    before = _run(suite, _tree("before"), others) if others else Results({}, {})
    return _report(before, after)


def _tree(name: str) -> Path:
    return compose(FOLDER / name, release(), "cpu", patched=name == "after")


def _report(before: Results, after: Results) -> int:
    counts = sorted(Counter(after.outcomes.values()).items())
    summary = ", ".join(f"{count} {outcome}" for outcome, count in counts)
    seconds = sum((before.seconds | after.seconds).values())
    print(f"{summary}, in {seconds:.0f} s of tests")
    for test, duration in Counter(after.seconds).most_common(SLOWEST):
        print(f"{duration:6.1f} s {test}")
    differing = 0
    for test, outcome in sorted(after.outcomes.items()):
        old = before.outcomes.get(test, "absent")
        if outcome not in ("passed", old):
            print(f"FAIL   {test}: {old} -> {outcome}")
            differing += 1
    if not differing:
        print(
            f"ok     {len(after.outcomes)} of upstream's tests: each passes, or has the"
        )
        print("       same outcome without the patch set")
    return bool(differing)


def _suite() -> Path:
    """A folder with upstream's tests and nothing that shadows the tree under test."""
    suite = compose(FOLDER / "suite", release(), "cpu", source=True, patched=False)
    for path in suite.iterdir():
        if path.name not in ("tests", "pyproject.toml"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (suite / "generic_plugin.py").write_text(PLUGIN)
    return suite


def _run(suite: Path, tree: Path, only: list[str] | None = None) -> Results:
    """Run the tests, or `only` some, with the vLLM of `tree`, in several processes."""
    results = Results({}, {})
    with ThreadPoolExecutor(WORKERS) as pool:  # of processes: each part is one
        parts = [pool.submit(_run_part, suite, tree, only, i) for i in range(WORKERS)]
        for part in parts:
            results |= part.result()
    return results


def _run_part(suite: Path, tree: Path, only: list[str] | None, part: int) -> Results:
    name = f"{tree.name}-{part}"
    report = FOLDER / f"{name}.json"
    report.unlink(missing_ok=True)
    chosen = {"only": only, "part": part, "parts": WORKERS, "report": str(report)}
    # the tree's distribution counts, too: by its version vLLM finds the CPU
    paths = [tree, suite / "tests" / "vllm_test_utils"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "VLLM_CACHE_ROOT": str(FOLDER / f"{name}-cache"),
        "GENERIC_TESTS": json.dumps(chosen),
        "HF_HUB_OFFLINE": "1",  # a flaky network would look like a difference
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "generic_plugin", *upstream_tests()]
    run = subprocess.run(
        command, cwd=suite, env=environment, capture_output=True, text=True
    )
    # 5: there was none in this part
    if run.returncode not in (0, 1, 5) or not report.exists():
        raise BuildError(
            f"Upstream's tests did not run on the tree {tree.name}: "
            f"{run.stdout[-2000:]}{run.stderr[-2000:]}"
        )
    return Results(*json.loads(report.read_text()))
