# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which tensors of a trainer's ranks and of an engine's ranks are the same.

A mixture of experts may have 20,000 tensors on each of 64 ranks. Ranks that have the
same names are looked at once, and what differs between ranks is kept in arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm.distributed.weight_sync.manifest import Shard
from vllm.model_executor.parameters.layout import Layout

LISTED = 8


@dataclass
class Names:
    """The names that some ranks of one side have, in the order of their shards.

    `shards` is the shard of each tensor of the model, int `[tensors]`, -1 if there is
    none. `match` finds it.
    """

    names: list[tuple[str, ...]]
    optional: list[bool]
    shards: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def number(self, shards: dict[int, int], tensors: int) -> None:
        """Note the shard of each tensor."""
        self.shards = np.full(tensors, -1, np.int64)
        self.shards[list(shards)] = list(shards.values())


@dataclass
class RankTensors:
    """What one rank holds: names, and the number of each shard's layout, `[shards]`."""

    names: Names
    layouts: np.ndarray

    @property
    def shard_of_tensor(self) -> np.ndarray:
        """By tensor of the model, the shard; -1 if the rank has none of it."""
        return self.names.shards

    def layout_of_tensor(self) -> np.ndarray:
        """By tensor of the model, the number of its layout, or -1."""
        shards = self.shard_of_tensor
        return np.where(shards < 0, -1, np.append(self.layouts, -1)[shards])


class Layouts:
    """Numbers for the layouts that ranks of either side have."""

    def __init__(self) -> None:
        self.layouts: list[Layout] = []
        self._numbers: dict[Layout, int] = {}
        self._by_id: dict[int, int] = {}  # hashing a layout is slow

    def of_ranks(self, lists: Sequence[list[Shard]]) -> list[RankTensors]:
        """What the ranks of one side hold, by their shards; some may share a list."""
        names_of: dict[tuple, Names] = {}
        known: dict[int, RankTensors] = {}
        for shards in lists:
            if id(shards) in known:
                continue
            names = [shard.names for shard in shards]
            optional = [shard.optional for shard in shards]
            key = (tuple(names), tuple(optional))
            if key not in names_of:
                names_of[key] = Names(names, optional)
            numbers = self._numbers_of(shards)
            known[id(shards)] = RankTensors(names_of[key], numbers)
        return [known[id(shards)] for shards in lists]

    def _numbers_of(self, shards: list[Shard]) -> np.ndarray:
        by_id = self._by_id
        for layout in {id(s.layout): s.layout for s in shards}.values():
            if id(layout) not in by_id:
                by_id[id(layout)] = self._number(layout)
        numbers = (by_id[id(shard.layout)] for shard in shards)
        return np.fromiter(numbers, np.int32, len(shards))

    def _number(self, layout: Layout) -> int:
        number = self._numbers.setdefault(layout, len(self.layouts))
        if number == len(self.layouts):
            self.layouts.append(layout)
        return number


@dataclass
class _Problems:
    """Names of tensors that differ between the two sides, by what is wrong."""

    missing: list[str] = field(default_factory=list)
    surplus: dict[str, None] = field(default_factory=dict)
    misshaped: list[str] = field(default_factory=list)
    untied: dict[str, None] = field(default_factory=dict)

    def require_none(self) -> None:
        problems: dict[str, Iterable[str]] = {
            "missing in the trainer": self.missing,
            "missing in the engine": self.surplus,
            "of another shape": self.misshaped,
            "tied in the engine and not in the trainer": self.untied,
        }
        found = "; ".join(
            f"{len(names)} {problem}: {', '.join(names[:LISTED])}"
            + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
            for problem, each in problems.items()
            if (names := list(each))
        )
        if found:
            raise ValueError(
                f"The trainer's and the engine's tensors differ: {found}. Give "
                "WeightSync the module that the registered callable builds."
            )


def match(
    sources: Sequence[RankTensors], targets: Sequence[RankTensors], layouts: Layouts
) -> list[str]:
    """Number the engine's tensors, in order, and find them on every rank.

    A tensor may have several names, if it is tied, and not the same on each rank. What
    an update may leave out and the trainer lacks gets no number.

    Returns:
        A name of each.

    Raises:
        ValueError: names or shapes differ between the two sides.

    """
    problems = _Problems()
    wanted = list({id(rank.names): rank.names for rank in targets}.values())
    held = list({id(rank.names): rank.names for rank in sources}.values())
    by_name: dict[str, int] = {}
    found: list[str] = []
    needed: list[bool] = []
    wanted_shards: list[dict[int, int]] = []  # by tensor
    for each in wanted:
        shards: dict[int, int] = {}
        for index, (names, optional) in enumerate(
            zip(each.names, each.optional, strict=True)
        ):
            tensor = next((by_name[n] for n in names if n in by_name), None)
            if tensor is None:
                tensor = len(found)
                found.append(names[0])
                needed.append(False)
            for name in names:
                by_name[name] = tensor
            needed[tensor] |= not optional
            shards[tensor] = index
        wanted_shards.append(shards)
    held_shards: list[dict[int, int]] = []
    for each in held:
        shards = {}
        for index, (names, optional) in enumerate(
            zip(each.names, each.optional, strict=True)
        ):
            known = [by_name[name] for name in names if name in by_name]
            if not known and not optional:
                problems.surplus[names[0]] = None
            for tensor in known:
                first = shards.setdefault(tensor, index)
                if first != index:  # two tensors here, and one in the engine
                    problems.untied[f"{each.names[first][0]} and {names[0]}"] = None
        held_shards.append(shards)
    kept = set().union(*held_shards)
    problems.missing = [
        name for i, name in enumerate(found) if needed[i] and i not in kept
    ]
    both = (*wanted, *held)
    for each, shards in zip(both, (*wanted_shards, *held_shards), strict=True):
        each.number(shards, len(found))
    problems.misshaped = _misshaped(found, sources, targets, layouts)
    problems.require_none()
    if len(kept) < len(found):
        order = sorted(kept)
        for each in both:
            each.shards = each.shards[order]
        found = [found[i] for i in order]
    return found


def _misshaped(
    names: list[str],
    sources: Sequence[RankTensors],
    targets: Sequence[RankTensors],
    layouts: Layouts,
) -> list[str]:
    """Names and shapes of tensors that have another shape on some rank."""
    shapes: dict[tuple[int, ...], int] = {}
    number = np.array(
        [
            *(
                shapes.setdefault(tuple(la.shape), len(shapes))
                for la in layouts.layouts
            ),
            -1,
        ]
    )
    every = list(shapes)
    first = np.full(len(names), -1)
    odd: set[int] = set()
    for rank in (*targets, *sources):
        here = number[rank.layout_of_tensor()]
        odd.update(
            np.flatnonzero((first >= 0) & (here >= 0) & (here != first)).tolist()
        )
        first = np.where(first < 0, here, first)
    problems = []
    for tensor in sorted(odd):
        found: dict[int, str] = {}
        for side, ranks in (("engine", targets), ("trainer", sources)):
            for rank in ranks:
                shape = int(number[rank.layout_of_tensor()[tensor]])
                if shape >= 0:
                    found.setdefault(shape, side)
        text = ", ".join(f"{list(every[s])} in the {side}" for s, side in found.items())
        problems.append(f"{names[tensor]} ({text})")
    return problems
