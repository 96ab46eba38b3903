# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Link the weights of a training run's newest checkpoint into the model directory.

    python -m vllm.entrypoints.link_checkpoint DIR

vLLM reads weights beside `config.json`, while a trainer saves each checkpoint in a
sub-directory. The command takes only complete checkpoints, with the file names that
Transformers, Accelerate, verl and SkyRL write. The links are relative, and replace
those of an earlier checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm.model_executor.model_loader.complete_checkpoint import (
    SUFFIXES,
    UnusableError,
    complete_weights,
)
from vllm.model_executor.model_loader.weight_utils import (
    filter_files_not_needed_for_inference,
)

STEP = re.compile(r"(?:.*[-_.=])?(?:checkpoint|ckpt|step|iter|iteration)[-_=]?(\d+)")
UNFINISHED = re.compile(
    r"\..*|(.*[-_.])?(tmp|temp|partial|incomplete|bak)([-_.\d].*)?", re.IGNORECASE
)
# Files that verl, Megatron and SkyRL write beside a checkpoint once it is whole.
TRACKERS = ("latest_checkpointed_iteration.txt", "latest_ckpt_global_step.txt")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's weight files and their index."""

    folder: Path
    files: list[Path]
    skipped: dict[Path, str] = field(default_factory=dict)
    """Why others, which may be newer, were not taken; by their paths."""


def find_checkpoint(
    directory: str | Path, name: str | Path | None = None
) -> Checkpoint:
    """The newest complete checkpoint of a model directory, or the one named.

    Raises:
        FileNotFoundError: There is none, or none that is complete. The message says
            what each lacks.

    """
    directory = Path(directory)
    if name is not None:
        folder = _named(directory, name)
        try:
            return Checkpoint(folder, complete_weights(folder))
        except UnusableError as error:
            raise FileNotFoundError(f"{folder} {error}.") from None
    steps: dict[Path, int] = {}
    skipped: dict[Path, str] = {}
    for folder in _folders(directory):
        try:
            step = _step(folder)
        except UnusableError as error:
            skipped[folder] = str(error)
        else:
            if step is not None:
                steps[folder] = step
    for file in (*directory.glob("*.ckpt"), *directory.glob("*/*.ckpt")):
        skipped[file] = "is Lightning's: save its state_dict as model.safetensors"
    for folder in sorted(steps, key=lambda folder: (-steps[folder], folder)):
        try:
            return Checkpoint(folder, complete_weights(folder), skipped)
        except UnusableError as error:
            skipped[folder] = str(error)
    if not skipped:
        raise FileNotFoundError(
            f"{directory} has no checkpoints: expected directories with weights, "
            "named by their step, such as checkpoints/checkpoint-10."
        )
    reasons = [f"{f.relative_to(directory)} {why}" for f, why in skipped.items()]
    raise FileNotFoundError(
        f"{directory} has no complete checkpoint: {'; '.join(reasons)}."
    )


def link_checkpoint(
    directory: str | Path, checkpoint: str | Path | None = None, force: bool = False
) -> list[Path]:
    """Link a checkpoint's weight files, and their index, into `directory`.

    Args:
        directory: A model directory. Its checkpoints are the directories in it, or
            one level further down, that are named by their step, such as
            `checkpoints/checkpoint-10`, or that have a `trainer_state.json`.
        checkpoint: One of them, by name or path. Default: the newest that is complete,
            by the `global_step` of its `trainer_state.json`, else by its name.
        force: Replace files in `directory` that are no links but have the name of one,
            and an index of such weights, which would hide the links.

    Returns:
        The links.

    Raises:
        FileNotFoundError: There is no such checkpoint, or none that is complete.
        FileExistsError: `directory` has such files and `force` is False, or weights of
            other names, which vLLM would read, too. Nothing was changed.

    """
    return _link(Path(directory), find_checkpoint(directory, checkpoint), force)


def _link(directory: Path, source: Checkpoint, force: bool) -> list[Path]:
    links = [directory / file.name for file in source.files]
    # Files that vLLM would read instead of the links, or in addition to them.
    suffixes = SUFFIXES[: SUFFIXES.index(source.files[0].suffix) + 1]
    own = [path for path in _read_by_vllm(directory, suffixes) if not path.is_symlink()]
    beside = [p.name for p in own if p not in links and p.suffix != ".json"]
    if beside:
        raise FileExistsError(
            f"{directory} has weights of its own, which vLLM would read beside those "
            f"of {source.folder.name}, or instead: {', '.join(beside)}. Move them away."
        )
    if own and not force:
        raise FileExistsError(
            f"{directory} has weights of its own, which are not links: "
            f"{', '.join(path.name for path in own)}. Move them away, or replace them "
            "with --force."
        )
    earlier = [path for path in _read_by_vllm(directory, SUFFIXES) if path.is_symlink()]
    for path in (*own, *earlier):
        path.unlink()
    for link, file in zip(links, source.files, strict=True):
        link.symlink_to(os.path.relpath(file.resolve(), directory.resolve()))
    return links


def _named(directory: Path, name: str | Path) -> Path:
    folders = _folders(directory)
    named = [path for path in folders if path.name == str(name)]
    named += [path for path in (directory / name, Path(name)) if path.is_dir()]
    if not named:
        known = ", ".join(
            str(path.relative_to(directory))
            for path in folders
            if STEP.fullmatch(path.name)
        )
        raise FileNotFoundError(
            f"{directory} has no checkpoint {name}; it has {known or 'none'}."
        )
    return named[0]


def _folders(directory: Path) -> list[Path]:
    """The folders that may be checkpoints; those inside of one are parts of it."""
    found: list[Path] = []
    for folder in sorted(path for path in directory.glob("*") if path.is_dir()):
        found.append(folder)
        if not STEP.fullmatch(folder.name) and not UNFINISHED.fullmatch(folder.name):
            found += sorted(path for path in folder.glob("*") if path.is_dir())
    return found


def _step(folder: Path) -> int | None:
    """How many steps the trainer had made; None of what is no checkpoint."""
    name = STEP.fullmatch(folder.name)
    if UNFINISHED.fullmatch(folder.name):
        digits = any(map(str.isdigit, folder.name))
        if digits or (folder / "trainer_state.json").exists():
            raise UnusableError("has the name of one that was not finished")
        return None
    for tracker in (folder.parent / file for file in TRACKERS):
        text = tracker.read_text(errors="replace") if tracker.exists() else ""
        if name and text.strip().isdigit() and int(text) < int(name[1]):
            raise UnusableError(f"is not finished: {tracker.name} says {text.strip()}")
    try:
        state = json.loads((folder / "trainer_state.json").read_text())
        return int(state["global_step"])
    except FileNotFoundError:
        return int(name[1]) if name else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnusableError(
            f"has a trainer_state.json without a global_step ({error})"
        ) from None


def _read_by_vllm(directory: Path, suffixes: Sequence[str]) -> list[Path]:
    """The weight files that vLLM reads from a model directory, then their indices."""
    paths = [path for s in suffixes for path in sorted(directory.glob(f"*{s}"))]
    paths += [path for s in suffixes for path in directory.glob(f"*{s}.index.json")]
    return [*map(Path, filter_files_not_needed_for_inference(list(map(str, paths))))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="the model directory")
    parser.add_argument(
        "--checkpoint",
        help="name or path of a checkpoint (default: the newest that is complete)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace files that are no links but have the names of new ones",
    )
    args = parser.parse_args()
    try:
        checkpoint = find_checkpoint(args.directory, args.checkpoint)
        links = _link(args.directory, checkpoint, args.force)
    except OSError as error:
        parser.error(str(error))
    for folder, reason in sorted(checkpoint.skipped.items()):
        print(f"skipped {folder}: it {reason}")
    for link in links:
        print(f"{link} -> {os.readlink(link)}")


if __name__ == "__main__":
    main()
