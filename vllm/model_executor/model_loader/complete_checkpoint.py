# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The weight files of a trainer's checkpoint, if it has all of them."""

import json
import re
from pathlib import Path

# In the order in which vLLM's loader looks for them; it takes the first that matches.
SUFFIXES = (".safetensors", ".bin", ".pt")
# Where a checkpoint has its weights: in Transformers and Accelerate, verl, SkyRL.
FOLDERS = (
    ".",
    "huggingface",
    "actor/huggingface",
    "actor",
    "policy/huggingface",
    "policy",
)
# Names without a suffix that are certainly weights.
WEIGHTS = re.compile(r"(pytorch_)?model|model_state|consolidated|weights|state_dict")
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)")
# Files of trainers that are not a model's weights, and what to do with them.
OTHERS = {
    r"adapter_model\.(safetensors|bin)": (
        "has a LoRA adapter only, which vLLM takes by --lora-modules"
    ),
    r"model_world_size_\d+_rank_\d+\.pt": (
        "has FSDP shards, one for each rank: merge them by "
        "`python -m verl.model_merger merge`"
    ),
    r".*zero_pp_rank_.*\.pt|mp_rank_\d+_model_states\.pt": (
        "has DeepSpeed's shards: gather them by the zero_to_fp32.py beside them"
    ),
    r".*\.distcp": (
        "is a distributed checkpoint of PyTorch: convert it by "
        "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch`"
    ),
}
# The format's own limit, in bytes.
LONGEST_SAFETENSORS_HEADER = 100_000_000


class UnusableError(OSError):
    """A checkpoint is not complete, or its format is not one that vLLM loads."""


def complete_weights(checkpoint: Path) -> list[Path]:
    """The weight files of a checkpoint, all of one suffix, then their index.

    Raises:
        UnusableError: It has none, or not all of them.

    """
    for folder in (checkpoint / name for name in FOLDERS):
        for suffix in SUFFIXES:
            files = _index(folder, suffix) or _files(folder, suffix)
            for file in files:
                _check_size(file)
            if files:
                return files
    names = {path.name for path in checkpoint.rglob("*")}
    for pattern, reason in OTHERS.items():
        if any(re.fullmatch(pattern, name) for name in names):
            raise UnusableError(reason)
    raise UnusableError(
        "has no weights: expected model.safetensors, pytorch_model.bin, model.pt, or "
        "shards of one"
    )


def _index(folder: Path, suffix: str) -> list[Path]:
    """The files that an index lists, and it; nothing if there is none."""
    for index in sorted(folder.glob(f"*{suffix}.index.json")):
        try:
            names = {*map(str, json.loads(index.read_text())["weight_map"].values())}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UnusableError(f"has a broken {index.name} ({error!r})") from None
        for name in sorted(names):
            if Path(name).name != name or not (folder / name).is_file():
                raise UnusableError(f"lacks {name}, which {index.name} lists")
        return [*(folder / name for name in sorted(names)), index]
    return []


def _files(folder: Path, suffix: str) -> list[Path]:
    """One whole file, or all the shards of one."""
    stems = {path.stem: path for path in sorted(folder.glob(f"*{suffix}"))}
    whole = [path for stem, path in stems.items() if WEIGHTS.fullmatch(stem)]
    if whole:
        return whole[:1]
    shards = {stem: shard for stem in stems if (shard := SHARD.fullmatch(stem))}
    shards = {s: shard for s, shard in shards.items() if WEIGHTS.fullmatch(shard[1])}
    if shards:
        last = next(iter(shards.values()))
        if len(shards) < int(last[3]):
            raise UnusableError(
                f"has {len(shards)} of the {int(last[3])} shards of {last[1]}{suffix}"
            )
    return [stems[stem] for stem in shards]


def _check_size(file: Path) -> None:
    """Notice a file that a crash has cut. The rest is for the loader to notice."""
    size = file.stat().st_size
    if size == 0:
        raise UnusableError(f"has an empty {file.name}")
    if file.suffix != ".safetensors":
        return
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > LONGEST_SAFETENSORS_HEADER:
            return  # another format, so not cut
        try:
            header = json.loads(opened.read(length))
            tensors = [x for name, x in header.items() if name != "__metadata__"]
            end = max((tensor["data_offsets"][1] for tensor in tensors), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UnusableError(f"has a {file.name} with a broken header") from None
    if size != 8 + length + end:
        raise UnusableError(
            f"has a {file.name} of {size} bytes, which should be {8 + length + end}"
        )
