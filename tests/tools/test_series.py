# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Reading patches, their order and their overrides for a release."""

import pytest

from tools import BuildError, imports, series

from .conftest import (
    ENGINE_PATCH_NAME,
    PATCH,
    REGISTRY_PATCH_NAME,
    SERIES,
    VERSION,
)

OVERRIDE_NAME = f"patches/generic-models/{VERSION}/0001-registry.diff"
OVERRIDE = PATCH.partition("---\n")[2].replace("wrap(model)", "wrapped(model)")
OTHER_FILE = OVERRIDE.replace("vllm/registry.py", "vllm/v1/registry.py")


def test_a_patch_reads(repository):
    first, second = series.series()
    assert first.subject == "registry: register callables"
    assert first.files == ["vllm/registry.py"]
    assert second.trailers == {
        "Why": "A reason, on two lines.",
        "Upstream": "a reference",
        "Drop-when": "A condition.",
    }
    assert first.added == [
        "    from .callables import wrap",
        "    models[name] = wrap(model)",
    ]


@pytest.mark.parametrize(
    "cut, complaint",
    [
        ("Why: A reason.\n", "lacks 'Why:'"),
        ("Upstream: a reference\n", "lacks 'Upstream:'"),
        ("Drop-when: A condition.\n", "lacks 'Drop-when:'"),
        ("It registers them.\n", "lacks its description"),
        ("Subject: [PATCH] ", "must begin with the line 'Subject: \\[PATCH\\]"),
        ("---\ndiff --git", "must begin with the line"),
    ],
)
def test_an_incomplete_header_is_refused(repository, cut, complaint):
    repository.write(REGISTRY_PATCH_NAME, PATCH.replace(cut, "", 1))
    with pytest.raises(BuildError, match=f"{REGISTRY_PATCH_NAME} {complaint}"):
        series.series()


def test_a_patch_may_not_create_files(repository):
    created = PATCH.replace("--- a/vllm/registry.py", "--- /dev/null")
    repository.write(REGISTRY_PATCH_NAME, created)
    with pytest.raises(BuildError, match="a new module belongs into vllm/"):
        series.series()


def test_a_listed_patch_must_exist(repository):
    (repository.root / ENGINE_PATCH_NAME).unlink()
    with pytest.raises(BuildError, match="0101-engine.patch is named in patches/ser"):
        series.series()


# ---- Overrides ---------------------------------------------------------------------


def test_an_override_takes_the_place_of_the_diff_of_its_file(repository):
    repository.write(OVERRIDE_NAME, f"# Why.\n{OVERRIDE}")
    here, elsewhere = series.series(VERSION)[0], series.series("1.3.0")[0]
    assert "    models[name] = wrapped(model)" in here.added
    assert "    models[name] = wrap(model)" in elsewhere.added
    assert (here.subject, here.trailers) == (elsewhere.subject, elsewhere.trailers)
    assert here.files == ["vllm/registry.py"]


def test_an_override_keeps_the_diffs_of_other_files(repository):
    repository.write(OVERRIDE_NAME, OTHER_FILE)
    patch = series.series(VERSION)[0]
    assert patch.files == ["vllm/registry.py", "vllm/v1/registry.py"]


def test_an_override_may_leave_a_file_out(repository):
    head = "# It moved.\nWithout: vllm/registry.py\n"
    repository.write(OVERRIDE_NAME, head + OTHER_FILE)
    assert series.series(VERSION)[0].files == ["vllm/v1/registry.py"]
    repository.write(OVERRIDE_NAME, head)
    patches = series.series(VERSION)  # a patch of which nothing is left is no patch
    assert all(patch.files for patch in patches)
    assert len(patches) == len(series.series()) - 1


@pytest.mark.parametrize(
    "head, complaint",
    [
        ("Without: vllm/other.py\n", "0001-registry.patch does not change"),
        ("Subject: [PATCH] registry: ported\n", "the header is the patch's"),
    ],
)
def test_an_override_has_no_header(repository, head, complaint):
    repository.write(OVERRIDE_NAME, head + OVERRIDE)
    with pytest.raises(BuildError, match=complaint):
        series.series(VERSION)


# ---- The order ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "old, new, complaint",
    [
        ("0101-engine", "0001-registry", "names 0001-registry twice"),
        ('subject = "Add callables"\n', "", "an entry: give it a patch, or a subject"),
        ("message", "massage", "Add callables: unknown massage; use files, message"),
        ("[[rob", "[rob", "series.toml does not read"),
        ('0101-engine"', '0101-engine"\nneeds = ["0102-x"]', "it needs 0102-x, which"),
    ],
)
def test_a_wrong_entry_is_named(repository, old, new, complaint):
    repository.write("patches/series.toml", SERIES.replace(old, new))
    if "[rob" in old:
        repository.write("patches/series.toml", SERIES.replace(old, "[[rob]"))
    with pytest.raises(BuildError, match=complaint):
        series.commits()


def test_what_a_patch_needs(repository):
    more = """
[[robustness]]
patch = "0102-second"
needs = ["0101-engine"]
[[robustness]]
patch = "0103-third"
needs = ["0102-second"]
"""
    repository.write("patches/series.toml", SERIES + more)
    needed = series.needed(series.commits()[-1])
    assert [commit.patch for commit in needed] == ["0101-engine", "0102-second"]


def test_a_file_goes_with_the_first_commit_that_takes_it(repository):
    repository.write("vllm/more.py", "")
    repository.write("tests/sub/test_more.py", "")
    repository.write(
        "patches/series.toml",
        SERIES.replace(
            '"0001-registry"', '"0001-registry"\nfiles = ["vllm", "tests/*"]'
        ),
    )
    assert [imports.files_of(commit) for commit in series.commits()] == [
        ["vllm/callables.py"],
        ["tests/sub/test_more.py", "vllm/more.py"],
        [],
    ]


def test_a_robustness_patch_brings_the_modules_that_it_imports(repository):
    repository.write("vllm/counting.py", "def count():\n    from vllm import steps\n")
    repository.write("vllm/steps.py", "")
    path = repository.root / ENGINE_PATCH_NAME
    hook = "+import vllm.counting\n+first = 100"
    text = path.read_text().replace("+first = 100", hook).replace("+1,2", "+1,3")
    path.write_text(text)
    files = imports.files_of(series.commits()[-1])
    assert files == ["vllm/counting.py", "vllm/steps.py"]
