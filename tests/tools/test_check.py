# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`tools check` finds what does not fit and what belongs nowhere."""

import pytest

from tools import BuildError, check, private_names, upstream

from .conftest import (
    ENGINE_PATCH,
    ENGINE_PATCH_NAME,
    PATCH,
    REGISTRY_PATCH_NAME,
    SERIES,
    VERSION,
)

SPDX = (
    "# SPDX-License-Identifier: Apache-2.0\n"
    "# SPDX-FileCopyrightText: Copyright contributors to the vLLM project\n"
)


def test_a_sound_patch_set_passes(repository, capsys):
    repository.write("setup.py", SPDX)
    repository.write("vllm/callables.py", SPDX)
    repository.write("vllm_generic/service.py", SPDX)
    assert check.main([VERSION]) == 0
    assert f"ok    vLLM {VERSION}: 2 patches, 2 files, 1 new modules" in (
        capsys.readouterr().out
    )


def test_failures_are_counted_and_each_check_runs(repository, capsys):
    repository.write("setup.py", "")
    repository.write("patches/robustness/0003-forgotten.patch", PATCH)
    assert check.main([VERSION]) == 2
    out = capsys.readouterr().out
    assert "FAIL  every patch is listed" in out
    assert "vllm/callables.py must begin with these two lines" in out
    assert f"ok    vLLM {VERSION}" in out


def test_an_unlisted_patch(repository):
    repository.write("patches/robustness/0003-forgotten.patch", PATCH)
    with pytest.raises(BuildError, match="0003-forgotten.patch is not in patches/seri"):
        check.check_listing()


@pytest.mark.parametrize(
    "name", [f"{VERSION}/0009-lost.diff", "9.9/0101-engine.diff", "0101-engine.diff"]
)
def test_an_override_of_nothing(repository, name):
    diff = ENGINE_PATCH.partition("---\n")[2]
    repository.write(f"patches/robustness/{name}", diff)
    with pytest.raises(BuildError, match=f"{name} overrides nothing"):
        check.check_listing()


def test_a_file_in_no_commit(repository):
    repository.write("vllm/stray.py", "")
    with pytest.raises(BuildError, match="vllm/stray.py is in no commit: add it"):
        check.check_commits()
    repository.write("vllm/callables.py", "import vllm.stray")
    with pytest.raises(BuildError, match="callables.py imports vllm.stray, which"):
        check.check_commits()


def test_a_test_in_no_commit(repository):
    repository.write("tests/test_stray.py", "")
    with pytest.raises(BuildError, match="tests/test_stray.py is in no commit"):
        check.check_commits()
    stay = 'stay = ["tests/test_stray.py"]\n'
    repository.write("patches/series.toml", stay + SERIES)
    assert check.check_commits() == "3 commits, 1 files"


def test_a_pattern_of_nothing(repository):
    repository.write("patches/series.toml", SERIES.replace("callables.py", "gone.py"))
    with pytest.raises(BuildError, match="Add callables: vllm/gone.py names no new"):
        check.check_commits()


def test_a_hunk_that_fits_in_two_places(repository):
    # not at the first line, which git takes for the beginning of the file
    patch = ENGINE_PATCH.replace("-1,2 +1,2", "-4,2 +4,2")
    repository.write(ENGINE_PATCH_NAME, patch)
    with pytest.raises(BuildError, match="line 4 of vllm/v1/engine.py fits at the lin"):
        check.check_release(VERSION)


def test_a_robustness_patch_that_needs_another(repository):
    hunk = ENGINE_PATCH.replace("-first = 1\n", "-first = 100\n")
    hunk = hunk.replace("+first = 100", "+first = 1000")
    repository.write("patches/robustness/0102-higher.patch", hunk)
    entry = '[[robustness]]\npatch = "0102-higher"\n'
    repository.write("patches/series.toml", SERIES + entry)
    with pytest.raises(BuildError, match="0102-higher.patch does not apply on its own"):
        check.check_release(VERSION)
    repository.write("patches/series.toml", f'{SERIES}{entry}needs = ["0101-engine"]\n')
    assert check.check_release(VERSION).startswith("3 patches")


def test_a_collision_with_upstream(repository):
    repository.write("vllm/v1/engine.py", "")
    with pytest.raises(BuildError, match="vllm/v1/engine.py exists in vLLM 1.2.3"):
        check.check_release(VERSION)


def test_a_module_that_shadows_a_package(repository):
    repository.write("vllm/v1", "")
    with pytest.raises(BuildError, match="vllm/v1 exists in vLLM"):
        check.check_release(VERSION)


def test_a_module_in_no_package(repository):
    repository.write("vllm/deep/module.py", "")
    with pytest.raises(BuildError, match="in no package: add vllm/deep/__init__.py"):
        check.check_release(VERSION)


def test_a_lost_anchor(repository):
    patch = ENGINE_PATCH.replace("first = 1\n", "zeroth = 1\n")
    repository.write(ENGINE_PATCH_NAME, patch)
    with pytest.raises(BuildError, match="0101-engine.patch does not apply"):
        check.check_release(VERSION)


def test_a_patch_that_does_not_compile(repository):
    patch = ENGINE_PATCH.replace("first = 100", "first = = 100")
    repository.write(ENGINE_PATCH_NAME, patch)
    with pytest.raises(BuildError, match="vllm/v1/engine.py, line 1: invalid syntax"):
        check.check_release(VERSION)


@pytest.mark.parametrize(
    "hook",
    [
        "from vllm.extra.module import f",
        "from vllm.extra import module",
        "from .extra.module import f",
        "import vllm.extra.module",
        'load("vllm.extra.module")',
    ],
)
def test_a_module_hooked_by_a_patch_is_reachable(repository, hook):
    repository.write("vllm/extra/module.py", "")
    repository.write("vllm/extra/__init__.py", "")
    patch = PATCH.replace("from .callables import wrap", hook)
    repository.write(REGISTRY_PATCH_NAME, patch)
    (repository.root / "vllm/callables.py").unlink()
    assert check.check_reachable() == "2 new modules"


@pytest.mark.parametrize(
    "line",
    [
        "from .extra import module",
        "import vllm.extra.module",
        "from vllm.extra.module import f",
    ],
)
def test_a_module_imported_by_a_reachable_one_is_reachable(repository, line):
    repository.write("vllm/extra/module.py", "")
    repository.write("vllm/extra/__init__.py", "")
    repository.write("vllm/callables.py", f"def wrap():\n    {line}\n")
    assert check.check_reachable() == "3 new modules"


def test_a_documented_module_is_reachable(repository):
    repository.write("vllm/validate.py", "")
    with pytest.raises(BuildError, match="vllm/validate.py is reachable from nothing"):
        check.check_reachable()
    repository.write("docs/validation.md", "Run `python -m vllm.validate`.")
    assert check.check_reachable() == "2 new modules"


def test_a_ring_of_modules_is_not_reachable(repository):
    repository.write("vllm/one.py", "import vllm.two")
    repository.write("vllm/two.py", "import vllm.one")
    with pytest.raises(BuildError, match="vllm/one.py is reachable from nothing"):
        check.check_reachable()


@pytest.mark.build
@pytest.mark.parametrize("version", upstream.supported())
def test_the_patch_set_fits_the_release(version):
    check.check_release(version)


def test_the_patch_set_is_whole():
    check.check_listing()
    check.check_commits()
    check.check_reachable()
    check.check_spdx()
    private_names.check_listed()
