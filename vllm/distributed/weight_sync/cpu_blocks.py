# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Blocks on a CPU, read once: copied, summed, and looked at for what is not finite.

Each part is copied, and read again while it is in a cache. NumPy does it, in few calls
for a part. PyTorch's operators divide a part among threads that wait for each other at
its end, and for long where all cores are busy, as they are while both sides of an
update run on one machine.
"""

from __future__ import annotations

import numpy as np
import torch

WORD = 8  # bytes
PART = 1 << 20  # bytes; smaller ones take Python as long as the copy
# The bits of positive infinity.
INFINITY = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F80_0000,
    torch.float64: 0x7FF0_0000_0000_0000,
}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def can_read(block: torch.Tensor, look: bool) -> bool:
    """Whether `read` takes it: contiguous words of 8 bytes on a CPU."""
    known = not look or not block.is_floating_point() or block.dtype in INFINITY
    return known and block.device.type == "cpu" and _has_words(block)


def can_copy(place: torch.Tensor, block: torch.Tensor, look: bool) -> bool:
    """Whether `read` copies it to `place`, of the same shape, and of any dtype."""
    on_cpu = block.device.type == "cpu" and block.is_contiguous()
    return on_cpu and can_read(place, look)


def read(
    block: torch.Tensor, place: torch.Tensor | None = None, look: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The checksum of a block, and whether it is finite; also copies it.

    Args:
        block: A tensor that `can_read`.
        place: Where it is copied to, if it `can_copy`. What is summed is the copy.
        look: Look at the values, if they are floating-point numbers.

    Returns:
        The sum of its words as integers, int64 `[]`, and 0 or NaN, float32 `[]`.

    """
    whole = block if place is None else place
    source, target = block.detach().view(-1), whole.detach().view(-1)
    words, numbers = integers(target, torch.int64), integers(target)
    is_cast = source.dtype != target.dtype
    from_numbers = numbers if is_cast else integers(source)
    looks = look and whole.is_floating_point()
    items = WORD // whole.itemsize
    starts = range(0, len(words), PART // WORD)
    sums = np.empty(len(starts), np.int64)
    finite = True
    for index, start in enumerate(starts):
        end = start + PART // WORD
        part = slice(start * items, end * items)
        if is_cast:
            target[part].copy_(source[part])
        elif place is not None:
            np.copyto(numbers[part], from_numbers[part])
        sums[index] = words[start:end].sum()
        finite = finite and (not looks or is_finite(numbers[part], whole.dtype))
    bits = torch.tensor(sums.sum(), dtype=torch.int64)
    return bits, torch.tensor(0.0 if finite else float("nan"))


def is_finite(numbers: np.ndarray, dtype: torch.dtype) -> bool:
    """Whether no element is an infinity or NaN.

    Those are the largest bit patterns there are, of either sign. As signed integers the
    positive ones are the largest, and as unsigned ones the negative ones are.

    Args:
        numbers: The bits as signed integers, some.
        dtype: Of the elements, in `INFINITY`.

    """
    limit, size = INFINITY[dtype], numbers.dtype.itemsize
    sign = 1 << (8 * size - 1)
    unsigned = numbers.view(f"u{size}")
    return int(numbers.max()) < limit and int(unsigned.max()) < sign + limit


def _has_words(block: torch.Tensor) -> bool:
    words = block.dim() > 0 and block.shape[-1] * block.itemsize % WORD == 0
    aligned = block.storage_offset() * block.itemsize % WORD == 0
    return words and aligned and block.numel() > 0 and block.is_contiguous()


def integers(block: torch.Tensor, bits: torch.dtype | None = None) -> np.ndarray:
    """The bits of a tensor of a CPU as integers of its own or another size, a view."""
    return block.detach().view(bits or INTEGERS[block.itemsize]).numpy()
