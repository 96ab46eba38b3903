# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A block on a GPU, read once: copied, summed, and looked at for what is not finite.

PyTorch's operators read a block once for its copy, once for its checksum and once for
its values. An update moves as many bytes as the memory can, so each pass costs as much
as the copy does.
"""

from __future__ import annotations

import torch

from vllm.triton_utils import HAS_TRITON, tl, triton

WORD = 8  # bytes
BLOCK, PROGRAMS = 2048, 2048
NOT_A_NUMBER = 0x7FC0_0000  # the bits of a float32
# Exponents of the numbers in a word, all ones in an infinity and in what is no number:
# how far they are shifted to the start of each number, their bits there, and a one.
EXPONENTS = {
    torch.float16: (10, 0x001F_001F_001F_001F, 0x0001_0001_0001_0001),
    torch.bfloat16: (7, 0x00FF_00FF_00FF_00FF, 0x0001_0001_0001_0001),
    torch.float32: (23, 0x0000_00FF_0000_00FF, 0x0000_0001_0000_0001),
    torch.float64: (52, 0x0000_0000_0000_07FF, 0x0000_0000_0000_0001),
}


@triton.jit
def _read_kernel(  # type: ignore[no-untyped-def]
    source,  # int64 [words]
    target,  # int64 [words]
    found,  # int64 [2], zeros: the sum, and the bits of NaN if some are not finite
    words,
    COPIES: tl.constexpr,
    SHIFT: tl.constexpr,  # negative if the numbers are not looked at
    BITS: tl.constexpr,
    ONE: tl.constexpr,
    NOT_FINITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    odd = tl.zeros((BLOCK,), dtype=tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for begin in range(first, words, step):
        offsets = begin + tl.arange(0, BLOCK)
        inside = offsets < words
        values = tl.load(source + offsets, mask=inside, other=0)
        if COPIES:
            tl.store(target + offsets, values, mask=inside)
        total += values
        if SHIFT >= 0:  # one more than all ones is a bit that none had before
            odd |= ((values >> SHIFT) & BITS) + ONE
    tl.atomic_add(found, tl.sum(total, 0))
    if SHIFT >= 0:
        beyond = (odd & (BITS + ONE)) != 0
        if tl.max(beyond.to(tl.int32), 0) > 0:
            tl.store(found + 1, NOT_FINITE)


def can_read(block: torch.Tensor) -> bool:
    """Whether `read` takes it: contiguous words of 8 bytes on a GPU."""
    return HAS_TRITON and block.is_cuda and _has_words(block)


def can_copy(place: torch.Tensor, block: torch.Tensor) -> bool:
    """Whether `read` copies it: within one GPU, with the same dtype."""
    same = place.device == block.device and place.dtype == block.dtype
    return same and can_read(block) and _has_words(place)


def read(
    block: torch.Tensor, place: torch.Tensor | None = None, look: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The checksum of a block, and whether it is finite; also copies it to `place`.

    Args:
        block: A tensor that `can_read`.
        place: Of the same shape and dtype, a tensor that `can_copy`.
        look: Look at the values. Only of the dtypes in `EXPONENTS`.

    Returns:
        The sum of its words as integers, int64 `[]`, and 0 or NaN, float32 `[]`.

    """
    with torch.cuda.device_of(block):
        found = torch.zeros(2, dtype=torch.int64, device=block.device)
        words = block.nbytes // WORD
        shift, bits, one = EXPONENTS[block.dtype] if look else (-1, 0, 0)
        source = block.view(-1).view(torch.int64)
        target = source if place is None else place.view(-1).view(torch.int64)
        _read_kernel[(min(triton.cdiv(words, BLOCK), PROGRAMS),)](
            source,
            target,
            found,
            words,
            COPIES=place is not None,
            SHIFT=shift,
            BITS=bits,
            ONE=one,
            NOT_FINITE=NOT_A_NUMBER,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return found[0], found.view(torch.float32)[2]


def _has_words(block: torch.Tensor) -> bool:
    return (
        block.is_contiguous()
        and block.nbytes > 0
        and block.nbytes % WORD == 0
        and block.data_ptr() % WORD == 0
    )
