# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An engine rank's side: it copies its pieces from where the trainer shows them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from vllm.distributed.weight_sync.manifest import Location
from vllm.distributed.weight_sync.memory import (
    Progress,
    checksum,
    import_cuda,
    map_shared,
    wait_until,
)
from vllm.distributed.weight_sync.rendezvous import Rendezvous
from vllm.distributed.weight_sync.sender import LOCAL
from vllm.distributed.weight_sync.traffic import Copy, Ring

Room = Callable[[Copy], torch.Tensor]


class Receiver:
    """Receives from one trainer rank what is meant for one engine rank.

    Args:
        rank: The engine rank's number.
        source: The trainer rank's number.
        location: Where that is.
        rendezvous: Where it says what to map, and what to copy.

    """

    def __init__(
        self, rank: int, source: int, location: Location, rendezvous: Rendezvous
    ) -> None:
        self._source = source
        self._location = location
        self._rendezvous = rendezvous
        self._tensors: dict[int, torch.Tensor] = {}  # by shard, mapped
        self._exported = 0
        address = rendezvous.get(f"address/{source}")
        self._ring = ring = Ring(**address["ring"])
        self.copies = [
            Copy.from_json(values)
            for values in rendezvous.get(f"copies/{source}/{rank}")
        ]
        self._by_bucket: dict[int, list[Copy]] = {}
        for copy in self.copies:
            self._by_bucket.setdefault(copy.bucket, []).append(copy)
        counters = map_shared(address["counters"])
        self._progress = Progress.view(counters, len(ring.readers), ring.blocks)
        self._reads_buckets = rank in ring.readers
        if self._reads_buckets:
            self._emptied = self._progress.emptied[list(ring.readers).index(rank)]
            if "device_buckets" in address:
                self._buckets = import_cuda(address["device_buckets"], self._device())
            else:
                self._buckets = map_shared(address["buckets"])

    @torch.no_grad()
    def receive(self, update: int, room: Room) -> None:
        """Copy every piece of an update to where `room` has place for it.

        Raises:
            ValueError: what arrived is not what was sent.
            TimeoutError: the trainer did not send in time.
            ConnectionError: the trainer gave up, or its process has ended.

        """
        ring = self._ring
        deadline = time.monotonic() + self._rendezvous.timeout
        tick = ring.first_tick(update) + 1
        try:
            self._wait_for(tick, update, deadline)
            self._receive_direct(self._by_bucket.get(-1, []), room)
            for number in range(ring.buckets if self._reads_buckets else 0):
                tick += 1
                self._wait_for(tick, update, deadline)
                slot = ring.slot(self._buckets, number)
                copies = self._by_bucket.get(number, [])
                parts = [copy.block.of_bucket(slot) for copy in copies]
                self._copy(copies, parts, room)
                self._emptied.fill_(tick)
        finally:
            if self._reads_buckets:  # also if this failed: the trainer need not wait
                self._emptied.fill_(ring.first_tick(update + 1))

    def _receive_direct(self, copies: list[Copy], room: Room) -> None:
        if not copies:
            return
        if self._location.process == os.getpid():
            entries = LOCAL[self._rendezvous.address[1], self._source]
            for copy in copies:
                part = copy.block.of_source(entries[copy.shard].local_tensor)
                room(copy).copy_(part)
            return
        exported = int(self._progress.exported)
        if exported != self._exported:
            found = self._rendezvous.get(f"tensors/{self._source}")
            device = self._device()
            self._tensors = {
                int(shard): import_cuda(values, device)
                for shard, values in found.items()
            }
            self._exported = exported
        parts = [copy.block.of_source(self._tensors[copy.shard]) for copy in copies]
        self._copy(copies, parts, room)

    def _copy(self, copies: list[Copy], parts: list[torch.Tensor], room: Room) -> None:
        """Copy, and compare with what was sent."""
        if not copies:
            return
        sums = []
        for copy, part in zip(copies, parts, strict=True):
            place = room(copy)
            place.copy_(part)
            sums.append(checksum(place))
        indices = torch.tensor([copy.block_index for copy in copies])
        found = torch.stack(sums).to("cpu")  # waits for the device
        differ = (found != self._progress.checksums[indices]).nonzero().flatten()
        if len(differ):
            raise ValueError(
                f"{len(differ)} of {len(copies)} blocks from trainer rank "
                f"{self._source} did not arrive as they were sent. Do not change the "
                "model's weights before WeightSync.update() returns."
            )

    def _wait_for(self, tick: int, update: int, deadline: float) -> None:
        filled = self._progress.filled
        wait_until(
            lambda: int(filled) >= tick or int(filled) == -update,
            deadline,
            f"trainer rank {self._source} to send",
            [self._location.process],
        )
        if int(filled) == -update:
            raise ConnectionError(f"Trainer rank {self._source} gave the update up.")

    def _device(self) -> int:
        """The number that this process has for the trainer's device."""
        for index in range(torch.cuda.device_count()):
            uuid = str(torch.cuda.get_device_properties(index).uuid)
            if uuid == self._location.device:
                return index
        raise RuntimeError(f"The trainer's device {self._location.device} is not here.")
