# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Folders of weights: written aside, then renamed, and all below one root."""

import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from vllm_generic.tink.errors import UserError

# kind in a path -> what the client calls it
KINDS = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


def tinker_path(run_id: str, kind: str, name: str) -> str:
    return f"tinker://{run_id}/{kind}/{name}"


def check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"the name {name!r} is not taken: expected 1 to 128 letters, digits, "
            "'.', '_' or '-', and no '.' or '-' first"
        )
    return name


def confined(root: Path, path: str | Path) -> Path:
    """``path``, which may be relative to root; UserError if it leads out of root."""
    resolved = (root / path).resolve()
    if not resolved.is_relative_to(root.resolve()):
        raise UserError(f"the path {str(path)!r} is outside {root}")
    return resolved


class Checkpoints:
    """The folders below ``root``: checkpoints, snapshots, ephemeral samplers."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.scratch = root / "scratch"
        # what a killed process left half-written
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)

    def named(self, run_id: str, kind: str, name: str) -> Path:
        return self.root / "checkpoints" / run_id / kind / name

    def snapshot(self, run_id: str, seq: int) -> Path:
        return self.root / "snapshots" / run_id / str(seq)

    def sampler(self, sampler_id: str) -> Path:
        return self.root / "samplers" / sampler_id

    def write(self, folder: Path, save: Callable[[Path], None]) -> int:
        """Let ``save`` fill a new folder and rename it to ``folder``. Answers its size.

        A reader sees the old folder or the new one, never a part.
        """
        scratch = self.scratch / uuid.uuid4().hex
        save(scratch)
        size = 0
        for file in scratch.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
            size += file.stat().st_size
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.remove(folder)
        os.rename(scratch, folder)
        return size

    def remove(self, folder: Path) -> None:
        """Delete a folder; it is gone under its name at once."""
        if folder.exists():
            trash = self.scratch / uuid.uuid4().hex
            os.rename(folder, trash)
            shutil.rmtree(trash)

    def remove_snapshots_but(self, run_id: str, seq: int) -> None:
        for folder in (self.root / "snapshots" / run_id).iterdir():
            if folder.name != str(seq):
                self.remove(folder)
