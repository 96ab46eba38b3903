# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Text, such as names of tensors, from every rank of a group."""

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


def all_gather_text(text: str, group: ProcessGroup) -> list[str]:
    """Every rank's text, in the order of ranks. Nothing is pickled.

    Args:
        text: This rank's text.
        group: A group of CPU tensors, such as a `GroupCoordinator`'s `cpu_group`.

    """
    encoded = torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")
    length = torch.tensor([len(encoded)], device="cpu")
    lengths = [torch.empty_like(length) for _ in range(group.size())]
    dist.all_gather(lengths, length, group=group)
    padded = encoded.new_zeros(max(map(int, lengths)))
    padded[: len(encoded)] = encoded
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded, group=group)
    return [
        bytes(chunk[: int(size)].tolist()).decode()
        for chunk, size in zip(gathered, lengths, strict=True)
    ]
