# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`python -m tools refresh`: port the patches to a release, as far as that is certain.

A diff that does not fit is merged, three-way, from a release in which it fits; failing
that, it is placed by less context. What comes out is written with the least context
that is unique: into the patch if it fits every release, else into an override for this
one. A change whose place is a guess says so, and has to be read.
"""

import difflib
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from tools import ROOT, diffs, series
from tools.compose import read_sdist
from tools.diffs import FileDiff, Hunk
from tools.series import Commit, Patch
from tools.upstream import release, supported


@dataclass
class State:
    """The files of a release, as the patches so far have left them."""

    version: str
    contents: dict[str, bytes]
    changed: dict[str, list[str]] = field(default_factory=dict)

    def lines(self, path: str) -> list[str] | None:
        if path in self.changed:
            return self.changed[path]
        content = self.contents.get(path)
        return None if content is None else diffs.lines_of(content)

    def fits(self, file: FileDiff) -> bool:
        content = self.lines(file.path)
        return content is not None and file.fits(content)

    def apply(self, patch: Patch) -> None:
        """Take the diffs that fit."""
        for file in patch.diffs:
            content = self.lines(file.path)
            if content is not None and file.fits(content):
                self.changed[file.path] = file.apply(content)


@dataclass(frozen=True)
class Port:
    """A diff that was ported, and how."""

    old: FileDiff
    new: FileDiff
    how: str


def main(version: str) -> int:
    """Port what does not fit `version`; returns the number of diffs that remain."""
    order = sorted(supported(), key=lambda v: v != release().upstream)
    states = {v: State(v, _contents(v)) for v in order}
    remaining = 0
    for commit in series.commits():
        if commit.patch:
            failures = _refresh(commit, states, version)
            for failure in failures:
                print(f"FAIL  {failure}", flush=True)
            remaining += len(failures)
            for state in states.values():
                state.apply(commit.read(state.version))
    if not remaining:
        print(f"ok    every patch fits vLLM {version}: run `python -m tools check`")
    return remaining


def _contents(version: str) -> dict[str, bytes]:
    files = read_sdist(release(version))
    return {name: content for name, content in files if content is not None}


def _refresh(commit: Commit, states: dict[str, State], version: str) -> list[str]:
    """Port one patch; returns a line for each diff that could not be."""
    state, ports, failures = states[version], [], []
    patch = commit.read(version)
    for file in patch.diffs:
        if state.fits(file):
            content = state.lines(file.path) or []
            ports.append(Port(file, file.renumbered(content), "renumbered"))
            continue
        found = _port(file, commit, states, state)
        if isinstance(found, str):
            failures.append(f"{patch.name}: {found}")
        else:
            ports.append(found)
    _write(commit, ports, states, version)
    return failures


def _port(
    file: FileDiff, commit: Commit, states: dict[str, State], state: State
) -> Port | str:
    """The diff as this release needs it, or why there is none."""
    content = state.lines(file.path)
    if content is None:
        return _moved(file, state)
    for other in states.values():
        same = {f.path: f for f in commit.read(other.version).diffs}.get(file.path)
        if other is not state and same and other.fits(same):
            base = other.lines(file.path) or []
            merged = _merge(content, base, same.apply(base))
            if merged == content:
                return f"{file.path} has the change already: see its Drop-when."
            if merged is not None and _compiles(file.path, merged):
                new = diffs.make(file.path, content, merged)
                return Port(file, new, f"merged from vLLM {other.version}")
            placed = _place(same, content)
            if placed is not None and _compiles(file.path, placed):
                new = diffs.make(file.path, content, placed)
                return Port(file, new, "placed by less context: read it")
    for hunk in file.hunks:
        if len(places := hunk.places(content)) != 1:
            anchor = next((line for line in hunk.old if line not in content), "")
            about = f"«{anchor.strip()}» is gone" if anchor else f"{len(places)} places"
            return f"{file.path}, the hunk at line {hunk.start}: {about}. Port it."
    return f"{file.path}: the change conflicts with upstream's. Port it."


def _moved(file: FileDiff, state: State) -> Port | str:
    """The diff of a file that has another path in this release."""
    anchors = [max(hunk.old, key=len).encode() for hunk in file.hunks]
    candidates = [
        path
        for path, content in state.contents.items()
        if all(anchor in content for anchor in anchors)
        and state.fits(replace(file, path=path))
    ]
    if (
        len(candidates) > 1
    ):  # several such calls: take the one in a function of the name
        sections = [hunk.section.strip().encode() for hunk in file.hunks]
        candidates = [
            path
            for path in candidates
            if all(section in state.contents[path] for section in sections)
        ] or candidates
    if len(candidates) == 1:
        new = replace(file, path=candidates[0])
        content = state.lines(new.path) or []
        return Port(file, new.renumbered(content), "followed to where the code is")
    where = f"it fits {' and '.join(candidates)}" if candidates else "it fits no other"
    return f"vLLM {state.version} has no {file.path}, and {where}. Port it."


def _merge(
    ours: Sequence[str], base: Sequence[str], theirs: Sequence[str]
) -> list[str] | None:
    """A three-way merge, None where it conflicts."""
    with tempfile.TemporaryDirectory(prefix="vllm-generic-") as folder:
        paths = [Path(folder) / name for name in ("ours", "base", "theirs")]
        for path, lines in zip(paths, (ours, base, theirs), strict=True):
            path.write_bytes("".join(f"{line}\n" for line in lines).encode())
        result = subprocess.run(
            ["git", "merge-file", "--stdout", "--quiet", *map(str, paths)],
            capture_output=True,
        )
    return diffs.lines_of(result.stdout) if result.returncode == 0 else None


def _place(file: FileDiff, content: Sequence[str]) -> list[str] | None:
    """Apply hunks whose context upstream changed, None where the place is vague.

    The lines that a hunk removes have to be there, maybe at another indentation. Its
    context may have changed a little, and what is furthest from the change, altogether.
    """
    result = list(content)
    for hunk in file.hunks:
        signs = [line[0] == " " for line in hunk.lines]
        above, below = signs.index(False), signs[::-1].index(False)
        trims = sorted(
            ((a, b) for a in range(above + 1) for b in range(below + 1)), key=sum
        )
        for shift, (top, bottom) in product((0, -4, 4, -8, 8), trims):
            lines = hunk.lines[top : len(hunk.lines) - bottom]
            less = Hunk(hunk.start, "", tuple(_indented(line, shift) for line in lines))
            spots = [at for at in range(len(result)) if _is_like(less, result, at)]
            if len(spots) == 1:
                old = iter(result[spots[0] : spots[0] + len(less.old)])
                new = []
                for line in less.lines:
                    there = next(old) if line[0] != "+" else ""
                    if line[0] != "-":
                        new.append(there if line[0] == " " else line[1:])
                result[spots[0] : spots[0] + len(less.old)] = new
                break
        else:
            return None
    return result


def _indented(line: str, shift: int) -> str:
    """A line of a diff with `shift` more spaces, where it has as many to lose."""
    text = line[1:]
    if shift > 0 and text:
        return line[0] + " " * shift + text
    return line[0] + (text[-shift:] if text[:-shift].isspace() else text)


def _is_like(hunk: Hunk, content: Sequence[str], at: int) -> bool:
    there = content[at : at + len(hunk.old)]
    wanted = [line for line in hunk.lines if line[0] != "+"]
    if len(there) != len(wanted):
        return False
    pairs = list(zip(wanted, there, strict=True))
    if not any(line[1:] == text and len(text.strip()) > 8 for line, text in pairs):
        return False
    return all(
        line[1:] == text or (line[0] == " " and _similar(line[1:], text))
        for line, text in pairs
    )


def _similar(one: str, other: str) -> bool:
    matcher = difflib.SequenceMatcher(None, one.strip(), other.strip())
    return matcher.quick_ratio() > 0.7 and matcher.ratio() > 0.7


def _compiles(path: str, lines: Sequence[str]) -> bool:
    try:
        compile("\n".join(lines), path, "exec", dont_inherit=True)
    except SyntaxError:
        return not path.endswith(".py")
    return True


def _write(
    commit: Commit, ports: list[Port], states: dict[str, State], version: str
) -> None:
    """Write each diff where it belongs: into the patch, or into an override."""
    shared = commit.read()
    path = series.override_path(commit.path, version)
    main = {file.path: file for file in shared.diffs}
    own = series.override_files(path) if path.exists() else {}
    before = (dict(main), dict(own))
    without = []
    for port in ports:
        renumbered = port.how == "renumbered"
        if port.old.path in own:
            own[port.new.path] = port.new
            where = path
        elif renumbered and version != release().upstream:
            continue  # the patch has the default release's numbers
        elif renumbered or _fits_all(port, commit, states, version):
            main[port.new.path] = port.new
            where = commit.path
        else:
            own[port.new.path] = port.new
            where = path
            if port.new.path != port.old.path:
                without.append(port.old.path)
        if str(port.new) != str(port.old):
            print(f"ok    {where.relative_to(ROOT)}: {port.new.path}, {port.how}")
    if main != before[0]:
        header = commit.path.read_text().partition("\n---\n")[0]
        commit.path.write_text(f"{header}\n---\n" + "".join(map(str, main.values())))
    if own != before[1]:
        head = path.read_text().partition("diff --git ")[0] if path.exists() else ""
        head += "".join(f"Without: {name}\n" for name in without)
        path.parent.mkdir(exist_ok=True)
        path.write_text(head + "".join(map(str, own.values())))


def _fits_all(
    port: Port, commit: Commit, states: dict[str, State], version: str
) -> bool:
    """Whether the ported diff does in every other release what the patch's does."""
    if port.new.path != port.old.path:
        return False
    for state in states.values():
        override = series.override_path(commit.path, state.version)
        if state.version == version or (
            override.exists() and port.new.path in series.override_files(override)
        ):
            continue
        content = state.lines(port.new.path)
        if content is None or not (
            port.new.fits(content)
            and port.old.fits(content)
            and port.new.apply(content) == port.old.apply(content)
        ):
            return False
    return True
