# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Copying blocks of tensors, and summing them in the same pass over memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from vllm.distributed.weight_sync import cpu_blocks, gpu_blocks
from vllm.distributed.weight_sync.cpu_blocks import INFINITY, INTEGERS, integers

CHUNK_BYTES = 1 << 20  # stays in a core's cache
TOGETHER_BYTES = 512 << 20  # from another GPU, before they are summed
AHEAD = 2  # so many groups of that size are started before an earlier one has come


class Sums:
    """The checksum and the sum of a block, collected part by part."""

    def __init__(self, block: torch.Tensor) -> None:
        self._words = _sums_words(block)
        self._bits: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def add(self, part: torch.Tensor, values: bool = True) -> None:
        """Add some of its elements; their values only if `total` is asked for."""
        look = values and part.is_floating_point()
        if self._words and cpu_blocks.can_read(part, look):
            self._add(*cpu_blocks.read(part, look=look))
        elif self._words and _on_gpu(part, look) and gpu_blocks.can_read(part):
            bits, totals = gpu_blocks.read([part], look=look)
            self._add(bits[0], totals[0])
        else:
            self._bits.append(_sum_bits(part, self._words))
            if look:
                self._values.append(_total(part))

    def copy(self, place: torch.Tensor, part: torch.Tensor, values: bool) -> None:
        """Copy some of its elements to `place`, and add these."""
        look = values and place.is_floating_point()
        if self._words and cpu_blocks.can_copy(place, part, look):
            self._add(*cpu_blocks.read(part, place, look))
        elif self._words and _on_gpu(place, look) and gpu_blocks.can_copy(place, part):
            bits, totals = gpu_blocks.read([part], [place], look)
            self._add(bits[0], totals[0])
        else:
            copy_part(place, part)
            self.add(place, values)

    def _add(self, bits: torch.Tensor, total: torch.Tensor) -> None:
        self._bits.append(bits)
        self._values.append(total)

    def checksum(self) -> torch.Tensor:
        """The sum of the block's bits as integers, int64 `[]`."""
        if len(self._bits) == 1:
            return self._bits[0]
        return torch.stack(self._bits).sum()

    def total(self) -> torch.Tensor:
        """A number that is finite if all elements are, float32 `[]`.

        If it is not, the elements may still be: their sum overflows.
        """
        if not self._values:
            return torch.zeros((), device=self._bits[0].device)
        if len(self._values) == 1:
            return self._values[0]
        return torch.stack(self._values).sum()


def sum_blocks(blocks: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The checksums of blocks of one device, and whether their elements are finite.

    Returns:
        The checksums, int64 `[blocks]`, and the totals of `Sums`, float32 `[blocks]`.

    """

    def kind(block: torch.Tensor) -> torch.dtype | None:
        """Blocks of one dtype are read together on a GPU, others one by one."""
        known = block.dtype in gpu_blocks.EXPONENTS or not block.is_floating_point()
        together = known and _sums_words(block) and gpu_blocks.can_read(block)
        return block.dtype if together else None

    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for dtype, indices in _grouped(map(kind, blocks)).items():
        if dtype is None:
            for index in indices:
                sums = sum_block(blocks[index])
                found[index] = sums.checksum(), sums.total()
            continue
        together = gpu_blocks.read(
            [blocks[index] for index in indices], look=dtype.is_floating_point
        )
        found.update(zip(indices, zip(*together, strict=True), strict=True))
    checksums, totals = zip(*(found[i] for i in range(len(blocks))), strict=True)
    return torch.stack(checksums), torch.stack(totals)


def copy_blocks(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Copy to each first tensor the second one; the checksums of what was copied.

    Returns:
        int64 `[pairs]`.

    """
    if any(_between_gpus(place, block) for place, block in pairs):
        return _copy_between_gpus(pairs)
    sums: dict[int, torch.Tensor] = {}
    together = [_sums_words(p) and gpu_blocks.can_copy(p, b) for p, b in pairs]
    for is_together, indices in _grouped(together).items():
        if not is_together:
            copied = (copy_block(*pairs[index]).checksum() for index in indices)
            sums.update(zip(indices, copied, strict=True))
            continue
        places, blocks = zip(*(pairs[index] for index in indices), strict=True)
        checksums, _ = gpu_blocks.read(blocks, places, look=False)
        sums.update(zip(indices, checksums, strict=True))
    return torch.stack([sums[index] for index in range(len(pairs))])


def _copy_between_gpus(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """As `copy_blocks`; some are summed while the next ones come.

    Making a tensor from a list would wait until all copies that were started have
    ended, and meanwhile none would be started. So nothing here does that. Only a few
    groups are started ahead, because streams share a device's queues: a step of the
    model could have to wait until all copies that were started have ended.
    """
    device = pairs[0][0].device
    copying, summing = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    sums, copied = [], []
    came: deque[torch.cuda.Event] = deque()
    for number, (place, block) in enumerate(pairs, 1):
        place.copy_(block)
        copied.append(place)
        if number < len(pairs) and sum(p.nbytes for p in copied) < TOGETHER_BYTES:
            continue
        summing.wait_stream(copying)
        with torch.cuda.stream(summing):
            sums.append(sum_blocks(copied)[0])
        copied = []
        came.append(torch.cuda.Event(blocking=True))
        came[-1].record(copying)
        if len(came) > AHEAD:
            came.popleft().synchronize()
    copying.wait_stream(summing)
    return torch.cat(sums)


def _between_gpus(place: torch.Tensor, block: torch.Tensor) -> bool:
    return place.is_cuda and block.is_cuda and place.device != block.device


def _grouped(keys: Iterable[Hashable]) -> dict[Any, list[int]]:
    """The indices of each key."""
    found: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        found.setdefault(key, []).append(index)
    return found


def copy_block(place: torch.Tensor, block: torch.Tensor, values: bool = False) -> Sums:
    """Copy a block, and return the sums of what was copied; its values' if asked."""
    sums = Sums(place)
    whole = cpu_blocks.can_copy(place, block, values)  # which has parts of its own
    for to, part in [(place, block)] if whole else chunks(place, block):
        sums.copy(to, part, values)
    return sums


def copy_part(to: torch.Tensor, part: torch.Tensor) -> None:
    """Copy all of `part`, of any dtype and device."""
    on_cpu = to.device.type == part.device.type == "cpu"
    if on_cpu and to.dtype == part.dtype:
        np.copyto(integers(to), integers(part))
    else:
        to.copy_(part)


def sum_block(block: torch.Tensor, values: bool = True) -> Sums:
    """The sums of all of a block."""
    sums = Sums(block)
    whole = cpu_blocks.can_read(block, values)
    for (part,) in [(block,)] if whole else chunks(block):
        sums.add(part, values)
    return sums


def checksum(block: torch.Tensor) -> torch.Tensor:
    """The sum of a block's bits as integers, int64 `[]`, in any order of its rows.

    Words of 8 bytes are summed where the last axis has whole ones: a sum costs as much
    for each number, whatever its size. So it depends on the shape, not on the strides.
    """
    return sum_block(block, values=False).checksum()


def chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of the same elements of tensors of one shape, in order.

    On a CPU they fit in a core's cache. Contiguous tensors are split as flat ones.
    """
    first = tensors[0]
    size = max(tensor.nbytes for tensor in tensors)
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    if not on_cpu or first.dim() == 0 or size <= CHUNK_BYTES:
        yield tensors
        return
    if all(tensor.is_contiguous() for tensor in tensors):
        tensors = tuple(tensor.view(-1) for tensor in tensors)
    rows = max(1, CHUNK_BYTES * len(tensors[0]) // size)
    rows = rows // 8 * 8 or rows  # whole words of 8 bytes, if the tensors are flat
    yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _sums_words(block: torch.Tensor) -> bool:
    """Whether its checksum is of words of 8 bytes, of which its last axis has some."""
    return block.dim() > 0 and block.shape[-1] * block.dtype.itemsize % 8 == 0


def _sum_bits(part: torch.Tensor, words: bool) -> torch.Tensor:
    size = part.dtype.itemsize
    bits = INTEGERS[size]
    if words:
        items = 8 // size  # in a word
        places = (part.storage_offset(), *part.stride()[:-1])
        if part.stride(-1) != 1 or any(place % items for place in places):
            part = part.clone(memory_format=torch.contiguous_format)
        bits = torch.int64
    if part.device.type == "cpu":
        return torch.tensor(integers(part, bits).sum(dtype=np.int64))
    return part.view(bits).sum(dtype=torch.int64)


def _total(part: torch.Tensor) -> torch.Tensor:
    """A number that is finite if all elements are, float32 `[]`."""
    if part.device.type == "cpu":
        if part.dtype in INFINITY and part.numel():
            finite = cpu_blocks.is_finite(integers(part), part.dtype)
        else:
            finite = bool(torch.isfinite(part).all())
        return torch.tensor(0.0 if finite else float("nan"))
    # A sum reads each element once, and makes no tensor of the same size.
    return part.sum().float()


def _on_gpu(part: torch.Tensor, look: bool) -> bool:
    return part.is_cuda and (not look or part.dtype in gpu_blocks.EXPONENTS)
