# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Unified diffs as data."""

import re

import pytest

from tools import diffs

OLD = ["a", "b", "same", "c", "d", "same", "e", "f"]


def test_a_diff_is_written_as_it_was_read():
    text = (
        "diff --git a/x.py b/x.py\n--- a/x.py\n+++ b/x.py\n"
        "@@ -2,2 +2,3 @@ def f():\n a\n+new\n b\n"
        "@@ -9,2 +10,1 @@\n-c\n d\n"
        "diff --git a/y.py b/y.py\n--- a/y.py\n+++ b/y.py\n"
        "@@ -0,0 +1,1 @@\n+only\n"
    )
    files = diffs.parse(text)
    assert [file.path for file in files] == ["x.py", "y.py"]
    assert "".join(map(str, files)) == text


@pytest.mark.parametrize("header", ["@@ -2,3 +2,3 @@", "@@ -2,2 +2,2 @@", "@@ x @@"])
def test_a_hunk_with_other_lines_than_it_counts(header):
    text = f"diff --git a/x b/x\n--- a/x\n+++ b/x\n{header}\n a\n+new\n b\n"
    with pytest.raises(ValueError, match=re.escape(header)):
        diffs.parse(text)


@pytest.mark.parametrize(
    ("start", "lines", "places"),
    [
        (2, (" same", "+new", " c"), [2]),
        (2, ("-same", "+new", " e"), [5]),
        (2, (" same", "+new"), []),  # without context below: at the end only
        (2, (" f", "+new"), [7]),
        (1, (" b", "+new", " same"), []),  # line 1: at the beginning only
        (1, (" a", "+new", " b"), [0]),
        (2, (" gone", "+new", " b"), []),
    ],
)
def test_places_are_those_that_git_would_take(start, lines, places):
    assert diffs.Hunk(start, "", lines).places(OLD) == places


@pytest.mark.parametrize(
    "new",
    [
        ["a", "b", "same", "c", "d", "same", "new", "e", "f"],
        ["new", *OLD],
        [*OLD, "new"],
        ["a", "same", "c", "d", "same", "e", "g"],
        ["a", "b", "same", "new", "c", "d", "same", "new", "e", "f"],
    ],
)
def test_the_least_context_that_is_unique(new):
    made = diffs.make("x.py", OLD, new)
    assert made.fits(OLD)
    assert made.apply(OLD) == new
    assert diffs.parse(str(made))[0].apply(OLD) == new


def test_context_grows_until_it_is_unique():
    old = ["a", "x", "y", "b", "x", "y", "c"]
    made = diffs.make("x.py", old, ["a", "x", "y", "b", "x", "new", "y", "c"])
    (hunk,) = made.hunks
    assert [line for line in hunk.lines if line[0] == "+"] == ["+new"]
    assert hunk.old == ["b", "x", "y", "c"]
