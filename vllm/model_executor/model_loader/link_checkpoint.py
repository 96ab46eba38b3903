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
from pathlib import Path

from vllm.model_executor.model_loader.weight_utils import (
    filter_files_not_needed_for_inference,
)

# In the order in which vLLM's loader looks for them; the first that has files counts.
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")
INDEX_FILES = ("*.safetensors.index.json", "*.bin.index.json")


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
        force: Delete weight files in `directory` that are no links.

    Returns:
        The links.

    Raises:
        FileNotFoundError: There is no such checkpoint, or it has no weights.
        FileExistsError: `directory` has weight files that are no links.

    """
    directory = Path(directory)
    source = _find_checkpoint(directory, checkpoint)
    files = _weights(source)
    if not files:
        raise FileNotFoundError(
            f"{source} has no weights: expected {', '.join(WEIGHT_FILES)}."
        )
    # Any other weight file beside the new ones would be loaded with them.
    there = {path for pattern in WEIGHT_FILES for path in directory.glob(pattern)}
    there |= {path for pattern in INDEX_FILES for path in directory.glob(pattern)}
    there = set(map(Path, filter_files_not_needed_for_inference(list(map(str, there)))))
    real = sorted(path.name for path in there if not path.is_symlink())
    if real and not force:
        raise FileExistsError(
            f"{directory} has weights of its own, which are not links: "
            f"{', '.join(real)}. Move them away, or delete them with --force."
        )
    for path in there:
        path.unlink()
    links = [directory / file.name for file in files]
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
    """The weight files of a checkpoint, of one kind, and their index."""
    for pattern in WEIGHT_FILES:
        paths = sorted(map(str, checkpoint.glob(pattern)))
        if files := filter_files_not_needed_for_inference(paths):
            index = [path for p in INDEX_FILES for path in checkpoint.glob(p)]
            kind = pattern.removeprefix("*")
            return [*map(Path, files), *(p for p in index if f"{kind}." in p.name)]
    return []


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
        help="delete weight files in the directory that are no links",
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
