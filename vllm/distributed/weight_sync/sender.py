# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The trainer's side of one rank: it shows its tensors, or fills buckets with them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from vllm.distributed.weight_sync.manifest import Manifest
from vllm.distributed.weight_sync.memory import (
    Progress,
    SharedMemory,
    checksum,
    export_cuda,
    wait_until,
)
from vllm.distributed.weight_sync.rendezvous import Rendezvous
from vllm.distributed.weight_sync.traffic import SLOTS, Block, Outgoing
from vllm.model_executor.parameters.names import Entry

# By port of the rendezvous and rank: the tensors that an engine in this process reads.
LOCAL: dict[tuple[int, int], Sequence[Entry]] = {}


class Sender:
    """Sends what `outgoing` says of this rank's tensors.

    Args:
        rank: This trainer rank's number.
        entries: Its tensors, in the order of its manifest.
        outgoing: Its part of the traffic.
        targets: The manifests of all engine ranks.
        rendezvous: Where other processes learn what to map.

    """

    def __init__(
        self,
        rank: int,
        entries: Sequence[Entry],
        outgoing: Outgoing,
        targets: Sequence[Manifest],
        rendezvous: Rendezvous,
    ) -> None:
        self._rank = rank
        self._entries = entries
        self._outgoing = outgoing
        self._rendezvous = rendezvous
        ring = self._ring = outgoing.ring
        self._processes = {targets[r].location.process for r in ring.readers}
        here = {r for r, m in enumerate(targets) if m.location.process == os.getpid()}
        self._shown = [
            block
            for block in outgoing.direct
            if any(piece.target not in here for piece in block.pieces)
        ]
        self._exported: list[int] = []  # addresses

        counters = SharedMemory(Progress.size(len(ring.readers), ring.blocks))
        self._progress = Progress.view(counters.tensor, len(ring.readers), ring.blocks)
        self._memories = [counters]
        address: dict[str, Any] = {"counters": counters.path, "ring": asdict(ring)}
        if outgoing.buckets:
            self._buckets = self._make_buckets(address)
        rendezvous.set(f"address/{rank}", address)
        for target in range(len(targets)):
            rendezvous.set(f"copies/{rank}/{target}", outgoing.copies(target))
        LOCAL[rendezvous.address[1], rank] = entries

    def close(self) -> None:
        del LOCAL[self._rendezvous.address[1], self._rank]
        for memory in self._memories:
            memory.close()

    @torch.no_grad()
    def send(self, update: int) -> None:
        """Send everything once.

        Raises:
            TimeoutError: an engine did not empty a bucket in time.
            ConnectionError: an engine's process has ended.

        """
        progress, outgoing = self._progress, self._outgoing
        deadline = time.monotonic() + self._rendezvous.timeout
        tick = self._ring.first_tick(update)
        progress.emptied.fill_(tick)  # of an update that was given up, not all was read
        try:
            self._show(update)
            progress.filled[0] = tick = tick + 1
            for number, bucket in enumerate(outgoing.buckets):
                read = tick - SLOTS  # what has to be read before the slot is free
                wait_until(
                    lambda read=read: bool((progress.emptied > read).all()),  # type: ignore[misc]
                    deadline,
                    "an engine to read what was sent",
                    self._processes,
                )
                slot = self._ring.slot(self._buckets, number)
                sent = [block.of_bucket(slot) for block in bucket]
                for block, room in zip(bucket, sent, strict=True):
                    room.copy_(block.of_source(self._local(block)))
                self._note_checksums(bucket, sent)
                progress.filled[0] = tick = tick + 1
        except BaseException:
            progress.filled[0] = -update
            raise

    def _show(self, update: int) -> None:
        """Let engines read blocks where they lie, and map them anew if they moved."""
        tensors = [self._local(block) for block in self._shown]
        addresses = [tensor.data_ptr() for tensor in tensors]
        if addresses != self._exported:
            exported = {
                str(block.shard): export_cuda(tensor)
                for block, tensor in zip(self._shown, tensors, strict=True)
            }
            self._rendezvous.set(f"tensors/{self._rank}", exported)
            self._exported = addresses
            self._progress.exported[0] = update
        parts = [
            block.of_source(tensor)
            for block, tensor in zip(self._shown, tensors, strict=True)
        ]
        self._note_checksums(self._shown, parts)
        if self._outgoing.direct and self._local(self._outgoing.direct[0]).is_cuda:
            torch.cuda.current_stream().synchronize()  # the optimizer's step

    def _note_checksums(self, blocks: list[Block], parts: list[torch.Tensor]) -> None:
        if not blocks:
            return
        sums = torch.stack([checksum(part) for part in parts])
        indices = torch.tensor([block.index for block in blocks])
        self._progress.checksums[indices] = sums.to("cpu")  # waits for the device

    def _local(self, block: Block) -> torch.Tensor:
        return self._entries[block.shard].local_tensor

    def _make_buckets(self, address: dict[str, Any]) -> torch.Tensor:
        size = self._ring.bucket_bytes * SLOTS
        if self._outgoing.on_device:
            device = self._local(self._outgoing.buckets[0][0]).device
            buckets = torch.empty(size, dtype=torch.uint8, device=device)
            address["device_buckets"] = export_cuda(buckets)
            return buckets
        memory = SharedMemory(size)
        self._memories.append(memory)
        address["buckets"] = memory.path
        return memory.tensor
