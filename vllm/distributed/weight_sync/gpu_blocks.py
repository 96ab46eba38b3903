# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Blocks on a GPU, read once: copied, summed, and looked at for what is not finite.

PyTorch's operators read a block once for its copy, once for its checksum and once for
its values. An update moves as many bytes as the memory can, so each pass costs as much
as the copy does. And one kernel takes all blocks, because hundreds of kernels take
longer to be started from Python than to run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm.triton_utils import HAS_TRITON, tl, triton

WORD = 8  # bytes
BLOCK, PROGRAMS = 2048, 2048
PART = 1 << 17  # words of a block that one program reads at a time
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
    table,  # int64 [parts, 4]: addresses of source and target, words, number of block
    found,  # int64 [blocks, 2], zeros: the sum, and the bits of NaN if not finite
    parts,
    COPIES: tl.constexpr,
    SHIFT: tl.constexpr,  # negative if the numbers are not looked at
    BITS: tl.constexpr,
    ONE: tl.constexpr,
    NOT_FINITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for part in range(tl.program_id(0), parts, tl.num_programs(0)):
        row = table + 4 * part
        source = tl.load(row).to(tl.pointer_type(tl.int64))
        target = tl.load(row + 1).to(tl.pointer_type(tl.int64))
        words = tl.load(row + 2)
        of_block = found + 2 * tl.load(row + 3)
        total = tl.zeros((BLOCK,), dtype=tl.int64)
        odd = tl.zeros((BLOCK,), dtype=tl.int64)
        for begin in range(0, words, BLOCK):
            offsets = begin + tl.arange(0, BLOCK)
            inside = offsets < words
            values = tl.load(source + offsets, mask=inside, other=0)
            if COPIES:
                tl.store(target + offsets, values, mask=inside)
            total += values
            if SHIFT >= 0:  # one more than all ones is a bit that none had before
                odd |= ((values >> SHIFT) & BITS) + ONE
        tl.atomic_add(of_block, tl.sum(total, 0))
        if SHIFT >= 0:
            beyond = (odd & (BITS + ONE)) != 0
            if tl.max(beyond.to(tl.int32), 0) > 0:
                tl.store(of_block + 1, NOT_FINITE)


def can_read(block: torch.Tensor) -> bool:
    """Whether `read` takes it: contiguous words of 8 bytes on a GPU."""
    return HAS_TRITON and block.is_cuda and _has_words(block)


def can_copy(place: torch.Tensor, block: torch.Tensor) -> bool:
    """Whether `read` copies it: within one GPU, with the same dtype."""
    same = place.device == block.device and place.dtype == block.dtype
    return same and can_read(block) and _has_words(place)


def read(
    blocks: Sequence[torch.Tensor],
    places: Sequence[torch.Tensor] | None = None,
    look: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The checksums of blocks, and whether they are finite; also copies them.

    Args:
        blocks: Tensors that `can_read`, of one device, and of one dtype if `look`.
        places: For each, a tensor of the same shape and dtype that `can_copy`.
        look: Look at the values. Only of the dtypes in `EXPONENTS`.

    Returns:
        The sums of their words as integers, int64 `[blocks]`, and 0 or NaN for each,
        float32 `[blocks]`.

    """
    with torch.cuda.device_of(blocks[0]):
        found = blocks[0].new_zeros((len(blocks), 2), dtype=torch.int64)
        table = _parts_of(blocks, blocks if places is None else places)
        shift, bits, one = EXPONENTS[blocks[0].dtype] if look else (-1, 0, 0)
        _read_kernel[(min(len(table), PROGRAMS),)](
            _to_device(table, found.device),
            found,
            len(table),
            COPIES=places is not None,
            SHIFT=shift,
            BITS=bits,
            ONE=one,
            NOT_FINITE=NOT_A_NUMBER,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return found[:, 0], found.view(torch.float32)[:, 2]


def _parts_of(
    blocks: Sequence[torch.Tensor], places: Sequence[torch.Tensor]
) -> np.ndarray:
    """The kernel's table: of each part its two addresses, its words, and its block."""
    words = np.array([block.nbytes // WORD for block in blocks])
    counts = -(-words // PART)
    number = np.repeat(np.arange(len(blocks)), counts)  # [parts]
    first = np.repeat(np.cumsum(counts) - counts, counts)  # part of the same block
    start = (np.arange(len(number)) - first) * PART
    addresses = [
        np.array([tensor.data_ptr() for tensor in tensors])[number] + WORD * start
        for tensors in (blocks, places)
    ]
    return np.stack([*addresses, np.minimum(words[number] - start, PART), number], 1)


def _to_device(table: np.ndarray, device: torch.device) -> torch.Tensor:
    """Without a wait for what the device does: from pageable memory it would be one."""
    there = torch.from_numpy(table)
    if device.type == "cuda":
        there = there.pin_memory()
    return there.to(device, non_blocking=True)


def _has_words(block: torch.Tensor) -> bool:
    return (
        block.is_contiguous()
        and block.nbytes > 0
        and block.nbytes % WORD == 0
        and block.data_ptr() % WORD == 0
    )
