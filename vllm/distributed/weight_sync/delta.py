# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sends a block whole, or only those of its elements that have changed.

A source keeps the bits that it sent last, in the dtype that is served, and compares.
What a target then has is bit for bit what a whole block would have given it, which a
checksum over the whole block proves.

A changed block travels as the flat indices of the changed elements, int32
`[changed]`, and then their new values, `[changed]`, which begin at the next multiple of
8 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from vllm.distributed.weight_sync.blocks import (
    INTEGERS,
    Sums,
    checksum,
    chunks,
    copy_block,
    copy_part,
)
from vllm.distributed.weight_sync.traffic import Block

WHOLE = -1  # in the place of a count: all elements of the block travel
_MAX_INDEX = torch.iinfo(torch.int32).max


class Written(NamedTuple):
    """How many elements of a block travel, or `WHOLE`; and the sums of all of it."""

    changed: int
    sums: Sums


class Deltas:
    """What the engines have of each block of one source.

    From the first update on that sends only what changed, this keeps a copy of all
    that the source sends, in the dtype that is served and on the device of the buckets.
    """

    def __init__(self) -> None:
        self._bits: dict[int, torch.Tensor] = {}  # by index of the block; flat
        self._keeps = False
        self._compares = False
        self._update = 0  # of which the bits are

    def begin(self, update: int, committed: int, changed_only: bool) -> None:
        """Before the blocks of an update are written.

        Args:
            update: Its number.
            committed: That of the last update that all engines have committed.
            changed_only: Whether to send only what changed since, if that is known.

        """
        self._keeps |= changed_only
        self._compares = changed_only and self._update == committed > 0
        self._update = update if self._keeps else 0

    def write(self, block: Block, source: torch.Tensor, room: torch.Tensor) -> Written:
        """Write a block where it travels.

        Args:
            block: It has as many elements as `source`.
            source: The block in the source's tensor, of any dtype and strides.
            room: uint8 `[block.nbytes]`.

        """
        place = room.view(block.dtype).view(block.sizes)
        if not self._keeps:
            return Written(WHOLE, copy_block(place, source, values=True))
        sums = Sums(place)
        most = _most_changed(block) if self._compares else -1
        if block.index not in self._bits:
            self._bits[block.index] = place.new_empty(place.numel())
        sent = self._bits[block.index]
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        changed, start = 0, 0
        for to, part in chunks(place, source):
            sums.copy(to, part, values=True)
            new = to.view(-1)
            old = sent[start : start + len(new)]
            if changed <= most:
                indices, values = _bring_up_to_date(old, new)
                changed += len(indices)
                found.append(((indices + start).int(), values))
            else:
                copy_part(old, new)
            start += len(new)
        if changed > most:
            return Written(WHOLE, sums)
        if changed:
            to_indices, to_values = _split(block, room, changed)
            torch.cat([indices for indices, _ in found], out=to_indices)
            torch.cat([values for _, values in found], out=to_values)
        return Written(changed, sums)


def _bring_up_to_date(
    old: torch.Tensor, new: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the flat `old` the bits of `new`; which indices changed, and their values.

    Where few change, most words of 8 bytes stay, and need one comparison each.
    """
    items = 8 // new.itemsize  # in a word
    bits = INTEGERS[new.itemsize]
    starts = (len(new), new.storage_offset(), old.storage_offset())
    if any(start % items for start in starts):
        indices = _where_different(new.view(bits), old.view(bits))
        values = new[indices]
        old[indices] = values
        return indices, values
    new_words, old_words = new.view(torch.int64), old.view(torch.int64)
    words = _where_different(new_words, old_words)
    after, before = new_words.index_select(0, words), old_words.index_select(0, words)
    old_words.scatter_(0, words, after)
    places = _where_different(after.view(bits), before.view(bits))
    word = places >> (items.bit_length() - 1)
    indices = words.index_select(0, word).mul_(items).add_(places & (items - 1))
    return indices, after.view(new.dtype).index_select(0, places)


def _where_different(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Indices, int64, at which two flat tensors of integers differ."""
    if a.device.type == "cpu":  # NumPy's takes less than half of the time
        return torch.from_numpy(np.flatnonzero(a.numpy() != b.numpy()))
    return (a != b).nonzero().flatten()


def nbytes_of(block: Block, changed: int) -> int:
    """How many bytes of a block travel."""
    if changed == WHOLE:
        return block.nbytes
    return _start_of_values(changed) + changed * block.dtype.itemsize


def read_block(
    block: Block, room: torch.Tensor, changed: int, place: torch.Tensor
) -> torch.Tensor:
    """Bring `place` up to date, and return the checksum of all of it.

    Args:
        block: What travelled.
        room: Its bytes, uint8 `[nbytes_of(block, changed)]` or more.
        changed: How many elements travelled.
        place: The block in the target's tensor, which has the last update's values.

    """
    if changed == WHOLE:
        whole = room[: block.nbytes].view(block.dtype).view(block.sizes)
        return copy_block(place, whole).checksum()
    if changed > 0:
        indices, values = _split(block, room, changed)
        indices, values = indices.to(place.device), values.to(place.device)
        if place.is_contiguous():
            place.view(-1)[indices] = values
        else:
            place[torch.unravel_index(indices.long(), block.sizes)] = values
    return checksum(place)


def _split(
    block: Block, room: torch.Tensor, changed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    start = _start_of_values(changed)
    end = start + changed * block.dtype.itemsize
    indices = room[: 4 * changed].view(torch.int32)
    return indices, room[start:end].view(block.dtype)


def _start_of_values(changed: int) -> int:
    return -(-4 * changed // 8) * 8


def _most_changed(block: Block) -> int:
    """Up to how many changed elements are fewer bytes than the whole block."""
    if block.nbytes // block.dtype.itemsize > _MAX_INDEX:
        return -1
    return max(0, (block.nbytes - 8) // (4 + block.dtype.itemsize))
