# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Every feature answers as vLLM's own class does, with the same weights."""

import functools
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from feature_models import COLUMNS, NATIVE, Column
from feature_table import FEATURES, Feature, Result, difference, run_apart, run_engine

# What is refused, and by which words. Everything else is equal.
REFUSED: dict[tuple[str, str], str] = {}

BY_TITLE = {column.title: column for column in (NATIVE, *COLUMNS)}


@functools.cache
def run_once(title: str, engine: str) -> dict[str, Result]:
    run = run_engine if engine == "default" else run_apart
    return run(BY_TITLE[title], engine)


def cases() -> list[Any]:
    found = []
    for feature in FEATURES:
        for column in COLUMNS:
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
    wanted = run_once(NATIVE.title, feature.engine)[feature.name]
    got = run_once(column.title, feature.engine)[feature.name]
    words = REFUSED.get((column.title, feature.name))
    if words is not None:
        assert words in got["refused"]
        return
    assert not (isinstance(wanted, dict) and "refused" in wanted), wanted
    assert difference(wanted, got) is None


def test_a_difference_is_found() -> None:
    first: Result = [[([1, 2], "None")], {5: -0.5}]
    assert difference(first, [[([1, 2], "None")], {5: -0.50005}]) is None
    assert difference(first, [[([1, 3], "None")], {5: -0.5}]) == "[0][0][0][1]: 2 is 3"
    assert difference(first, [[([1, 2], "None")], {5: -0.6}]) is not None
    assert difference(first, [[([1, 2], "None")], {6: -0.5}]) is not None
    assert difference(first, {"refused": "no"}) is not None
