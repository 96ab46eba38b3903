# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How the blocks of a plan travel: read where they lie, in buckets, or by network.

A source decides, and tells each target what to copy from where to where.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from vllm.distributed.weight_sync.manifest import Location, Manifest
from vllm.distributed.weight_sync.plan import Offsets, Piece, Plan
from vllm.model_executor.parameters.layout import view_of

ALIGNMENT = 64  # bytes
SLOTS = 2  # buckets in flight
# How a block travels; by network it is the number of the target.
DIRECT, BUCKETS = -1, -2


@dataclass(frozen=True)
class Block:
    """A block of a source's tensor `shard`, and every piece that is a copy of it.

    `bucket` and `offset`, in bytes, say where it travels; a block that is read where
    it lies has bucket -1. `index` counts the blocks of the source.
    """

    shard: int
    start: Offsets
    sizes: Offsets
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    index: int = 0
    bucket: int = -1
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return torch.Size(self.sizes).numel() * self.dtype.itemsize

    def of_source(self, tensor: torch.Tensor) -> torch.Tensor:
        """The block, as a view of the source's local tensor."""
        return view_of(tensor, self.start, self.sizes)

    def bytes_in(self, bucket: torch.Tensor) -> torch.Tensor:
        """The block's own part, uint8 `[nbytes]`, of a bucket's bytes."""
        return bucket[self.offset : self.offset + self.nbytes]


class Copy(NamedTuple):
    """What a target does with a block: from where to where it copies it.

    The fields are those of `Block`, and the shard and start in the target's tensors.
    """

    target_shard: int
    target_start: Offsets
    sizes: Offsets
    dtype: str
    shard: int
    start: Offsets
    block_index: int
    bucket: int
    offset: int

    @classmethod
    def from_json(cls, values: list[Any]) -> Copy:
        fields: Any = [tuple(v) if isinstance(v, list) else v for v in values]
        return cls(*fields)

    @property
    def block(self) -> Block:
        """The block that is copied."""
        dtype = getattr(torch, self.dtype)
        place = (self.block_index, self.bucket, self.offset)
        return Block(self.shard, self.start, self.sizes, dtype, (), *place)

    def of_source(self, tensor: torch.Tensor) -> torch.Tensor:
        """The block, as a view of the source's local tensor."""
        return view_of(tensor, self.start, self.sizes)

    def of_target(self, tensor: torch.Tensor) -> torch.Tensor:
        """The block, as a view of the target's local tensor."""
        return view_of(tensor, self.target_start, self.sizes)


@dataclass
class Ring:
    """The buckets of a source: how many an update fills, and how they are read.

    Args:
        buckets: How many buckets an update has.
        bucket_bytes: The size of the largest.
        readers: The targets that read them.
        blocks: How many blocks the source sends, in buckets or not.

    """

    buckets: int
    bucket_bytes: int
    readers: tuple[int, ...]
    blocks: int

    def first_tick(self, update: int) -> int:
        """The count of `Progress` before an update, of 1 and later ones."""
        return (update - 1) * (1 + self.buckets)

    def slot(self, memory: torch.Tensor, number: int) -> torch.Tensor:
        """Where a bucket lies, uint8 `[bytes]`."""
        start = number % SLOTS * self.bucket_bytes
        return memory[start : start + self.bucket_bytes]


class Outgoing:
    """Everything that one source sends in an update.

    Args:
        plan: Of all ranks.
        source: The rank's number.
        sources: The manifests of the trainer's ranks.
        targets: Those of the engine's ranks.
        limit: How many bytes a bucket may have, if no single row has more.
        shared: Which of the source's shards lie in shared memory of a CPU.
        network: Whether even processes of one machine use the network.

    `direct` are the blocks that targets read in the source's own memory, `buckets`
    those for other targets of the machine, and `links`, by target, those that the
    network carries. `on_device` says whether `buckets` lie in the source's device.
    """

    def __init__(
        self,
        plan: Plan,
        source: int,
        sources: Sequence[Manifest],
        targets: Sequence[Manifest],
        limit: int,
        shared: Collection[int] = (),
        network: bool = False,
    ) -> None:
        here = sources[source].location
        shards = sources[source].shards
        found: dict[tuple[Any, ...], list[Piece]] = {}
        for piece in plan.pieces(source):
            there = targets[piece.target].location
            far = here.machine != there.machine
            far |= network and here.process != there.process
            direct = not far and is_read_directly(
                here,
                there,
                same_dtype=shards[piece.source_shard].layout.dtype == piece.dtype,
                shared=piece.source_shard in shared,
            )
            way = DIRECT if direct else piece.target if far else BUCKETS
            key = (way, piece.source_shard, piece.source_start, piece.sizes)
            found.setdefault((*key, piece.dtype), []).append(piece)
        by_way: dict[int, list[Block]] = {DIRECT: [], BUCKETS: []}
        for (way, *_), pieces in found.items():
            first = pieces[0]
            block = Block(
                first.source_shard,
                first.source_start,
                first.sizes,
                first.dtype,
                tuple(pieces),
            )
            by_way.setdefault(way, []).append(block)
        direct_blocks, others = by_way.pop(DIRECT), by_way.pop(BUCKETS)
        self.direct = [replace(b, index=i) for i, b in enumerate(direct_blocks)]
        self.buckets = _fill(others, limit, len(self.direct))
        readers = {piece.target for block in others for piece in block.pieces}
        self.on_device = here.device != "cpu" and all(
            here.device in targets[reader].location.devices for reader in readers
        )
        bucketed = [block for bucket in self.buckets for block in bucket]
        self.ring = Ring(
            len(self.buckets),
            max((aligned(b.offset + b.nbytes) for b in bucketed), default=0),
            tuple(sorted(readers)),
            len(self.direct) + len(bucketed),
        )
        self.links: dict[int, list[list[Block]]] = {}
        index = self.ring.blocks
        for target in sorted(by_way):
            self.links[target] = _fill(by_way[target], limit, index)
            index += sum(map(len, self.links[target]))
        self._copies: dict[int, list[Copy]] = {}
        for block in self.blocks():
            for piece in block.pieces:
                copy = Copy(
                    piece.target_shard,
                    piece.target_start,
                    piece.sizes,
                    str(piece.dtype).removeprefix("torch."),
                    block.shard,
                    block.start,
                    block.index,
                    block.bucket,
                    block.offset,
                )
                self._copies.setdefault(piece.target, []).append(copy)

    def blocks(self) -> Iterator[Block]:
        """All blocks, in the order of their indices."""
        yield from self.direct
        for buckets in (self.buckets, *self.links.values()):
            for bucket in buckets:
                yield from bucket

    def copies(self, target: int) -> list[Copy]:
        """What a target copies, in the order in which it is sent."""
        return self._copies.get(target, [])


def is_read_directly(
    source: Location, target: Location, same_dtype: bool, shared: bool
) -> bool:
    """Whether a target of this machine reads the source's tensor where it lies.

    Args:
        source: Where the tensor is.
        target: Who is to read it.
        same_dtype: Whether the target has the same dtype.
        shared: Whether the tensor lies in shared memory.

    """
    if source.process == target.process:
        return True
    if source.device == "cpu":
        return same_dtype and shared
    # A device's memory can be mapped by a process that can reach the device.
    return same_dtype and source.device in target.devices


def _fill(blocks: Iterable[Block], limit: int, index: int) -> list[list[Block]]:
    """`blocks` in order, each where it fits; larger ones are split along axis 0."""
    buckets: list[list[Block]] = []
    used = limit  # of the last bucket
    for whole in blocks:
        for block in _split(whole, limit):
            if used + block.nbytes > limit:
                buckets.append([])
                used = 0
            bucket = len(buckets) - 1
            buckets[-1].append(replace(block, index=index, bucket=bucket, offset=used))
            index += 1
            used += aligned(block.nbytes)
    return buckets


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _split(block: Block, limit: int) -> Iterable[Block]:
    if block.nbytes <= limit or not block.sizes:
        return [block]
    rows = max(1, limit * block.sizes[0] // block.nbytes)
    parts = []
    for first in range(0, block.sizes[0], rows):
        sizes = (min(rows, block.sizes[0] - first), *block.sizes[1:])
        parts.append(
            replace(
                block,
                start=(block.start[0] + first, *block.start[1:]),
                sizes=sizes,
                pieces=tuple(
                    replace(
                        piece,
                        source_start=(piece.source_start[0] + first,)
                        + piece.source_start[1:],
                        target_start=(piece.target_start[0] + first,)
                        + piece.target_start[1:],
                        sizes=sizes,
                    )
                    for piece in block.pieces
                ),
            )
        )
    return parts
