# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An engine rank's side: it copies its pieces from where the trainer shows them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import torch

from vllm.distributed.weight_sync.manifest import Manifest
from vllm.distributed.weight_sync.memory import (
    Progress,
    checksum,
    import_cuda,
    map_shared,
    wait_until,
)
from vllm.distributed.weight_sync.plan import Piece
from vllm.distributed.weight_sync.rendezvous import Rendezvous
from vllm.distributed.weight_sync.sender import LOCAL
from vllm.distributed.weight_sync.traffic import Block, Outgoing
from vllm.model_executor.parameters.names import Entry

Room = Callable[[Piece], torch.Tensor]


class Receiver:
    """Receives from one trainer rank what is meant for one engine rank.

    Args:
        rank: The engine rank's number.
        source: The trainer rank's number.
        outgoing: What that sends.
        manifest: What it holds.
        rendezvous: Where it says what to map.

    """

    def __init__(
        self,
        rank: int,
        source: int,
        outgoing: Outgoing,
        manifest: Manifest,
        rendezvous: Rendezvous,
    ) -> None:
        self._rank = rank
        self._source = source
        self._outgoing = outgoing
        self._location = manifest.location
        self._rendezvous = rendezvous
        self._direct = self._mine(outgoing.direct)
        self._tensors: dict[int, torch.Tensor] = {}  # by shard, mapped
        self._exported = 0
        address = rendezvous.get(f"address/{source}")
        counters = map_shared(address["counters"])
        readers = len(outgoing.readers)
        self._progress = Progress.view(counters, readers, outgoing.blocks)
        self._reads_buckets = rank in outgoing.readers
        if self._reads_buckets:
            self._emptied = self._progress.emptied[outgoing.readers.index(rank)]
            if "device_ring" in address:
                self._ring = import_cuda(address["device_ring"], self._device())
            else:
                self._ring = map_shared(address["ring"])

    def _mine(self, blocks: Sequence[Block]) -> list[tuple[Block, Piece]]:
        return [
            (block, piece)
            for block in blocks
            for piece in block.pieces
            if piece.target == self._rank
        ]

    @torch.no_grad()
    def receive(self, update: int, room: Room) -> None:
        """Copy every piece of an update to where `room` has place for it.

        Raises:
            ValueError: what arrived is not what was sent.
            TimeoutError: the trainer did not send in time.
            ConnectionError: the trainer gave up, or its process has ended.

        """
        outgoing = self._outgoing
        last = outgoing.first_tick(update + 1)
        deadline = time.monotonic() + self._rendezvous.timeout
        tick = outgoing.first_tick(update) + 1
        try:
            self._wait_for(tick, update, deadline)
            self._receive_direct(room)
            for number, bucket in enumerate(
                outgoing.buckets if self._reads_buckets else ()
            ):
                tick += 1
                self._wait_for(tick, update, deadline)
                slot = outgoing.slot(self._ring, number)
                mine = self._mine(bucket)
                self._copy(mine, [block.of_bucket(slot) for block, _ in mine], room)
                self._emptied.fill_(tick)
        finally:
            if self._reads_buckets:  # also if this failed: the trainer need not wait
                self._emptied.fill_(last)

    def _receive_direct(self, room: Room) -> None:
        if not self._direct:
            return
        if self._location.process == os.getpid():
            entries = LOCAL[self._rendezvous.address[1], self._source]
            for block, piece in self._direct:
                room(piece).copy_(block.of_source(_local(entries[block.shard])))
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
        parts = [
            block.of_source(self._tensors[block.shard]) for block, _ in self._direct
        ]
        self._copy(self._direct, parts, room)

    def _copy(
        self,
        mine: list[tuple[Block, Piece]],
        parts: list[torch.Tensor],
        room: Room,
    ) -> None:
        """Copy, and compare with what was sent."""
        if not mine:
            return
        sums = []
        for (_, piece), part in zip(mine, parts, strict=True):
            place = room(piece)
            place.copy_(part)
            sums.append(checksum(place))
        indices = torch.tensor([block.index for block, _ in mine])
        found = torch.stack(sums).to("cpu")  # waits for the device
        differ = (found != self._progress.checksums[indices]).nonzero().flatten()
        if len(differ):
            raise ValueError(
                f"{len(differ)} of {len(mine)} blocks from trainer rank {self._source} "
                "did not arrive as they were sent. Do not change the model's weights "
                "before WeightSync.update() returns."
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


def _local(entry: Entry) -> torch.Tensor:
    tensor = entry.places[0].local_tensor
    assert tensor is not None, "a tensor was removed from the trainer's module"
    return tensor.detach()
