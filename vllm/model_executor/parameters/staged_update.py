# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Keeps an update of this rank's parts of all tensors aside until it is complete."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from vllm.model_executor.parameters.experts import is_plain, pack_experts
from vllm.model_executor.parameters.layout import Layout
from vllm.model_executor.parameters.load import ModuleWeights
from vllm.model_executor.parameters.names import Entry, Place
from vllm.model_executor.parameters.reload import (
    is_loaded_in_place,
    is_packed,
    keeps_weight,
    pack_kept,
    pack_shard,
    repack,
)

TOGETHER = 32  # parts that are copied by one call
HOST_ROOM = 1.1  # staging lies on the host unless the device has so much more than it


class LocalUpdate:
    """Holds an update of all tensors until it becomes the model's weights.

    Args:
        weights: The module's.
        layouts: Which part of each of `weights.names.held` arrives.
        staged: Keep what arrives aside until `commit`. Otherwise it is written at
            once, and the model is not served until `commit`; only layers that have
            packed their weights are still kept aside.

    """

    def __init__(
        self, weights: ModuleWeights, layouts: list[Layout], staged: bool
    ) -> None:
        self._weights = weights
        self._entries = weights.names.held
        self._layouts = layouts
        self._staged = staged
        self._rooms: dict[int, torch.Tensor] = {}  # by index of the entry
        self._device: torch.device | None = None
        self._marked = False  # the model is known to be written to
        self._released = False  # so rooms begin with what the model has

    def check_complete(self, arriving: Iterable[tuple[int, tuple[int, ...]]]) -> None:
        """Raise ValueError unless all elements of all tensors are to arrive.

        Args:
            arriving: By index of the entry, the sizes of each block.

        """
        counts = [0] * len(self._layouts)
        for index, sizes in arriving:
            counts[index] += torch.Size(sizes).numel()
        for entry, layout, count in zip(
            self._entries, self._layouts, counts, strict=True
        ):
            expected = sum(box.numel() for box in layout.boxes)
            if count != expected and not (entry.optional and count == 0):
                raise ValueError(
                    f"{count} of {expected} elements of {entry.name} are to arrive. "
                    "Use the same release of this package on both sides."
                )

    def begin(self) -> None:
        """From now on, `room` may be written to."""
        self._marked = False

    def room(self, index: int) -> torch.Tensor:
        """A tensor of the local shape for one entry, whose blocks are to be filled."""
        if not self._staged and not self._marked:
            self._marked = True
            self._weights.update.mark_mixed("an update by WeightSync has not ended")
        if index not in self._rooms:
            entry, layout = self._entries[index], self._layouts[index]
            packs = _packs(entry)
            local = None if packs else entry.places[0].local_tensor
            if self._staged or local is None:
                self._rooms[index] = torch.empty(
                    layout.local_shape,
                    dtype=layout.dtype,
                    device=self._staging_device(),
                )
                if self._released and local is not None:
                    for box, part in layout.parts_of(local):
                        box.of_local(self._rooms[index]).copy_(part)
            else:
                self._rooms[index] = local
        return self._rooms[index]

    @torch.no_grad()
    def commit(self) -> None:
        """Make what arrived the model's weights, in place."""
        self._weights.update.mark_mixed("an update by WeightSync was not written")
        packed: dict[nn.Module, dict[Place, int]] = {}
        rewritten: list[nn.Module] = []
        # Parts of the model, and what each is to be. Some are copied by one call, which
        # takes less time than a call for each, while the next ones are looked up.
        parts: list[torch.Tensor] = []
        arrived: list[torch.Tensor] = []
        for index, room in self._rooms.items():
            entry, layout = self._entries[index], self._layouts[index]
            written: set[int] = set()
            for place in entry.places:
                owner, leaf = place.at
                if is_packed(owner) and not is_loaded_in_place(owner, leaf):
                    if not keeps_weight(owner):
                        packed.setdefault(owner, {})[place] = index
                        continue
                    rewritten.append(owner)
                local = place.local_tensor
                if local is None or local is room or local.data_ptr() in written:
                    continue
                written.add(local.data_ptr())
                for box, part in layout.parts_of(local):
                    parts.append(part)
                    arrived.append(box.of_local(room))
            if len(parts) >= TOGETHER:
                torch._foreach_copy_(parts, arrived)
                parts, arrived = [], []
        if parts:
            torch._foreach_copy_(parts, arrived)
        for owner in rewritten:
            pack_kept(owner)
        # The rooms stay: an update may bring only what has changed since.
        for owner, at in packed.items():
            if is_plain(owner):
                pack_experts(owner, {place: self._rooms[i] for place, i in at.items()})
                continue
            index = next(iter(at.values()))
            known = bool(self._entries[index].layout.boxes)
            if known and pack_shard(owner, self._rooms[index].clone()):
                continue
            repack(owner, {place.leaf: self._whole(i) for place, i in at.items()})
        self._weights.update.finish_load(self._weights.names.local_names())

    def discard(self) -> None:
        """Forget what arrived. A model that was written to stays refused."""
        if not self._staged:
            self._rooms.clear()

    def release(self) -> None:
        """Let PyTorch have the memory of what was kept aside; a sleep frees it.

        What a layer has packed stays, because nothing else has it as it came.
        """
        self._rooms = {i: r for i, r in self._rooms.items() if _packs(self._entries[i])}
        self._released = True

    def _whole(self, index: int) -> torch.Tensor:
        """A whole tensor for a layer's loader, which reads this rank's part of it."""
        layout, room = self._layouts[index], self._rooms[index]
        whole = room.new_empty(layout.shape)
        for box, part in layout.parts_of(room):
            box.of_whole(whole).copy_(part)
        return whole

    def _staging_device(self) -> torch.device:
        if self._device is None:
            tensor = next(
                local
                for held in self._entries
                for place in held.places
                if (local := place.local_tensor) is not None and local.numel()
            )
            self._device = tensor.device
            if tensor.is_cuda:
                needed = sum(
                    layout.local_shape.numel() * layout.dtype.itemsize
                    for layout in self._layouts
                )
                free, _ = torch.cuda.mem_get_info(tensor.device)
                if free < HOST_ROOM * needed:
                    self._device = torch.device("cpu")
        return self._device


def _packs(entry: Entry) -> bool:
    return any(
        is_packed(place.owner)
        and not keeps_weight(place.owner)
        and not is_loaded_in_place(*place.at)
        for place in entry.places
    )
