# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Who sends which block of which tensor to whom.

Every rank derives the same plan from the manifests of all ranks, so nothing has to be
agreed. Each target gets each of its elements once; the number of bytes that move is
thus the smallest there is.

A large model has many tensors and few ways in which they are divided. What goes where
is computed once for each of these ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from vllm.distributed.weight_sync.manifest import Location, Manifest, Shard
from vllm.model_executor.parameters.layout import Layout

LISTED = 8
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
    sources: tuple[tuple[int, Offsets], ...]


@dataclass
class _Tensor:
    """A tensor of the model: by rank, the shard there and its index in the manifest."""

    name: str
    sources: dict[int, tuple[int, Shard]] = field(default_factory=dict)
    targets: dict[int, tuple[int, Shard]] = field(default_factory=dict)


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
        self._tensors = _match(sources, targets)
        # By what divides a tensor on all ranks. Hashing a layout is slow: by its id.
        known: dict[Layout, int] = {}
        ids: dict[int, int] = {}
        routes: dict[object, _Route] = {}
        self._routes: list[_Route] = []
        for tensor in self._tensors:
            key = []
            for side in (tensor.sources, tensor.targets):
                for rank, (_, shard) in side.items():
                    layout = shard.layout
                    if id(layout) not in ids:
                        ids[id(layout)] = known.setdefault(layout, len(known))
                    key += [rank, ids[id(layout)]]
                key.append(-1)
            signature = tuple(key)
            if signature not in routes:
                routes[signature] = _Route(self._parts_of(tensor))
            self._routes.append(routes[signature])

    def pieces(self, source: int | None = None) -> Iterator[Piece]:
        """All pieces, or those of one source, tensor by tensor.

        Ranks that hold the same take turns.
        """
        for turn, (tensor, route) in enumerate(
            zip(self._tensors, self._routes, strict=True)
        ):
            parts = route.parts
            if source is not None:
                parts = route.by_source.get(source, [])
            for part in parts:
                chosen, start = part.sources[(turn + part.target) % len(part.sources)]
                if source is not None and chosen != source:
                    continue
                index, shard = tensor.targets[part.target]
                yield Piece(
                    chosen,
                    part.target,
                    tensor.sources[chosen][0],
                    index,
                    start,
                    part.target_start,
                    part.sizes,
                    shard.layout.dtype,
                )

    def nbytes(self) -> int:
        """How many bytes an update moves in all."""
        return sum(piece.nbytes for piece in self.pieces())

    def _parts_of(self, tensor: _Tensor) -> list[_Part]:
        """Which blocks each target gets of one tensor, and who has them.

        Raises:
            ValueError: no trainer rank has some of its elements.

        """
        # By block of the whole: the ranks that hold it, and where.
        holders: dict[tuple[Offsets, Offsets], list[tuple[int, Offsets]]] = {}
        for rank, (_, shard) in tensor.sources.items():
            for box in shard.layout.boxes:
                if box.numel():
                    ranks = holders.setdefault((box.whole, box.sizes), [])
                    ranks.append((rank, box.local))
        parts = []
        for target, (_, shard) in tensor.targets.items():
            for box in shard.layout.boxes:
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
                        parts.append(_Part(target, moved, common.sizes, nearest))
                    missing = rest
                if missing:
                    raise ValueError(
                        f"No rank of the trainer has the elements of {tensor.name} "
                        f"from {list(missing[0].start)}, {list(missing[0].sizes)} of "
                        f"{list(shard.layout.shape)}. Call WeightSync on every rank "
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
        """What is left of this block without `inner`, which lies in it."""
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


def _match(sources: Sequence[Manifest], targets: Sequence[Manifest]) -> list[_Tensor]:
    """The tensors of the engine in order, with the trainer's shards of the same name.

    A tensor may have several names, if it is tied, and not the same on each rank.

    Raises:
        ValueError: names or shapes differ between the two sides.

    """
    by_name: dict[str, _Tensor] = {}
    tensors: list[_Tensor] = []
    for rank, manifest in enumerate(targets):
        for index, shard in enumerate(manifest.shards):
            tensor = next((by_name[n] for n in shard.names if n in by_name), None)
            if tensor is None:
                tensor = _Tensor(shard.names[0])
                tensors.append(tensor)
            by_name.update(dict.fromkeys(shard.names, tensor))
            tensor.targets[rank] = (index, shard)
    surplus: dict[str, None] = {}
    untied: dict[str, None] = {}
    for rank, manifest in enumerate(sources):
        for index, shard in enumerate(manifest.shards):
            known = [by_name[name] for name in shard.names if name in by_name]
            if not known and not shard.optional:
                surplus[shard.names[0]] = None
            for tensor in known:
                held = tensor.sources.setdefault(rank, (index, shard))
                if held[0] != index:  # two tensors here, and one in the engine
                    untied[f"{held[1].names[0]} and {shard.names[0]}"] = None
    missing, misshaped = [], []
    for tensor in tensors:
        if not tensor.sources:
            if not all(shard.optional for _, shard in tensor.targets.values()):
                missing.append(tensor.name)
            continue
        shapes: dict[torch.Size, str] = {}
        for side, shards in (("engine", tensor.targets), ("trainer", tensor.sources)):
            for _, shard in shards.values():
                shapes.setdefault(shard.layout.shape, side)
        if len(shapes) > 1:
            found = ", ".join(f"{list(s)} in the {side}" for s, side in shapes.items())
            misshaped.append(f"{tensor.name} ({found})")
    problems = {
        "missing in the trainer": missing,
        "missing in the engine": list(surplus),
        "of another shape": misshaped,
        "tied in the engine and not in the trainer": list(untied),
    }
    found = "; ".join(
        f"{len(names)} {problem}: {', '.join(names[:LISTED])}"
        + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
        for problem, names in problems.items()
        if names
    )
    if found:
        raise ValueError(
            f"The trainer's and the engine's tensors differ: {found}. Give WeightSync "
            "the module that the registered callable builds."
        )
    return [tensor for tensor in tensors if tensor.sources]
