# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A trainer rank: it lets engines read its tensors, or fills buckets with them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from vllm.distributed.weight_sync.blocks import sum_blocks
from vllm.distributed.weight_sync.delta import WHOLE, Deltas, nbytes_of
from vllm.distributed.weight_sync.manifest import Manifest
from vllm.distributed.weight_sync.memory import (
    Progress,
    SharedMemory,
    export_tensor,
    require_running,
    wait_until,
)
from vllm.distributed.weight_sync.network import Links, backend_of
from vllm.distributed.weight_sync.rendezvous import Rendezvous
from vllm.distributed.weight_sync.traffic import SLOTS, Block, Outgoing
from vllm.model_executor.parameters.names import Entry

LISTED = 8
# By port of the rendezvous and rank: the tensors that an engine in this process reads.
LOCAL: dict[tuple[int, int], Sequence[Entry]] = {}


class Sender:
    """Sends what `outgoing` says of this rank's tensors.

    Args:
        rank: This trainer rank's number.
        entries: Its tensors, in the order of its manifest.
        outgoing: Its part of the traffic.
        manifests: Of all trainer ranks and of all engine ranks.
        rendezvous: Where other processes learn what to map.
        names: What each engine rank is called, for messages.

    `committed` is the last update that all engines have committed, and `sent_bytes` how
    many bytes went to engine ranks in the last update.
    """

    def __init__(
        self,
        rank: int,
        entries: Sequence[Entry],
        outgoing: Outgoing,
        manifests: tuple[Sequence[Manifest], Sequence[Manifest]],
        rendezvous: Rendezvous,
        names: Sequence[str] = (),
    ) -> None:
        self._rank = rank
        self._entries = entries
        self._outgoing = outgoing
        self._rendezvous = rendezvous
        self.committed = 0
        self.sent_bytes = 0
        self._deltas = Deltas()
        self._totals: list[tuple[list[int], torch.Tensor]] = []  # of which shards
        sources, targets = manifests
        ring = self._ring = outgoing.ring
        names = names or [f"engine rank {number}" for number in range(len(targets))]
        self._processes = {targets[r].location.process: names[r] for r in ring.readers}
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
        here_is = sources[rank].location
        links = {
            target: (buckets, backend_of(here_is, targets[target].location))
            for target, buckets in outgoing.links.items()
        }
        device = entries[0].local_tensor.device
        self._links = Links(rank, links, device, rendezvous, names)
        address["links"] = {str(t): backend for t, (_, backend) in links.items()}
        rendezvous.set(f"address/{rank}", address)
        for target in range(len(targets)):
            rendezvous.set(f"copies/{rank}/{target}", outgoing.copies(target))
        LOCAL[rendezvous.address[1], rank] = entries

    def close(self) -> None:
        self._links.close()
        del LOCAL[self._rendezvous.address[1], self._rank]
        for memory in self._memories:
            memory.close()

    @torch.no_grad()
    def send(self, update: int, changed_only: bool = False) -> None:
        """Send everything once, or of what travels in buckets only what changed.

        It is everything, too, if the update before was not committed by all engines.

        Raises:
            ValueError: a tensor has values that are not finite.
            TimeoutError: an engine did not read in time.
            ConnectionError: an engine's process has ended, or a link to it broke.

        """
        self._deltas.begin(update, self.committed, changed_only)
        self._totals.clear()
        self.sent_bytes = 0
        try:
            self._links.connect(update, self.committed)
            self._show(update)
            self._fill_buckets(update)
            self._links.send(self._write)
            self._require_finite()
        except BaseException:
            self.give_up(update)
            raise

    def give_up(self, update: int) -> None:
        """Tell engines that no more of an update follows."""
        self._progress.filled[0] = -update
        self._links.give_up(update)

    def _show(self, update: int) -> None:
        """Let engines read blocks where they lie, and map them anew if they moved."""
        outgoing, progress = self._outgoing, self._progress
        tensors = [self._local(block) for block in self._shown]
        addresses = [tensor.data_ptr() for tensor in tensors]
        if addresses != self._exported:
            exported = {
                str(block.shard): export_tensor(tensor)
                for block, tensor in zip(self._shown, tensors, strict=True)
            }
            self._rendezvous.set(f"tensors/{self._rank}", exported)
            self._exported = addresses
            progress.exported[0] = update
        if outgoing.direct and self._local(outgoing.direct[0]).is_cuda:
            torch.cuda.current_stream().synchronize()  # the optimizer's step
        progress.filled[0] = self._ring.first_tick(update) + 1
        # Computed while they read, because they compare it only afterwards.
        if outgoing.direct:
            sums = sum_blocks([self._source(block) for block in outgoing.direct])
            self._note(outgoing.direct, *sums, [WHOLE] * len(outgoing.direct))
        progress.summed[0] = update

    def _fill_buckets(self, update: int) -> None:
        progress = self._progress
        deadline = time.monotonic() + self._rendezvous.timeout
        first = self._ring.first_tick(update)
        tick = first + 1
        for number, bucket in enumerate(self._outgoing.buckets):
            read = tick - SLOTS  # what has to be read before the slot is free
            wait_until(
                # Of an update that was given up, not all was read. Only engines write
                # these counters: one may skip this update before it begins here.
                lambda read=read: bool(  # type: ignore[misc]
                    (progress.emptied.clamp(min=first) > read).all()
                ),
                deadline,
                f"{', '.join(self._processes.values())} to read what was sent",
                lambda: require_running(self._processes),
            )
            slot = self._ring.slot(self._buckets, number)
            written = [
                self._deltas.write(block, self._source(block), block.bytes_in(slot))
                for block in bucket
            ]
            self._note(
                bucket,
                torch.stack([each.sums.checksum() for each in written]),
                torch.stack([each.sums.total() for each in written]),
                [each.changed for each in written],
            )
            progress.filled[0] = tick = tick + 1

    def _note(
        self,
        blocks: Sequence[Block],
        checksums: torch.Tensor,
        totals: torch.Tensor,
        changed: Sequence[int],
    ) -> None:
        """Say what was sent of `blocks`; the tensors are `[blocks]`."""
        indices = torch.tensor([block.index for block in blocks])
        self._progress.checksums[indices] = checksums.to("cpu")  # waits for the device
        self._progress.changed[indices] = torch.tensor(changed)
        self._count(blocks, totals, changed)

    def _write(self, block: Block, room: torch.Tensor) -> tuple[int, int]:
        """Write a block for the network."""
        changed, sums = self._deltas.write(block, self._source(block), room)
        self._count([block], sums.total().view(1), [changed])
        return changed, int(sums.checksum())

    def _count(
        self, blocks: Sequence[Block], totals: torch.Tensor, changed: Sequence[int]
    ) -> None:
        self._totals.append(([block.shard for block in blocks], totals.to("cpu")))
        self.sent_bytes += sum(
            nbytes_of(block, count) * len(block.pieces)
            for block, count in zip(blocks, changed, strict=True)
        )

    def _require_finite(self) -> None:
        """Raise ValueError that names tensors with an infinity or no number."""
        if not self._totals:
            return
        shards = [shard for shards, _ in self._totals for shard in shards]
        totals = torch.cat([totals for _, totals in self._totals])
        # A sum of finite values may overflow, so such a block is checked by element.
        odd = [shards[index] for index in (~torch.isfinite(totals)).nonzero()]
        dtypes = {block.shard: block.dtype for block in self._outgoing.blocks()}
        found = [
            self._entries[shard].name
            for shard in dict.fromkeys(odd)
            if not torch.isfinite(
                self._entries[shard].local_tensor.to(dtypes[shard])
            ).all()
        ]
        if found:
            raise ValueError(
                f"{len(found)} tensors have values that are not finite: "
                f"{', '.join(found[:LISTED])}. Look at the trainer's loss and "
                "gradients."
            )

    def _source(self, block: Block) -> torch.Tensor:
        """The block in this rank's tensor as it is now."""
        return block.of_source(self._local(block))

    def _local(self, block: Block) -> torch.Tensor:
        return self._entries[block.shard].local_tensor

    def _make_buckets(self, address: dict[str, Any]) -> torch.Tensor:
        size = self._ring.bucket_bytes * SLOTS
        if self._outgoing.on_device:
            device = self._local(self._outgoing.buckets[0][0]).device
            buckets = torch.empty(size, dtype=torch.uint8, device=device)
            address["device_buckets"] = export_tensor(buckets)
            return buckets
        memory = SharedMemory(size)
        self._memories.append(memory)
        address["buckets"] = memory.path
        return memory.tensor
