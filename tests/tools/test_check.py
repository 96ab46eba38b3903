# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`tools check` finds what does not fit and what belongs nowhere."""

import pytest

from tools import BuildError, check, upstream

from .conftest import ENGINE_PATCH, PATCH, VERSION

SPDX = (
    "# SPDX-License-Identifier: Apache-2.0\n"
    "# SPDX-FileCopyrightText: Copyright contributors to the vLLM project\n"
)


def test_a_sound_patch_set_passes(repository, capsys):
    repository.write("setup.py", SPDX)
    repository.write("vllm/callables.py", SPDX)
    assert check.main([VERSION]) == 0
    assert f"ok    vLLM {VERSION}: 2 patches, 2 files, 1 new modules" in (
        capsys.readouterr().out
    )


def test_failures_are_counted_and_each_check_runs(repository, capsys):
    repository.write("setup.py", "")
    repository.write("patches/0003-forgotten.patch", PATCH)
    assert check.main([VERSION]) == 2
    out = capsys.readouterr().out
    assert "FAIL  every patch is listed" in out
    assert "vllm/callables.py must begin with these two lines" in out
    assert f"ok    vLLM {VERSION}" in out


def test_an_unlisted_patch(repository):
    repository.write("patches/0003-forgotten.patch", PATCH)
    with pytest.raises(BuildError, match="0003-forgotten.patch is not in patches/seri"):
        check.check_listing()


def test_a_variant_with_an_incomplete_header(repository):
    repository.write(
        f"patches/{VERSION}/0001-registry.patch", PATCH.replace("Why", "W")
    )
    with pytest.raises(BuildError, match=f"{VERSION}/0001-registry.patch lacks 'Why:'"):
        check.check_listing()


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
    repository.write("patches/0002-engine.patch", patch)
    with pytest.raises(BuildError, match="0002-engine.patch does not apply"):
        check.check_release(VERSION)


def test_a_patch_that_does_not_compile(repository):
    patch = ENGINE_PATCH.replace("first = 100", "first = = 100")
    repository.write("patches/0002-engine.patch", patch)
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
    repository.write("patches/0001-registry.patch", patch)
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
    check.check_reachable()
    check.check_spdx()
