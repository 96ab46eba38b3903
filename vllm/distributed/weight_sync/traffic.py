# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How the blocks of a plan travel: read where they lie, or in buckets.

Sources and targets derive the same buckets from the same plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from vllm.distributed.weight_sync.manifest import Location, Manifest
from vllm.distributed.weight_sync.plan import Offsets, Piece, Plan
from vllm.model_executor.parameters.layout import view_of

ALIGNMENT = 64  # bytes
SLOTS = 2  # buckets in flight
Link = Literal["direct", "bucket", "network"]


@dataclass(frozen=True)
class Block:
    """A block of a source's tensor `shard`, and every piece that is a copy of it.

    `bucket` and `offset`, in bytes, say where it travels; a block that is read where
    it lies has none. `index` counts the blocks of the source.
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
        return view_of(tensor, self.start, self.sizes)

    def of_bucket(self, memory: torch.Tensor) -> torch.Tensor:
        """The block in a bucket's bytes, uint8 `[bytes]`."""
        flat = memory[self.offset : self.offset + self.nbytes].view(self.dtype)
        return flat.view(self.sizes)


def of_target(piece: Piece, tensor: torch.Tensor) -> torch.Tensor:
    """A piece, as a view of the target's local tensor."""
    return view_of(tensor, piece.target_start, piece.sizes)


@dataclass
class Outgoing:
    """Everything that one source sends in an update.

    Args:
        direct: Blocks that targets read in the source's own memory.
        buckets: The other ones, by bucket.
        network: Blocks for targets on other machines, by bucket.
        bucket_bytes: The size of the largest bucket.
        on_device: Whether buckets lie in the source's device memory.
        readers: The targets that read buckets.

    """

    direct: list[Block] = field(default_factory=list)
    buckets: list[list[Block]] = field(default_factory=list)
    network: list[list[Block]] = field(default_factory=list)
    bucket_bytes: int = 0
    on_device: bool = False
    readers: tuple[int, ...] = ()
    blocks: int = 0

    def has_pieces_for(self, target: int) -> bool:
        groups = (self.direct, *self.buckets, *self.network)
        return any(
            piece.target == target
            for blocks in groups
            for block in blocks
            for piece in block.pieces
        )

    def first_tick(self, update: int) -> int:
        """The count of `Progress` before an update, of 1 and later ones."""
        return (update - 1) * (1 + len(self.buckets))

    def slot(self, ring: torch.Tensor, number: int) -> torch.Tensor:
        """Where in the ring a bucket lies, uint8 `[bytes]`."""
        start = number % SLOTS * self.bucket_bytes
        return ring[start : start + self.bucket_bytes]


def link_between(source: Location, target: Location, same_dtype: bool) -> Link:
    """How a block comes from one rank to another."""
    if source.machine != target.machine:
        return "network"
    if source.process == target.process:
        return "direct"
    # A device's memory can be mapped by a process that can reach the device.
    if source.device in target.devices and source.device != "cpu":
        return "direct" if same_dtype else "bucket"
    return "bucket"


def outgoing(
    plan: Plan,
    sources: Sequence[Manifest],
    targets: Sequence[Manifest],
    bucket_bytes: int,
) -> list[Outgoing]:
    """What each source sends, in which order and in which buckets."""
    found: list[dict[tuple[object, ...], list[Piece]]] = [{} for _ in sources]
    for piece in plan.pieces():
        source = sources[piece.source]
        dtype = source.shards[piece.source_shard].layout.dtype
        link = link_between(
            source.location, targets[piece.target].location, dtype == piece.dtype
        )
        key = (link, piece.source_shard, piece.source_start, piece.sizes, piece.dtype)
        found[piece.source].setdefault(key, []).append(piece)
    return [
        _outgoing(blocks, source.location, targets, bucket_bytes)
        for blocks, source in zip(found, sources, strict=True)
    ]


def _outgoing(
    found: dict[tuple[object, ...], list[Piece]],
    source: Location,
    targets: Sequence[Manifest],
    bucket_bytes: int,
) -> Outgoing:
    by_link: dict[object, list[Block]] = {"direct": [], "bucket": [], "network": []}
    for (link, *_), pieces in found.items():
        first = pieces[0]
        by_link[link].append(
            Block(
                first.source_shard,
                first.source_start,
                first.sizes,
                first.dtype,
                tuple(pieces),
            )
        )
    result = Outgoing()
    for block in by_link["direct"]:
        result.direct.append(replace(block, index=result.blocks))
        result.blocks += 1
    result.buckets = _fill(by_link["bucket"], bucket_bytes, result)
    result.network = _fill(by_link["network"], bucket_bytes, result)
    readers = {p.target for b in by_link["bucket"] for p in b.pieces}
    result.readers = tuple(sorted(readers))
    result.on_device = source.device != "cpu" and all(
        source.device in targets[reader].location.devices for reader in readers
    )
    return result


def _fill(
    blocks: Iterable[Block], bucket_bytes: int, result: Outgoing
) -> list[list[Block]]:
    """`blocks` in order, each where it fits; larger ones are split along axis 0."""
    buckets: list[list[Block]] = []
    used = bucket_bytes  # of the last bucket
    for whole in blocks:
        for block in _split(whole, bucket_bytes):
            if used + block.nbytes > bucket_bytes:
                buckets.append([])
                used = 0
            bucket = len(buckets) - 1
            placed = replace(block, index=result.blocks, bucket=bucket, offset=used)
            buckets[-1].append(placed)
            result.blocks += 1
            used += -(-block.nbytes // ALIGNMENT) * ALIGNMENT
            result.bucket_bytes = max(result.bucket_bytes, used)
    return buckets


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
