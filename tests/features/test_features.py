# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Every feature answers as vLLM's own class does, with the same weights."""

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from feature_models import COLUMNS, NATIVE, NATIVE_DIVIDED, Column, native_of
from feature_rows import ENGINES, FEATURES, Feature, Result
from feature_table import (
    difference,
    kept,
    refused,
    run_apart,
    run_engine,
    table,
    titles_of,
)

ROOT = Path(__file__).parents[2]
BY_TITLE = {column.title: column for column in (NATIVE, NATIVE_DIVIDED, *COLUMNS)}


@functools.cache
def run_once(title: str, engine: str) -> dict[str, Result]:
    run = run_engine if engine == "default" else run_apart
    return run(BY_TITLE[title], engine)


def cases() -> list[Any]:
    found = []
    for feature in FEATURES:
        for column in COLUMNS:
            if ENGINES[feature.engine].family not in column.families:
                continue
            slow = column.slow or feature.engine != "default"
            marks = [pytest.mark.slow] if slow else []
            name = f"{column.title}: {feature.name}"
            found.append(pytest.param(column, feature, marks=marks, id=name))
    return found


@pytest.mark.engine
@pytest.mark.parametrize(("column", "feature"), cases())
def test_equal_to_vllms_own_class(
    column: Column, feature: Feature, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if column.title == "Megatron's layers":
        pytest.importorskip("megatron.core")
    wanted = run_once(native_of(column).title, feature.engine)[feature.name]
    got = run_once(column.title, feature.engine)[feature.name]
    if feature.refused is not None and not torch.cuda.is_available():
        assert feature.refused in str(refused(wanted))
        assert feature.refused in str(refused(got))
        return
    assert refused(wanted) is None, wanted
    assert difference(wanted, got) is None


def test_a_difference_is_found() -> None:
    first: Result = [[([1, 2], "None")], {5: -0.5}]
    assert difference(first, [[([1, 2], "None")], {5: -0.50005}]) is None
    assert difference(first, [[([1, 3], "None")], {5: -0.5}]) == "[0][0][0][1]: 2 is 3"
    assert difference(first, [[([1, 2], "None")], {5: -0.6}]) is not None
    assert difference(first, [[([1, 2], "None")], {6: -0.5}]) is not None
    assert difference(first, {"refused": "no"}) is not None


def test_the_page_has_the_table_of_the_kept_results() -> None:
    """Each row and column, also those that were not run."""
    rows = kept(ROOT / "benchmarks/results/features-cpu.json")
    page = (ROOT / "docs/models/features.md").read_text()
    assert table(rows, titles_of(COLUMNS)) in page, (
        "Put what `python tests/features/feature_table.py --print "
        "benchmarks/results/features-cpu.json` prints into docs/models/features.md."
    )
    assert not {name for name in rows} - {feature.name for feature in FEATURES}
