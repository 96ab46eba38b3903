# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Composition: upstream's release, our modules, our patches, our version.

    fetch -> unpack -> lay modules and patches -> set the version -> pack

Every step works in a temporary folder beside its destination, and the last one
renames, so that what is interrupted leaves nothing behind.
"""

import base64
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools import ROOT, BuildError, native, patches
from tools.upstream import Release, adjust_requirement, fetch

SDIST_CONTENT = (
    *("CMakeLists.txt", "LICENSE", "README.md", "csrc", "patches"),
    *("pyproject.toml", "setup.py", "tools", "upstream.toml", "vllm", "vllm_generic"),
)

DEVELOP = ROOT / "build" / "develop"
"""The tree that an editable installation imports."""


def compose(
    destination: Path,
    release: Release,
    device: str,
    *,
    source: bool = False,
    patched: bool = True,
    link: bool = False,
) -> Path:
    """Make a tree of vLLM with this patch set at `destination`, replacing it.

    Args:
        source: from upstream's sdist, ready to be built, instead of its wheel.
        patched: False leaves the new modules and the patches out.
        link: symlink the new modules to this checkout instead of copying them.
    """
    archive = fetch(release.sdist if source else release.wheel(device))
    with _staging(destination) as tree:
        (_untar if source else _unzip)(archive, tree)
        if patched:
            patches.lay(tree, release.upstream, link)
        if source:
            _adjust_build_requirements(tree, device)
        else:
            _set_version(tree, archive, release, device)
    return destination


def build_wheel(folder: Path, release: Release, device: str) -> str:
    """Write the composed wheel into `folder` and return its file name."""
    with tempfile.TemporaryDirectory(prefix="vllm-generic-") as temporary:
        tree = compose(Path(temporary) / "tree", release, device)
        native.build(tree)
        return _pack(tree, folder)


def build_editable(folder: Path, release: Release, device: str) -> str:
    """Write a wheel that imports `DEVELOP`, whose new modules are symlinks."""
    compose(DEVELOP, release, device, link=True)
    with tempfile.TemporaryDirectory(prefix="vllm-generic-") as temporary:
        tree = Path(temporary)
        for info in DEVELOP.glob("*.dist-info"):
            shutil.move(info, tree / info.name)
        (tree / "__editable__.vllm.pth").write_text(f"{DEVELOP}\n")
        return _pack(tree, folder)


def build_from_source(
    folder: Path, release: Release, device: str, hook: str = "build_wheel"
) -> str:
    """Hand the composed sdist to upstream's own build and return the file name.

    Args:
        hook: `build_wheel` or `build_editable` of upstream's build backend.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-generic-") as temporary:
        editable = hook == "build_editable"
        tree = DEVELOP if editable else Path(temporary) / "tree"
        compose(tree, release, device, source=True, link=editable)
        project = tomllib.loads((tree / "pyproject.toml").read_text())
        call = (
            f"import sys, {project['build-system']['build-backend']} as backend; "
            f"backend.{hook}(sys.argv[1])"
        )
        out = Path(temporary) / "out"
        out.mkdir()
        environment = os.environ | {
            "VLLM_TARGET_DEVICE": device,
            "VLLM_VERSION_OVERRIDE": release.version(device),
        }
        environment.pop("VLLM_USE_PRECOMPILED", None)
        result = subprocess.run(
            [sys.executable, "-c", call, str(out)], cwd=tree, env=environment
        )
        if result.returncode:
            raise BuildError(
                f"Upstream's own build of vLLM {release.upstream} for the device "
                f"'{device}' failed with status {result.returncode}: its messages are "
                "above."
            )
        (wheel,) = out.glob("*.whl")
        shutil.move(wheel, folder / wheel.name)
        return wheel.name


def build_sdist(folder: Path, release: Release) -> str:
    """Write an archive of what a build of this repository needs."""
    stem = f"vllm-{release.version('cuda')}"
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {stem[5:]}\n".encode()
    with tarfile.open(folder / f"{stem}.tar.gz", "w:gz") as tar:
        for name in SDIST_CONTENT:
            if (ROOT / name).exists():
                tar.add(ROOT / name, f"{stem}/{name}", filter=_no_bytecode)
        entry = tarfile.TarInfo(f"{stem}/PKG-INFO")
        entry.size = len(metadata)
        tar.addfile(entry, io.BytesIO(metadata))
    return f"{stem}.tar.gz"


def _no_bytecode(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in entry.name else entry


def source_requirements(release: Release, device: str) -> list[str]:
    """What upstream's own build needs to be installed."""
    archive = fetch(release.sdist)
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.count("/") == 1 and member.name.endswith("/pyproject.toml"):
                file = tar.extractfile(member)
                assert file is not None  # a pyproject.toml is a regular file
                project = tomllib.loads(file.read().decode())
                wanted = project["build-system"]["requires"]
                adjusted = (adjust_requirement(line, device) for line in wanted)
                return [line for line in adjusted if line]
    raise BuildError(f"{archive} holds no pyproject.toml: report this release.")


def read_sdist(release: Release) -> Iterator[tuple[str, bytes | None]]:
    """The files of upstream's sdist: path, and content of those under `vllm/`."""
    with tarfile.open(fetch(release.sdist)) as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            if member.isfile():
                file = tar.extractfile(member) if name.startswith("vllm/") else None
                yield name, file.read() if file else None


@contextmanager
def _staging(destination: Path) -> Iterator[Path]:
    """A folder that takes the place of `destination` when the block succeeds."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=destination.parent,
        prefix=f".{destination.name}-",
        ignore_cleanup_errors=True,
    ) as folder:
        tree = Path(folder) / "new"
        tree.mkdir()
        yield tree
        if destination.exists():
            destination.rename(Path(folder) / "old")
        tree.rename(destination)


def _unzip(archive: Path, tree: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(tree)
        for entry in wheel.infolist():
            if entry.external_attr >> 16 & 0o111 and not entry.is_dir():
                (tree / entry.filename).chmod(0o755)  # extractall drops modes


def _untar(archive: Path, tree: Path) -> None:
    with tarfile.open(archive) as tar:
        members = []
        for member in tar:
            member.name = member.name.partition("/")[2]
            if member.name:
                members.append(member)
        # Python before 3.11.4 has no filters; the archive is upstream's own.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(tree, members)


def _set_version(tree: Path, archive: Path, release: Release, device: str) -> None:
    """Name and number the unpacked wheel as our own distribution."""
    version = release.version(device)
    for old in [*tree.glob("*.dist-info"), *tree.glob("*.data")]:
        old.rename(tree / f"vllm-{version}{old.suffix}")
    info = tree / f"vllm-{version}.dist-info"
    head, blank, body = (info / "METADATA").read_text().partition("\n\n")
    lines: list[str] = []
    for line in head.splitlines():
        key, _, value = line.partition(": ")
        if key == "Requires-Dist":
            adjusted = adjust_requirement(value, device)
            if adjusted is None:
                continue
            line = f"{key}: {adjusted}"
        elif key in ("Name", "Version"):
            line = f"{key}: {'vllm' if key == 'Name' else version}"
        lines.append(line)
    lines += _extras()
    (info / "METADATA").write_text("\n".join(lines) + blank + body)
    # some of upstream's WHEEL files contradict the tag in the file's name
    python, abi, systems = archive.stem.split("-")[-3:]
    tags = "".join(f"Tag: {python}-{abi}-{s}\n" for s in systems.split("."))
    (info / "WHEEL").write_text(
        f"Wheel-Version: 1.0\nGenerator: vllm-generic\nRoot-Is-Purelib: false\n{tags}"
    )
    (tree / "vllm" / "_version.py").write_text(
        f"__version__ = version = {version!r}\n"
        f"__version_tuple__ = version_tuple = {_version_tuple(version)!r}\n"
        "__commit_id__ = commit_id = None\n"
    )


def _extras() -> list[str]:
    """Our own extras, as lines of metadata: what parts of `vllm_generic` need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = []
    for extra, wanted in project["tool"]["vllm-generic"]["extras"].items():
        lines.append(f"Provides-Extra: {extra}")
        lines += [f'Requires-Dist: {line}; extra == "{extra}"' for line in wanted]
    return lines


def _version_tuple(version: str) -> tuple[int | str, ...]:
    """The version as vLLM's own build spells it: numbers, then the local label."""
    public, _, local = version.partition("+")
    return (*(int(part) for part in public.split(".")), local)


def _adjust_build_requirements(tree: Path, device: str) -> None:
    """Rewrite the lists from which upstream's build takes its requirements."""
    path = tree / "requirements" / f"{device}.txt"
    if path.exists():
        lines = path.read_text().splitlines()
        adjusted = (adjust_requirement(line, device) for line in lines)
        path.write_text("".join(f"{line}\n" for line in adjusted if line is not None))


def _pack(tree: Path, folder: Path) -> str:
    """Zip an unpacked wheel into `folder`, with a new RECORD."""
    (info,) = tree.glob("*.dist-info")
    record = info / "RECORD"
    record.unlink(missing_ok=True)
    (info / "RECORD.jws").unlink(missing_ok=True)
    tags = re.findall(r"^Tag: (.+)$", (info / "WHEEL").read_text(), re.MULTILINE)
    python, abi, _ = tags[0].split("-")
    systems = ".".join(tag.split("-")[2] for tag in tags)
    name = f"{info.stem}-{python}-{abi}-{systems}.whl"
    files = sorted(path for path in tree.rglob("*") if path.is_file())
    # PEP 427: the metadata comes last
    files.sort(key=lambda path: info in path.parents)
    lines = []
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        encoded = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        entry = path.relative_to(tree).as_posix()
        lines.append(f"{_csv(entry)},sha256={encoded},{path.stat().st_size}\n")
    record.write_text("".join(lines) + f"{info.name}/RECORD,,\n")
    partial = folder / f".{name}"
    try:
        with zipfile.ZipFile(
            partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1, strict_timestamps=False
        ) as wheel:
            for path in [*files, record]:
                wheel.write(path, path.relative_to(tree).as_posix())
        partial.replace(folder / name)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return name


def _csv(field: str) -> str:
    return '"' + field.replace('"', '""') + '"' if re.search('[",]', field) else field
