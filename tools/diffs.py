# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Unified diffs as data: what a hunk looks for, and where in a file that is."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@(.*)")


@dataclass(frozen=True)
class Hunk:
    """Lines of a file and what takes their place."""

    start: int
    """The line at which upstream's file has them, counted from 1."""
    section: str
    """What a header names behind the line numbers: the class or function around it."""
    lines: tuple[str, ...]
    """Lines of the diff, each with its sign: ' ', '-' or '+'."""

    @property
    def old(self) -> list[str]:
        """The lines that the file must have."""
        return [line[1:] for line in self.lines if line[0] != "+"]

    @property
    def new(self) -> list[str]:
        return [line[1:] for line in self.lines if line[0] != "-"]

    def places(self, content: Sequence[str]) -> list[int]:
        """Every place in a file where the hunk fits, as indices counted from 0."""
        old = self.old
        if not old:  # git takes it for an empty file only
            return [] if content else [0]
        last = len(content) - len(old)
        if self.lines[-1][0] != " ":  # without context below: only at the end
            candidates: Iterable[int] = [last] if last >= 0 else []
        elif self.start <= 1:  # git takes line 1 for the beginning of the file
            candidates = [0]
        else:
            candidates = range(last + 1)
        return [at for at in candidates if list(content[at : at + len(old)]) == old]


@dataclass(frozen=True)
class FileDiff:
    """The hunks of one file."""

    path: str
    hunks: tuple[Hunk, ...]

    def fits(self, content: Sequence[str]) -> bool:
        """Whether each hunk fits in one place and no other."""
        return all(len(hunk.places(content)) == 1 for hunk in self.hunks)

    def apply(self, content: Sequence[str]) -> list[str]:
        """The changed file; every hunk has to fit in exactly one place."""
        result, end = [], 0
        for hunk in self.hunks:
            (at,) = hunk.places(content)
            result += [*content[end:at], *hunk.new]
            end = at + len(hunk.old)
        return [*result, *content[end:]]

    def renumbered(self, content: Sequence[str]) -> "FileDiff":
        """The same hunks, with the line numbers that they have in `content`."""
        hunks = []
        for hunk in self.hunks:
            (at,) = hunk.places(content)
            start = at + 1 if hunk.old else 0
            hunks.append(Hunk(start, hunk.section, hunk.lines))
        return FileDiff(self.path, tuple(hunks))

    def __str__(self) -> str:
        text = f"diff --git a/{self.path} b/{self.path}\n"
        text += f"--- a/{self.path}\n+++ b/{self.path}\n"
        shift = 0
        for hunk in self.hunks:
            old, new = len(hunk.old), len(hunk.new)
            start = hunk.start + shift + (not old) - (not new)
            text += f"@@ -{hunk.start},{old} +{start},{new} @@{hunk.section}\n"
            text += "".join(f"{line}\n" for line in hunk.lines)
            shift += new - old
        return text


def lines_of(content: bytes) -> list[str]:
    """The lines of a file, without their ends."""
    text = content.decode()
    return text.removesuffix("\n").split("\n") if text else []


def parse(text: str) -> list[FileDiff]:
    """The files of a unified diff.

    Raises:
        ValueError: a hunk has other lines than its header counts.
    """
    files = []
    for part in re.split(r"^(?=diff --git )", text, flags=re.MULTILINE)[1:]:
        path = re.search(r"^--- a/([^\t\n]+)", part, flags=re.MULTILINE)
        if path is None:
            raise ValueError(f"«{part.partition(chr(10))[0]}» has no line '--- a/'")
        hunks = []
        for piece in re.split(r"^(?=@@ )", part, flags=re.MULTILINE)[1:]:
            head, *lines = piece.removesuffix("\n").split("\n")
            # an editor may have cut the space off an empty line of context
            lines = [line or " " for line in lines if not line.startswith("\\")]
            found = HUNK.fullmatch(head)
            if found is None or lines and {line[0] for line in lines} - set(" +-"):
                raise ValueError(f"«{head}» of {path[1]} is no hunk")
            hunk = Hunk(int(found[1]), found[5], tuple(lines))
            counts = [int(1 if n is None else n) for n in (found[2], found[4])]
            if counts != [len(hunk.old), len(hunk.new)]:
                raise ValueError(
                    f"«{head}» of {path[1]} is followed by {len(hunk.old)} lines of "
                    f"the old file and {len(hunk.new)} of the new"
                )
            hunks.append(hunk)
        files.append(FileDiff(path[1], tuple(hunks)))
    return files


def make(path: str, old: Sequence[str], new: Sequence[str]) -> FileDiff:
    """The diff with the least context with which each hunk fits in one place only.

    One line above and below a change is the least that git accepts.
    """
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    changes = [code for code in matcher.get_opcodes() if code[0] != "equal"]
    contexts = [1] * len(changes)
    while True:
        groups = _group(changes, contexts, len(old))
        hunks = [_hunk(old, new, changes, *group) for group in groups]
        vague = [i for i, hunk in enumerate(hunks) if len(hunk.places(old)) != 1]
        if not vague:
            return FileDiff(path, tuple(hunks))
        for i in vague:
            first, last, context = groups[i]
            if context > len(old):
                raise ValueError(f"no context of {path} makes a hunk unique")
            contexts[first : last + 1] = [context + 1] * (last + 1 - first)


def _group(
    changes: Sequence[tuple[str, int, int, int, int]],
    contexts: Sequence[int],
    length: int,
) -> list[tuple[int, int, int]]:
    """Changes whose context touches, as (first, last, lines of context)."""
    groups: list[tuple[int, int, int]] = []
    for i, (change, context) in enumerate(zip(changes, contexts, strict=True)):
        if groups:
            first, last, before = groups[-1]
            if changes[last][2] + before >= change[1] - context:
                groups[-1] = (first, i, max(before, context))
                continue
        groups.append((i, i, context))
    return groups


def _hunk(
    old: Sequence[str],
    new: Sequence[str],
    changes: Sequence[tuple[str, int, int, int, int]],
    first: int,
    last: int,
    context: int,
) -> Hunk:
    begin = max(0, changes[first][1] - context)
    lines, at = [], begin
    for _, old_start, old_end, new_start, new_end in changes[first : last + 1]:
        lines += [f" {line}" for line in old[at:old_start]]
        lines += [f"-{line}" for line in old[old_start:old_end]]
        lines += [f"+{line}" for line in new[new_start:new_end]]
        at = old_end
    lines += [f" {line}" for line in old[at : at + context]]
    section = next(
        (line for line in reversed(old[:begin]) if re.match(r"[A-Za-z_]", line)), ""
    )
    return Hunk(begin + 1 if old else 0, f" {section[:70]}".rstrip(), tuple(lines))
