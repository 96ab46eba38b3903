# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An engine rank: it copies its blocks from the trainer's tensors or buckets."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import torch

from vllm.distributed.weight_sync.blocks import copy_blocks
from vllm.distributed.weight_sync.delta import read_block
from vllm.distributed.weight_sync.manifest import Location
from vllm.distributed.weight_sync.memory import (
    STOPPED,
    Progress,
    import_tensor,
    map_shared,
    require_running,
    wait_until,
)
from vllm.distributed.weight_sync.network import NetworkReceiver, require_equal
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
                self._buckets = import_tensor(address["device_buckets"], self._device())
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
            self._receive_direct(self._by_bucket.get(-1, []), update, room, deadline)
            for number in range(ring.buckets if self._reads_buckets else 0):
                tick += 1
                self._wait_for(tick, update, deadline)
                slot = ring.slot(self._buckets, number)
                copies = self._by_bucket.get(number, [])
                indices = [copy.block_index for copy in copies]
                counts = self._progress.changed[indices].tolist()
                sums = [
                    read_block(
                        copy.block,
                        copy.block.bytes_in(slot),
                        changed,
                        room(copy),
                    )
                    for copy, changed in zip(copies, counts, strict=True)
                ]
                if copies:
                    self._compare(copies, torch.stack(sums))
                self._emptied.fill_(tick)
        finally:
            self.skip(update)  # what is left if this failed

    def skip(self, update: int) -> None:
        """Read nothing of an update; the trainer need not wait."""
        if self._reads_buckets:
            self._emptied.fill_(self._ring.first_tick(update + 1))

    def _receive_direct(
        self, copies: list[Copy], update: int, room: Room, deadline: float
    ) -> None:
        if not copies:
            return
        if self._location.process == os.getpid():
            entries = LOCAL[self._rendezvous.address[1], self._source]
            for copy in copies:
                room(copy).copy_(copy.of_source(entries[copy.shard].local_tensor))
            return
        exported = int(self._progress.exported)
        if exported != self._exported:
            found = self._rendezvous.get(f"tensors/{self._source}")
            device = self._device()
            self._tensors = {
                int(shard): import_tensor(values, device)
                for shard, values in found.items()
            }
            self._exported = exported
        tensors = self._tensors
        sums = copy_blocks(
            [(room(copy), copy.of_source(tensors[copy.shard])) for copy in copies]
        )
        self._wait(lambda: int(self._progress.summed) >= update, update, deadline)
        self._compare(copies, sums)

    def _compare(self, copies: list[Copy], sums: torch.Tensor) -> None:
        """Raise ValueError unless what was copied is what was sent."""
        indices = torch.tensor([copy.block_index for copy in copies])
        require_equal(sums, self._progress.checksums[indices], self._source)

    def _wait_for(self, tick: int, update: int, deadline: float) -> None:
        filled = self._progress.filled
        self._wait(lambda: int(filled) >= tick, update, deadline)

    def _wait(self, ready: Callable[[], bool], update: int, deadline: float) -> None:
        """Until `ready()`, or until the trainer gives the update up."""
        filled = self._progress.filled
        wait_until(
            lambda: ready() or int(filled) == -update,
            deadline,
            f"trainer rank {self._source} to send",
            lambda: require_running(
                {self._location.process: f"trainer rank {self._source}"}
            ),
        )
        if int(filled) == -update:
            raise ConnectionError(f"Trainer rank {self._source} {STOPPED}")

    def _device(self) -> int:
        """The number that this process has for the trainer's device; -1 of a CPU."""
        if self._location.device == "cpu":
            return -1
        for index in range(torch.cuda.device_count()):
            uuid = str(torch.cuda.get_device_properties(index).uuid)
            if uuid == self._location.device:
                return index
        raise RuntimeError(f"The trainer's device {self._location.device} is not here.")


def receiver_of(
    rank: int, source: int, location: Location, rendezvous: Rendezvous
) -> Receiver | NetworkReceiver:
    """The receiver for the transport that the trainer rank has chosen."""
    links = rendezvous.get(f"address/{source}")["links"]
    if str(rank) in links:
        return NetworkReceiver(rank, source, links[str(rank)], rendezvous)
    return Receiver(rank, source, location, rendezvous)


def receive_all(
    receivers: Sequence[Receiver | NetworkReceiver], update: int, room: Room
) -> None:
    """Receive an update from all trainer ranks. If one fails, no other has to wait."""
    for index, receiver in enumerate(receivers):
        try:
            receiver.receive(update, room)
        except BaseException:
            for later in receivers[index + 1 :]:
                later.skip(update)
            raise
