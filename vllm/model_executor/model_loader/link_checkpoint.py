# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Link the weights of a training run's newest checkpoint into the model directory.

    python -m vllm.model_executor.model_loader.link_checkpoint DIR

vLLM reads weights beside `config.json`; a trainer saves them by checkpoints in a
sub-directory. The links are relative, and those of an earlier checkpoint are replaced.
"""

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from vllm.model_executor.model_loader.weight_utils import (
    filter_files_not_needed_for_inference,
)

# In the order in which vLLM's loader looks for them; the first that has files counts.
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")


def link_checkpoint(
    directory: str | Path, checkpoint: str | Path | None = None, force: bool = False
) -> list[Path]:
    """Link a checkpoint's weight files, and their index, into `directory`.

    Args:
        directory: A model directory. Its checkpoints are the directories in it, or
            one level further down, that are named by their step, such as
            `checkpoints/checkpoint-10`.
        checkpoint: One of them, by name or path. Default: the newest, by the
            `global_step` of its `trainer_state.json`, else by the number in its name.
        force: Replace files in `directory` that are no links but have the name of one,
            and an index of such weights, which would hide the links.

    Returns:
        The links.

    Raises:
        FileNotFoundError: There is no such checkpoint, or it has no weights.
        FileExistsError: `directory` has such files and `force` is False, or weights of
            other names, which vLLM would read, too. Nothing was changed.

    """
    directory = Path(directory)
    source = _find_checkpoint(directory, checkpoint)
    files = _weights(source)
    if not files:
        raise FileNotFoundError(
            f"{source} has no weights: expected {', '.join(WEIGHT_FILES)}."
        )
    links = [directory / file.name for file in files]
    # What vLLM would read in the place of the links, or with them.
    kinds = WEIGHT_FILES[: WEIGHT_FILES.index(f"*{files[0].suffix}") + 1]
    own = [path for path in _files(directory, kinds) if not path.is_symlink()]
    beside = [p.name for p in own if p not in links and p.suffix != ".json"]
    if beside:
        raise FileExistsError(
            f"{directory} has weights of its own, which vLLM would read beside those "
            f"of {source.name}, or instead: {', '.join(beside)}. Move them away."
        )
    if own and not force:
        raise FileExistsError(
            f"{directory} has weights of its own, which are not links: "
            f"{', '.join(path.name for path in own)}. Move them away, or replace them "
            "with --force."
        )
    earlier = [path for path in _files(directory, WEIGHT_FILES) if path.is_symlink()]
    for path in (*own, *earlier):
        path.unlink()
    for link, file in zip(links, files, strict=True):
        link.symlink_to(os.path.relpath(file.resolve(), directory.resolve()))
    return links


def _find_checkpoint(directory: Path, name: str | Path | None) -> Path:
    folders = [*directory.glob("*/"), *directory.glob("*/*/")]
    steps = {path: step for path in folders if (step := _step(path)) is not None}
    if name is None:
        saved = [path for path in steps if _weights(path)]
        if not saved:
            raise FileNotFoundError(
                f"{directory} has no checkpoints: expected directories with weights, "
                "named by their step, such as checkpoints/checkpoint-10."
            )
        return max(saved, key=lambda path: (steps[path], path.name))
    named = [path for path in steps if path.name == str(name)]
    named += [path for path in (directory / name, Path(name)) if path.is_dir()]
    if not named:
        known = ", ".join(str(path.relative_to(directory)) for path in sorted(steps))
        raise FileNotFoundError(
            f"{directory} has no checkpoint {name}; it has {known or 'none'}."
        )
    return named[0]


def _step(checkpoint: Path) -> int | None:
    """How many steps the trainer had made; None of what is no checkpoint."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        return int(state["global_step"])
    except (FileNotFoundError, KeyError):
        number = re.search(r"(\d+)$", checkpoint.name)
        return int(number[1]) if number else None


def _weights(checkpoint: Path) -> list[Path]:
    """The weight files of a checkpoint, of one kind, then their index."""
    for kind in WEIGHT_FILES:
        files = _files(checkpoint, [kind])
        if files and files[0].suffix != ".json":
            return files
    return []


def _files(directory: Path, kinds: Sequence[str]) -> list[Path]:
    """The weight files of these kinds, then their indices."""
    paths = [path for kind in kinds for path in sorted(directory.glob(kind))]
    paths += [path for kind in kinds for path in directory.glob(f"{kind}.index.json")]
    return [*map(Path, filter_files_not_needed_for_inference(list(map(str, paths))))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="the model directory")
    parser.add_argument(
        "--checkpoint", help="name or path of a checkpoint (default: the newest)"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace files that are no links but have the names of new ones",
    )
    args = parser.parse_args()
    try:
        links = link_checkpoint(args.directory, args.checkpoint, args.force)
    except OSError as error:
        parser.error(str(error))
    for link in links:
        print(f"{link} -> {os.readlink(link)}")


if __name__ == "__main__":
    main()
