# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The change as it lies in this repository: patches, their order, and new modules.

`patches/series.toml` gives the order. For a release in which a file differs,
`patches/<series>/<release>/<patch>.diff` holds the diff of that file alone.
"""

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tools import ROOT, BuildError, diffs
from tools.diffs import FileDiff

TRAILERS = ("Why", "Upstream", "Drop-when")
"""The trailers that a patch's header must have."""

INDEPENDENT = "robustness"
"""The series whose patches are each a pull request of its own."""

FIELDS = {"patch", "subject", "message", "files", "needs"}


@dataclass(frozen=True)
class Patch:
    """A diff against upstream's own files."""

    path: Path
    subject: str
    message: str
    """The description, without the subject and the trailers."""
    trailers: dict[str, str]
    diffs: tuple[FileDiff, ...]

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def diff(self) -> str:
        return "".join(map(str, self.diffs))

    @property
    def files(self) -> list[str]:
        """The upstream files that the diff changes, relative to the tree."""
        return [file.path for file in self.diffs]

    @property
    def added(self) -> list[str]:
        """The lines that the diff adds."""
        hunks = [hunk for file in self.diffs for hunk in file.hunks]
        return [line[1:] for hunk in hunks for line in hunk.lines if line[0] == "+"]


@dataclass(frozen=True)
class Commit:
    """An entry of patches/series.toml: a commit of the exported series."""

    series: str
    patch: str | None
    """The name of its patch without `.patch`; None for new files alone."""
    subject: str
    message: str
    patterns: tuple[str, ...]
    """The new modules and tests that it adds, as shell patterns."""
    needs: tuple[str, ...]
    """The patches without which its own does not apply or does not work."""

    @property
    def path(self) -> Path:
        return ROOT / "patches" / self.series / f"{self.patch}.patch"

    def read(self, version: str | None = None) -> Patch:
        """Its patch, as it is for the release `version`."""
        patch = read_patch(self.path)
        override = override_path(self.path, version) if version else None
        return overridden(patch, override) if override and override.exists() else patch


def commits() -> list[Commit]:
    """The entries of patches/series.toml, in their order."""
    found: list[Commit] = []
    for series, entries in _listing().items():
        for entry in entries if series != "stay" else ():
            name = entry.get("patch") or entry.get("subject") or "an entry"
            if unknown := sorted(entry.keys() - FIELDS):
                raise BuildError(
                    f"patches/series.toml, {name}: unknown {', '.join(unknown)}; use "
                    f"{', '.join(sorted(FIELDS))}."
                )
            if ("patch" in entry) == ("subject" in entry):
                raise BuildError(
                    f"patches/series.toml, {name}: give it a patch, or a subject and a "
                    "message for a commit of new files."
                )
            before = [commit.patch for commit in found]
            if entry.get("patch") in before and "patch" in entry:
                raise BuildError(f"patches/series.toml names {name} twice: keep one.")
            for need in entry.get("needs", ()):
                if need not in before:
                    raise BuildError(
                        f"patches/series.toml, {name}: it needs {need}, which is no "
                        "patch before it."
                    )
            found.append(
                Commit(
                    series,
                    entry.get("patch"),
                    entry.get("subject", ""),
                    entry.get("message", ""),
                    tuple(entry.get("files", ())),
                    tuple(entry.get("needs", ())),
                )
            )
    return found


def staying() -> list[str]:
    """Patterns of the tests that are exported with neither series."""
    return _listing().get("stay", [])


def _listing() -> dict[str, list[Any]]:
    path = ROOT / "patches" / "series.toml"
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise BuildError("patches/series.toml is missing: restore it.") from None
    except tomllib.TOMLDecodeError as error:
        raise BuildError(f"patches/series.toml does not read: {error}.") from None


def series(version: str | None = None) -> list[Patch]:
    """The patches in their order, as they are for the release `version`.

    Those that change nothing in this release are left out.
    """
    patches = [commit.read(version) for commit in commits() if commit.patch]
    return [patch for patch in patches if patch.diffs]


def needed(commit: Commit) -> list[Commit]:
    """The commits that the patch of `commit` needs, in their order."""
    every = commits()
    wanted, pending = set(), list(commit.needs)
    while pending:
        name = pending.pop()
        wanted.add(name)
        pending += [n for other in every if other.patch == name for n in other.needs]
    return [other for other in every if other.patch in wanted]


def read_patch(path: Path) -> Patch:
    """Read a patch and its header; see docs/contributing/patches.md."""
    name = path.relative_to(ROOT).as_posix()
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise BuildError(
            f"{name} is named in patches/series.toml and does not exist: add the patch "
            "or take its entry out of patches/series.toml."
        ) from None
    header, _, diff = text.partition("\n---\n")
    subject, _, body = header.partition("\n\n")
    found = re.fullmatch(r"Subject: \[PATCH\] (\S.*)", subject)
    if not found or not diff:
        raise BuildError(
            f"{name} must begin with the line 'Subject: [PATCH] <area>: <change>' and "
            "have a line '---' before its diff: see docs/contributing/patches.md."
        )
    message, *rest = re.split(rf"^({'|'.join(TRAILERS)}):", body, flags=re.MULTILINE)
    trailers = {
        key: " ".join(value.split())
        for key, value in zip(rest[::2], rest[1::2], strict=True)
    }
    missing = [key for key in TRAILERS if not trailers.get(key)]
    if missing or not message.strip():
        wanted = ", ".join(f"'{key}:'" for key in missing) or "its description"
        raise BuildError(
            f"{name} lacks {wanted} in its header: see docs/contributing/patches.md."
        )
    return Patch(path, found[1], message.strip(), trailers, _parse(name, diff))


def override_path(patch: Path, version: str) -> Path:
    """Where the diffs of a patch for one release are."""
    return patch.parent / version / f"{patch.stem}.diff"


def overridden(patch: Patch, path: Path) -> Patch:
    """The patch with the diffs of an override in the place of its own.

    An override has, before its diffs, comments and lines `Without: <file>`, which
    name files that are not changed in this release.
    """
    name = path.relative_to(ROOT).as_posix()
    text = path.read_bytes().decode()
    head, mark, _ = text.partition("diff --git ")
    without = []
    for line in head.splitlines():
        if found := re.fullmatch(r"Without: (\S+)", line):
            without.append(found[1])
        elif line.strip() and not line.startswith("#"):
            raise BuildError(
                f"{name} begins with «{line}»: before its diffs an override has only "
                "comments and lines 'Without: <file>'; the header is the patch's."
            )
    files = {file.path: file for file in patch.diffs}
    if lost := [file for file in without if file not in files]:
        raise BuildError(
            f"{name} is 'Without: {lost[0]}', which {patch.name} does not change."
        )
    own = override_files(path) if mark else {}
    kept = {path: file for path, file in files.items() if path not in without}
    return replace(patch, diffs=tuple((kept | own).values()))


def override_files(path: Path) -> dict[str, FileDiff]:
    """The diffs in an override, by the file that they change."""
    name = path.relative_to(ROOT).as_posix()
    return {file.path: file for file in _parse(name, path.read_text())}


def _parse(name: str, diff: str) -> tuple[FileDiff, ...]:
    created = re.findall(r"^(?:--- /dev/null|\+\+\+ /dev/null|rename )", diff, re.M)
    try:
        files = () if created else diffs.parse(diff)
    except ValueError as error:
        raise BuildError(f"{name}: {error}.") from None
    if not files:
        raise BuildError(
            f"{name} must change existing files of vLLM and nothing else: a new module "
            "belongs into vllm/ of this repository."
        )
    return tuple(files)


def new_modules() -> list[str]:
    """The files this repository adds to vLLM, as paths relative to a tree."""
    return _files("vllm")


def own_package() -> list[str]:
    """The files of what is built on generic models, which lies beside `vllm/`."""
    return _files("vllm_generic")


def new_tests() -> list[str]:
    """The files in tests/ that could be vLLM's: those of this repository stay here."""
    folders = ("tools", "examples", "generic")
    docs = ("doc_blocks.py", "test_docs.py", "test_docs_run.py")
    stay = (*folders, *docs, "conftest.py", "test_modules.py")
    return [name for name in _files("tests") if name.split("/")[1] not in stay]


def matching(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of `names` that a pattern or a folder of `patterns` takes."""
    return [
        name
        for name in names
        if any(fnmatchcase(name, p) or name.startswith(f"{p}/") for p in patterns)
    ]


def _files(folder: str) -> list[str]:
    return sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and path.suffix != ".pyc"
        and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    )
