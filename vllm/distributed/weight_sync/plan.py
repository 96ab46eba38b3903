# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Who sends which block of which tensor to whom.

Every rank derives the same plan from the manifests of all ranks, so nothing has to be
agreed. Each target gets each of its elements once, so no plan moves fewer bytes.

A large model has many tensors and few ways in which they are divided. What goes where
is computed once for each of these ways. Which tensors of the two sides are the same is
found once for ranks that have the same names (`matching`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm.distributed.weight_sync.manifest import Location, Manifest
from vllm.distributed.weight_sync.matching import Layouts, match
from vllm.model_executor.parameters.layout import Layout

Offsets = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A block that one source rank sends to one target rank.

    Args:
        source: Index of the trainer's rank.
        target: Index of the engine's rank.
        source_shard: Index of the tensor in the source's manifest.
        target_shard: Index of the tensor in the target's manifest.
        source_start: Where the block begins in the source's local tensor.
        target_start: Where it begins in the target's.
        sizes: Its shape.
        dtype: That of the target, in which it is sent.

    """

    source: int
    target: int
    source_shard: int
    target_shard: int
    source_start: Offsets
    target_start: Offsets
    sizes: Offsets
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.sizes).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class _Part:
    """A block of the whole that goes to one target, and all ranks that have it."""

    target: int
    target_start: Offsets
    sizes: Offsets
    dtype: torch.dtype
    sources: tuple[tuple[int, Offsets], ...]


class _Route:
    """What goes where of all tensors that are divided in one way."""

    def __init__(self, parts: list[_Part]) -> None:
        self.parts = parts
        self.by_source: dict[int, list[_Part]] = {}
        for part in parts:
            for source in {rank for rank, _ in part.sources}:
                self.by_source.setdefault(source, []).append(part)


class Plan:
    """What moves in each update, from the ranks of a trainer to those of an engine.

    Raises:
        ValueError: a tensor is missing, surplus, or of another shape on one side.

    """

    def __init__(
        self, sources: Sequence[Manifest], targets: Sequence[Manifest]
    ) -> None:
        self._sources = [manifest.location for manifest in sources]
        self._targets = [manifest.location for manifest in targets]
        layouts = Layouts()
        held = layouts.of_ranks([manifest.shards for manifest in sources])
        wanted = layouts.of_ranks([manifest.shards for manifest in targets])
        names = match(held, wanted, layouts)
        self._held, self._wanted = held, wanted
        # By tensor, a row of the layouts on all ranks. Rows that are the same bytes are
        # divided in one way.
        rows = np.stack([rank.layout_of_tensor() for rank in (*held, *wanted)], axis=1)
        routes: dict[bytes, _Route] = {}
        self._routes: list[_Route] = []
        for name, row in zip(names, rows, strict=True):
            key = row.tobytes()
            if key not in routes:
                found = [None if i < 0 else layouts.layouts[i] for i in row]
                parts = self._parts_of(name, found[: len(held)], found[len(held) :])
                routes[key] = _Route(parts)
            self._routes.append(routes[key])

    def pieces(self, source: int | None = None) -> Iterator[Piece]:
        """All pieces, or those of one source, tensor by tensor.

        Ranks that hold the same take turns.
        """
        for turn, route in enumerate(self._routes):
            parts = route.parts
            if source is not None:
                parts = route.by_source.get(source, [])
            for part in parts:
                chosen, start = part.sources[(turn + part.target) % len(part.sources)]
                if source is not None and chosen != source:
                    continue
                yield Piece(
                    chosen,
                    part.target,
                    int(self._held[chosen].shard_of_tensor[turn]),
                    int(self._wanted[part.target].shard_of_tensor[turn]),
                    start,
                    part.target_start,
                    part.sizes,
                    part.dtype,
                )

    def nbytes(self) -> int:
        """How many bytes an update moves in all."""
        return sum(piece.nbytes for piece in self.pieces())

    def _parts_of(
        self,
        name: str,
        sources: list[Layout | None],
        targets: list[Layout | None],
    ) -> list[_Part]:
        """Which blocks each target gets of one tensor, and who has them.

        Args:
            name: The tensor's.
            sources: By trainer rank, how it lies there; None if it does not.
            targets: The same of engine ranks.

        Raises:
            ValueError: no trainer rank has some of its elements.

        """
        # By block of the whole: the ranks that hold it, and where.
        holders: dict[tuple[Offsets, Offsets], list[tuple[int, Offsets]]] = {}
        for rank, layout in enumerate(sources):
            for box in () if layout is None else layout.boxes:
                if box.numel():
                    ranks = holders.setdefault((box.whole, box.sizes), [])
                    ranks.append((rank, box.local))
        parts = []
        for target, layout in enumerate(targets):
            if layout is None:
                continue
            for box in layout.boxes:
                missing = [_Block(box.whole, box.sizes)] if box.numel() else []
                for (start, sizes), ranks in holders.items():
                    held, rest = _Block(start, sizes), []
                    for block in missing:
                        common = block.intersect(held)
                        if common is None:
                            rest.append(block)
                            continue
                        rest += block.without(common)
                        moved = _moved(common.start, box.whole, box.local)
                        nearest = tuple(
                            (rank, _moved(common.start, start, local))
                            for rank, local in self._nearest(ranks, target)
                        )
                        parts.append(
                            _Part(target, moved, common.sizes, layout.dtype, nearest)
                        )
                    missing = rest
                if missing:
                    raise ValueError(
                        f"No rank of the trainer has the elements of {name} "
                        f"from {list(missing[0].start)}, {list(missing[0].sizes)} of "
                        f"{list(layout.shape)}. Call WeightSync on every rank "
                        "that holds a part of the model."
                    )
        return parts

    def _nearest(
        self, ranks: list[tuple[int, Offsets]], target: int
    ) -> list[tuple[int, Offsets]]:
        """Those of `ranks` whose tensors are closest to the target's."""
        to = self._targets[target]
        distances = [_distance(self._sources[rank], to) for rank, _ in ranks]
        least = min(distances)
        return [r for r, d in zip(ranks, distances, strict=True) if d == least]


def _distance(a: Location, b: Location) -> int:
    """0 in one process, 1 on one device, 2 on one machine, 3 across machines."""
    if a.machine != b.machine:
        return 3
    if a.device != b.device:
        return 2
    return int(a.process != b.process)


@dataclass(frozen=True)
class _Block:
    start: Offsets
    sizes: Offsets

    def intersect(self, other: _Block) -> _Block | None:
        start, sizes = [], []
        for i, n, j, m in zip(
            self.start, self.sizes, other.start, other.sizes, strict=True
        ):
            low, high = max(i, j), min(i + n, j + m)
            if low >= high:
                return None
            start.append(low)
            sizes.append(high - low)
        return _Block(tuple(start), tuple(sizes))

    def without(self, inner: _Block) -> list[_Block]:
        """The parts of this block that are outside `inner`, a block within it."""
        left, start, sizes = [], list(self.start), list(self.sizes)
        for axis in range(len(start)):
            low, high = inner.start[axis], inner.start[axis] + inner.sizes[axis]
            for begin, end in ((start[axis], low), (high, start[axis] + sizes[axis])):
                if end > begin:
                    side_start, side_sizes = [*start], [*sizes]
                    side_start[axis], side_sizes[axis] = begin, end - begin
                    left.append(_Block(tuple(side_start), tuple(side_sizes)))
            start[axis], sizes[axis] = low, high - low
        return left


def _moved(at: Offsets, origin: Offsets, to: Offsets) -> Offsets:
    """`at`, seen from `origin`, in coordinates in which `origin` is `to`."""
    return tuple(a - o + t for a, o, t in zip(at, origin, to, strict=True))
