# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What one rank holds of a model, as data that ranks of other programs can read."""

from __future__ import annotations

import json
import os
import socket
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm.model_executor.parameters.layout import Box, Layout
from vllm.model_executor.parameters.names import ModuleNames, without_wrappers


@dataclass(frozen=True)
class Location:
    """Where a rank's tensors are: the machine, the process, and the device.

    `devices` are the identifiers of all devices that the process can reach.
    """

    machine: str
    process: int
    device: str
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Shard:
    """One rank's part of a tensor.

    Args:
        names: All names that the whole model has for it, in a fixed order.
        layout: The whole, and where this rank's part lies in it.
        optional: Whether an update may leave it out.

    """

    names: tuple[str, ...]
    layout: Layout
    optional: bool = False


@dataclass
class Manifest:
    """A rank's shards, in the order in which its module has them."""

    location: Location
    shards: list[Shard] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """A line of JSON, and compressed JSON of what other ranks may have, too.

        Layouts that many tensors share are written once.
        """
        # By what is fast to look up; the same layout may be several objects.
        by_id = {id(shard.layout): shard.layout for shard in self.shards}
        layouts: dict[Layout, int] = {}
        for layout in by_id.values():
            layouts.setdefault(layout, len(layouts))
        numbers = {key: layouts[layout] for key, layout in by_id.items()}
        content = {
            "layouts": [_layout_to_json(layout) for layout in layouts],
            "names": [shard.names for shard in self.shards],
            "numbers": [numbers[id(shard.layout)] for shard in self.shards],
            "optional": [i for i, shard in enumerate(self.shards) if shard.optional],
        }
        place = self.location
        location = [place.machine, place.process, place.device, place.devices]
        packed = zlib.compress(json.dumps(content).encode(), level=1)
        return json.dumps(location).encode() + b"\n" + packed

    @classmethod
    def from_bytes(
        cls, data: bytes, known: dict[bytes, list[Shard]] | None = None
    ) -> Manifest:
        """Read `to_bytes`.

        Args:
            data: One rank's.
            known: What was read before. Ranks that hold the same share the list.

        """
        location, _, packed = data.partition(b"\n")
        machine, process, device, devices = json.loads(location)
        shards = None if known is None else known.get(packed)
        if shards is None:
            shards = _shards_from_json(json.loads(zlib.decompress(packed)))
            if known is not None:
                known[packed] = shards
        return cls(Location(machine, process, device, tuple(devices)), shards)


def manifest_of(names: ModuleNames, device: torch.device) -> Manifest:
    """Of a module's tensors. Shard i is of `names.held[i]`.

    Raises:
        ValueError: where the parts of one lie cannot be told.

    """
    refusal = next((e.refusal for e in names.held if e.refusal is not None), None)
    if refusal is not None:
        raise ValueError(refusal)
    shards = [
        Shard(
            tuple(sorted({without_wrappers(name) for name in entry.names})),
            _wanted(entry.layout),
            entry.optional,
        )
        for entry in names.held
    ]
    return Manifest(location_of(device), shards)


def _wanted(layout: Layout) -> Layout:
    """The whole tensor, where only the layer's own loader knows which part it needs."""
    if layout.boxes:
        return layout
    zeros = (0,) * len(layout.shape)
    box = Box(zeros, zeros, tuple(layout.shape))
    return Layout(layout.shape, layout.shape, layout.dtype, (box,))


def location_of(device: torch.device) -> Location:
    """Where this process holds tensors of `device`."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    machine = boot.read_text().strip() if boot.exists() else ""
    machine = f"{socket.gethostname()}/{machine}"
    if device.type != "cuda":
        return Location(machine, os.getpid(), device.type, (device.type,))
    uuids = [
        str(torch.cuda.get_device_properties(index).uuid)
        for index in range(torch.cuda.device_count())
    ]
    index = torch.cuda.current_device() if device.index is None else device.index
    return Location(machine, os.getpid(), uuids[index], tuple(uuids))


def _shards_from_json(content: dict[str, Any]) -> list[Shard]:
    layouts = [_layout_from_json(values) for values in content["layouts"]]
    optional = set(content["optional"])
    return [
        Shard(tuple(names), layouts[number], index in optional)
        for index, (names, number) in enumerate(
            zip(content["names"], content["numbers"], strict=True)
        )
    ]


def _layout_to_json(layout: Layout) -> list[Any]:
    boxes = [[box.local, box.whole, box.sizes] for box in layout.boxes]
    dtype = str(layout.dtype).removeprefix("torch.")
    return [tuple(layout.shape), tuple(layout.local_shape), dtype, boxes]


def _layout_from_json(values: list[Any]) -> Layout:
    shape, local_shape, dtype, boxes = values
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(
            f"A tensor's dtype is {dtype!r}, which this PyTorch does not have. Use the "
            "same PyTorch release in the trainer and in the engine."
        )
    found = [
        Box(tuple(local), tuple(whole), tuple(sizes)) for local, whole, sizes in boxes
    ]
    return Layout(torch.Size(shape), torch.Size(local_shape), kind, tuple(found))
