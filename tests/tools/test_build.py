# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The real artefacts: built by pip, installed, run, edited and uninstalled."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import series, upstream
from tools.compose import compose, source_requirements

from .test_compose import check_record

pytestmark = pytest.mark.build

REPOSITORY = Path(__file__).parents[2]
PIP = ("-m", "pip", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the repository, so that the tests leave no trace in this one."""
    folder = tmp_path_factory.mktemp("check out")  # with a space, on purpose
    ignored = shutil.ignore_patterns(".*", "build", "site", "__pycache__")
    return shutil.copytree(REPOSITORY, folder / "vllm-generic", ignore=ignored)


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    """The CPU wheel, built by pip as a user builds it."""
    out = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_TARGET_DEVICE", "cpu")
        subprocess.run(
            [sys.executable, *PIP, "wheel", "--no-deps", "-w", str(out), "."],
            cwd=checkout,
            check=True,
        )
    (built,) = out.iterdir()
    return built


@pytest.fixture
def release() -> upstream.Release:
    return upstream.release()


def test_the_wheel(wheel, release):
    assert wheel.name.startswith(f"vllm-{release.version('cpu')}-cp38-abi3-manylinux")
    with zipfile.ZipFile(wheel) as archive:
        check_record(archive)
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        header = archive.read(metadata).decode().partition("\n\n")[0]
    assert names >= set(series.new_modules())
    for dropped in ("torchvision", "torchaudio", "torchcodec", "+cpu;"):
        assert dropped not in header


def test_the_wheel_installs_runs_and_uninstalls(wheel, release, environment, checkout):
    before = environment.files()
    environment.run(*PIP, "install", "--no-deps", str(wheel))
    version = release.version("cpu")
    shown = environment.run(*PIP, "show", "vllm").splitlines()
    assert shown[:2] == ["Name: vllm", f"Version: {version}"]
    vllm = environment.python.with_name("vllm")
    assert environment.run(str(vllm), "--version").splitlines()[-1] == version
    where = (
        "import vllm, vllm.platforms as p; "
        "print(vllm.__file__, vllm.__version__, p.current_platform.device_type)"
    )
    # from the checkout, too, whose own vllm/ must not be imported
    printed = environment.run("-c", where, cwd=checkout).splitlines()[-1].split()
    assert printed == [str(environment.site / "vllm/__init__.py"), version, "cpu"]
    environment.run(*PIP, "uninstall", "-y", "vllm")
    assert environment.files() == before
    assert not vllm.exists()


def test_an_edit_takes_effect_in_a_development_installation(
    release, environment, checkout
):
    before = environment.files()
    environment.run("-m", "tools", "develop", "--", "--no-deps", cwd=checkout)
    module = series.new_modules()[0]
    path = checkout / module
    path.write_text(path.read_text() + "\nEDITED = 'at once'\n")
    dotted = module.removesuffix(".py").replace("/", ".")
    script = f"import {dotted} as m; print(m.EDITED)"
    assert environment.run("-c", script).splitlines()[-1] == "at once"
    script = (
        "import importlib.metadata as m, vllm; print(vllm.__file__, m.version('vllm'))"
    )
    printed = environment.run("-c", script, cwd=checkout).splitlines()[-1]
    tree = checkout / "build" / "develop"
    assert printed == f"{tree}/vllm/__init__.py {release.version('cpu')}"
    environment.run(*PIP, "uninstall", "-y", "vllm")
    assert environment.files() == before


@pytest.mark.parametrize("version", upstream.supported())
def test_apply_and_revert_need_the_standard_library_only(checkout, tmp_path, version):
    release = upstream.release(version)
    tree = compose(tmp_path / "tree", release, "cpu", source=True, patched=False)

    def tools(command: str) -> None:
        # -S: without site-packages
        run = [sys.executable, "-S", "-m", "tools", command, str(tree)]
        subprocess.run(run, cwd=checkout, check=True)

    before = digests(tree)
    tools("apply")
    changed = {n for patch in series.series(version) for n in patch.files}
    after = digests(tree)
    assert {n for n in before if before[n] != after[n]} == changed
    assert after.keys() - before.keys() >= set(series.new_modules())
    tools("revert")
    assert digests(tree) == before


def digests(tree: Path) -> dict[str, bytes]:
    return {
        path.relative_to(tree).as_posix(): hashlib.sha256(path.read_bytes()).digest()
        for path in (tree / "vllm").rglob("*")
        if path.is_file()
    }


def test_the_source_build(release, environment, checkout, tmp_path):
    """Upstream's own build, of the composed source, for the device without kernels."""
    wanted = source_requirements(release, "empty")
    python_only = [line for line in wanted if not line.startswith(("torch", "cmake"))]
    environment.run(*PIP, "install", "--quiet", *python_only)
    environment.run(
        *(*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."),
        cwd=checkout,
        VLLM_USE_PRECOMPILED="0",
        VLLM_TARGET_DEVICE="empty",
    )
    (built,) = tmp_path.glob("*.whl")
    assert built.name.startswith(f"vllm-{release.version('empty')}-")
    with zipfile.ZipFile(built) as archive:
        assert set(archive.namelist()) >= set(series.new_modules())
        for patch in series.series(release.upstream):
            for name in patch.files:
                text = archive.read(name).decode()
                added = [line for line in patch.added if line.strip()]
                assert any(line in text for line in added), name
