# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which release of vLLM is built, for which device, and the bytes it comes from.

Everything here is read from `upstream.toml`; only `fetch` reaches the network.
"""

import configparser
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools import ROOT, BuildError

FETCH_REQUIREMENTS = ["pypi-simple>=1.8", "tqdm"]
"""What `fetch` needs beyond the standard library when a file is not cached."""


@dataclass(frozen=True)
class Artefact:
    """A published file, pinned by its digest."""

    file: str
    sha256: str

    @property
    def project(self) -> str:
        """The name under which a package index lists the file."""
        return self.file.split("-")[0].replace("_", "-")


@dataclass(frozen=True)
class Release:
    """One supported release of vLLM."""

    upstream: str
    sdist: Artefact
    wheels: dict[str, dict[str, Artefact]]
    """Device, then machine, to the precompiled wheel."""

    def version(self, device: str) -> str:
        """The version of the composed distribution for `device`.

        vLLM recognises a CPU build by the letters "cpu" in its own version.
        """
        label = f"{self.upstream}+generic.{_config()['generic']}"
        return label if device == "cuda" else f"{label}.{device}"

    def wheel(self, device: str) -> Artefact:
        """The precompiled wheel for `device` on this machine."""
        machines = self.wheels.get(device, {})
        if not machines:
            others = [v for v in supported() if device in release(v).wheels]
            hint = (
                f"set VLLM_UPSTREAM_VERSION to {_either(others)}, or "
                if others
                else f"set VLLM_TARGET_DEVICE to {_either(sorted(self.wheels))}, or "
            )
            raise BuildError(
                f"vLLM {self.upstream} has no precompiled wheel for the device "
                f"'{device}': {hint}build from source with VLLM_USE_PRECOMPILED=0."
            )
        if sys.platform != "linux" or platform.machine() not in machines:
            raise BuildError(
                f"vLLM {self.upstream} has no precompiled wheel for {sys.platform} on "
                f"{platform.machine()}, only for linux on {_either(sorted(machines))}: "
                "build from source with VLLM_USE_PRECOMPILED=0."
            )
        return machines[platform.machine()]


@functools.cache
def _config() -> dict[str, Any]:
    return tomllib.loads((ROOT / "upstream.toml").read_text())


def _either(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def supported() -> list[str]:
    """The supported upstream versions, oldest first."""
    return list(_config()["release"])


def release(version: str | None = None) -> Release:
    """The release `version`, else VLLM_UPSTREAM_VERSION, else the default one."""
    version = version or os.environ.get("VLLM_UPSTREAM_VERSION") or _config()["default"]
    if version not in supported():
        raise BuildError(
            f"vLLM {version} is not supported by this patch set: use "
            f"{_either(supported())} (VLLM_UPSTREAM_VERSION)."
        )
    entry = dict(_config()["release"][version])
    sdist = Artefact(**entry.pop("sdist"))
    wheels = {
        device: {machine: Artefact(**pin) for machine, pin in machines.items()}
        for device, machines in entry.items()
    }
    return Release(version, sdist, wheels)


def upstream_tests() -> list[str]:
    """Upstream's own tests that cover what we patch, as pytest names them."""
    return _config()["upstream-tests"]


def target_device() -> str:
    """VLLM_TARGET_DEVICE, else `cuda` where an NVIDIA driver is found, else `cpu`."""
    if device := os.environ.get("VLLM_TARGET_DEVICE"):
        return device
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "cpu"
    return "cuda"


def use_precompiled() -> bool:
    """Whether upstream's compiled kernels are taken instead of built."""
    value = os.environ.get("VLLM_USE_PRECOMPILED", "1").strip().lower()
    if value not in ("", "0", "false", "1", "true"):
        raise BuildError(f"VLLM_USE_PRECOMPILED must be 0 or 1, not '{value}'.")
    return value not in ("0", "false")


def check_python(version: tuple[int, ...] = sys.version_info[:2]) -> None:
    """Raise when this Python is outside what the composed vLLM supports."""
    wanted = _config()["requires-python"]
    for operator, major, minor in re.findall(r"(>=|<)(\d+)\.(\d+)", wanted):
        bound = (int(major), int(minor))
        if version < bound if operator == ">=" else version >= bound:
            raise BuildError(
                f"Python {'.'.join(map(str, version))} is not supported: vLLM needs "
                f"Python {wanted}. Build in an environment of such a Python."
            )


def adjust_requirement(requirement: str, device: str) -> str | None:
    """The requirement as the distribution for `device` has it, None to drop it."""
    rules = _config().get(device, {})
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    name = re.sub(r"[-_.]+", "-", match.group()).lower() if match else ""
    if name in rules.get("drop-requirements", ()):
        return None
    if name in rules.get("drop-local-version", ()):
        return re.sub(r"(==\s*[\w.]+)\+[\w.]+", r"\1", requirement)
    return requirement


def cache_dir() -> Path:
    """Where downloads are kept: VLLM_GENERIC_CACHE, else the user's cache folder."""
    if folder := os.environ.get("VLLM_GENERIC_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vllm-generic"


def is_cached(artefact: Artefact) -> bool:
    """Whether `fetch` will need no network, judging by the name alone."""
    return (cache_dir() / artefact.file).exists()


def fetch(artefact: Artefact) -> Path:
    """Return the verified file, downloading it when it is not cached.

    Raises:
        BuildError: nothing serves the file, or its digest is not the pinned one.
            Neither leaves a file behind.
    """
    path = cache_dir() / artefact.file
    if path.exists():
        if _sha256(path) == artefact.sha256:
            return path
        print(f"{path} is damaged: downloading it again", file=sys.stderr)
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
        partial = Path(folder) / artefact.file
        _download(artefact, partial)
        digest = _sha256(partial)
        if digest != artefact.sha256:
            raise BuildError(
                f"{artefact.file} has the wrong sha256 {digest}, upstream.toml pins "
                f"{artefact.sha256}: the download was removed; check the package index "
                "that served it."
            )
        partial.replace(path)
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(artefact: Artefact, path: Path) -> None:
    with _pypi_simple():
        import pypi_simple
        import requests

        settings = _pip_settings()
        indexes = [settings.get("index-url") or pypi_simple.PYPI_SIMPLE_ENDPOINT]
        extra = settings.get("extra-index-url", "").split()
        indexes += [url for url in extra if url.startswith("http")]
        show = sys.stderr.isatty()
        print(f"Downloading {artefact.file}", file=sys.stderr)
        try:
            with pypi_simple.PyPISimple() as client:
                client.s.verify = settings.get("cert") or True
                package = next(_listings(client, indexes, artefact), None)
                if package is None:
                    raise BuildError(
                        f"The package index has no {artefact.file}: name one that has "
                        f"in PIP_INDEX_URL, or put the file into {cache_dir()}."
                    )
                client.download_package(
                    package,
                    path,
                    verify=False,  # the caller verifies the digest of upstream.toml
                    progress=pypi_simple.tqdm_progress_factory() if show else None,
                    timeout=float(settings.get("timeout", 60)),
                )
        except requests.RequestException as error:
            raise BuildError(
                f"Cannot download {artefact.file} ({type(error).__name__}): check the "
                f"network and pip's index settings, or put it into {cache_dir()}."
            ) from error


@contextmanager
def _pypi_simple() -> Iterator[None]:
    """Make `pypi_simple` importable for the block, installed aside if need be."""
    if importlib.util.find_spec("pypi_simple") and importlib.util.find_spec("tqdm"):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="vllm-generic-") as folder:
        # -I reaches the environment's pip from inside an isolated build, too
        command = [sys.executable, "-I", "-m", "pip", "install", "--quiet", "--target"]
        result = subprocess.run(
            [*command, folder, *FETCH_REQUIREMENTS], capture_output=True, text=True
        )
        if result.returncode:
            raise BuildError(
                f"Cannot install {' and '.join(FETCH_REQUIREMENTS)}, which download "
                "vLLM: check the network and pip's index settings, or put "
                f"vLLM's files into {cache_dir()}."
            )
        sys.path.insert(0, folder)
        try:
            yield
        finally:
            sys.path.remove(folder)


def _listings(client: Any, indexes: list[str], artefact: Artefact) -> Iterator[Any]:
    from pypi_simple import NoSuchProjectError

    for index in indexes:
        client.endpoint = index.rstrip("/") + "/"
        try:
            page = client.get_project_page(artefact.project, timeout=60)
        except NoSuchProjectError:
            continue
        yield from (p for p in page.packages if p.filename == artefact.file)


def _pip_settings() -> dict[str, str]:
    """pip's own settings, weakest source first, as pip itself ranks them.

    Read from its files because an isolated build environment has no pip to ask.
    """
    home = Path.home()
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    files = [
        Path("/etc/pip.conf"),
        home / ".pip" / "pip.conf",
        config / "pip" / "pip.conf",
        Path(sys.prefix) / "pip.conf",
        Path(os.environ.get("PIP_CONFIG_FILE", os.devnull)),
    ]
    parser = configparser.RawConfigParser()
    parser.read(files)
    settings = dict(parser["global"]) if parser.has_section("global") else {}
    for name in ("index-url", "extra-index-url", "cert", "timeout"):
        variable = "PIP_" + name.upper().replace("-", "_")
        if value := os.environ.get(variable):
            settings[name] = value
    return settings
