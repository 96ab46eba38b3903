# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sends buckets from a trainer rank to an engine rank that shares no memory with it.

Both make a process group of two: gloo's, or NCCL's if both have devices of their own.
A bucket travels as a header, int64 `[2, blocks]`, and then the bytes of all blocks one
after the other. The header has the number of changed elements and the checksum of each
block.
While one bucket is on its way, another one is filled or read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroup, Work

from vllm.distributed.utils import init_gloo_process_group
from vllm.distributed.weight_sync.delta import nbytes_of, read_block
from vllm.distributed.weight_sync.manifest import Location
from vllm.distributed.weight_sync.memory import STOPPED
from vllm.distributed.weight_sync.rendezvous import Rendezvous
from vllm.distributed.weight_sync.traffic import SLOTS, Block, Copy, aligned
from vllm.logger import init_logger
from vllm.platforms import current_platform

logger = init_logger(__name__)

GAVE_UP = -2  # in the place of a count: no more of this update follows
LOOK_S = 1e-3  # between two looks whether a device's transfer is done


class Link:
    """A process group of a trainer rank (0) and an engine rank (1).

    Args:
        store: The two ranks' own part of a store.
        rank: 0 or 1.
        backend: "gloo" or "nccl".
        peer: What the other end is called.
        timeout: Seconds for any wait.

    """

    def __init__(
        self, store: PrefixStore, rank: int, backend: str, peer: str, timeout: float
    ) -> None:
        self._other = 1 - rank
        self._peer = peer
        self._timeout = timeout
        self._backend = backend
        limit = timedelta(seconds=timeout)
        try:
            if backend == "nccl":
                self._group: ProcessGroup = (
                    current_platform.stateless_init_device_torch_dist_pg(
                        "nccl", store, rank, 2, limit
                    )
                )
            else:
                self._group = init_gloo_process_group(store, rank, 2, limit)
        except RuntimeError as error:
            raise ConnectionError(
                f"No link to {peer} could be made within {timeout:.0f} s: {error} If "
                "machines have several networks, set GLOO_SOCKET_IFNAME or "
                "NCCL_SOCKET_IFNAME on both sides."
            ) from error

    def send(self, tensor: torch.Tensor) -> Work:
        return self._do(lambda: self._group.send([tensor], self._other, 0))

    def receive(self, tensor: torch.Tensor) -> Work:
        return self._do(lambda: self._group.recv([tensor], self._other, 0))

    def wait(self, works: Sequence[Work]) -> None:
        """Until all are done.

        Raises:
            TimeoutError: they were not within the time limit.
            ConnectionError: the other end, or what is in between, is gone.

        """
        deadline = time.monotonic() + self._timeout
        for work in works:
            if self._backend == "nccl":  # whose `wait` lets only the stream wait
                while not self._do(work.is_completed):
                    if time.monotonic() > deadline:
                        raise self._late()
                    time.sleep(LOOK_S)
                continue
            left = max(deadline - time.monotonic(), LOOK_S)
            try:
                work.wait(timedelta(seconds=left))
            except RuntimeError as error:
                if time.monotonic() >= deadline:
                    raise self._late() from error
                raise self._broken(error) from error

    def _do(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except RuntimeError as error:
            raise self._broken(error) from error

    def _late(self) -> TimeoutError:
        return TimeoutError(
            f"Nothing went to or came from {self._peer} within {self._timeout:.0f} s."
        )

    def _broken(self, error: RuntimeError) -> ConnectionError:
        reason = str(error).partition("\n")[0]
        return ConnectionError(
            f"The link to {self._peer} broke ({reason}). If that process runs, call "
            "update() again: it connects anew."
        )


class Links:
    """The links of a trainer rank to engine ranks, one for each.

    Args:
        rank: The trainer rank's number.
        targets: By engine rank: its buckets, and the backend of its link.
        device: Where buckets lie.
        rendezvous: Where both ends meet.
        names: What each engine rank is called.

    """

    def __init__(
        self,
        rank: int,
        targets: dict[int, tuple[list[list[Block]], str]],
        device: torch.device,
        rendezvous: Rendezvous,
        names: Sequence[str],
    ) -> None:
        self._rank = rank
        self._names = names
        self._targets = targets
        self._device = device
        self._rendezvous = rendezvous
        self._links: dict[int, Link] = {}
        self._made = 0  # the update in which they were made
        self._sent: dict[int, int] = {}  # by target: buckets of this update
        self._told = 0  # the last update for which the other ends were told `_made`
        self._slots = {
            target: _slots(
                buckets, device if backend == "nccl" else torch.device("cpu")
            )
            for target, (buckets, backend) in targets.items()
        }

    def connect(self, update: int, committed: int) -> None:
        """Keep the links of an update that ended well, or make others."""
        if not self._targets:
            return
        if not self._links or committed != update - 1:
            self._links.clear()
            self._made = update
        rendezvous, rank = self._rendezvous, self._rank
        rendezvous.set(f"links/{rank}/{update}", self._made)
        self._told = update
        self._sent = {}
        rendezvous.forget(f"links/{rank}/{update - 2}")  # whose update has ended
        for target, (_, backend) in self._targets.items():
            if target not in self._links:
                store = PrefixStore(f"{rank}/{target}/{self._made}", rendezvous.store)
                peer = self._names[target]
                link = Link(store, 0, backend, peer, rendezvous.timeout)
                self._links[target] = link

    def send(self, write: Callable[[Block, torch.Tensor], tuple[int, int]]) -> None:
        """Send all buckets.

        Args:
            write: Called with a block and its room, uint8 `[block.nbytes]`. Returns
                how many of its elements travel, and its checksum.

        """
        self._sent = dict.fromkeys(self._targets, 0)
        waiting: dict[tuple[int, int], tuple[list[Work], list[torch.Tensor]]] = {}
        most = max((len(buckets) for buckets, _ in self._targets.values()), default=0)
        for number in range(most):
            for target, (buckets, _) in self._targets.items():
                if number >= len(buckets):
                    continue
                link, slot = self._links[target], number % SLOTS
                works, _ = waiting.pop((target, slot), ([], []))
                link.wait(works)
                memory = self._slots[target][slot]
                header, payload = _pack(buckets[number], memory, write)
                works = [link.send(header)]
                if len(payload):
                    works.append(link.send(payload))
                waiting[target, slot] = works, [header, payload]
                self._sent[target] += 1
        for (target, _), (works, _) in waiting.items():
            self._links[target].wait(works)

    def give_up(self, update: int) -> None:
        """Tell the other ends that no more of an update follows."""
        if self._targets and self._told != update:
            self._rendezvous.set(f"links/{self._rank}/{update}", GAVE_UP)
            return
        for target, (buckets, _) in self._targets.items():
            number = self._sent.get(target, 0)
            link = self._links.get(target)
            if link is None or number == len(buckets):
                continue
            device = self._slots[target][0].device
            shape = (len(buckets[number]), 2)  # that of the header that is waited for
            header = torch.full(shape, GAVE_UP, dtype=torch.int64, device=device)
            try:
                link.wait([link.send(header)])
            except (ConnectionError, TimeoutError) as error:
                logger.warning("Giving the update up: %s", error)

    def close(self) -> None:
        self._links.clear()


class NetworkReceiver:
    """Receives from one trainer rank what is meant for one engine rank.

    Args:
        rank: The engine rank's number.
        source: The trainer rank's number.
        backend: Of the link.
        rendezvous: Where both ends meet.

    """

    def __init__(
        self, rank: int, source: int, backend: str, rendezvous: Rendezvous
    ) -> None:
        self._rank = rank
        self._source = source
        self._backend = backend
        self._rendezvous = rendezvous
        self._link: Link | None = None
        self._made = 0
        self.copies = [
            Copy.from_json(values)
            for values in rendezvous.get(f"copies/{source}/{rank}")
        ]
        by_bucket: dict[int, dict[int, list[Copy]]] = {}
        for copy in self.copies:
            blocks = by_bucket.setdefault(copy.bucket, {})
            blocks.setdefault(copy.block_index, []).append(copy)
        self._buckets = [list(by_bucket[n].values()) for n in sorted(by_bucket)]
        blocks_of = [[copies[0].block for copies in b] for b in self._buckets]
        device = torch.device("cuda" if backend == "nccl" else "cpu")
        self._slots = _slots(blocks_of, device)

    @torch.no_grad()
    def receive(self, update: int, room: Callable[[Copy], torch.Tensor]) -> None:
        """Copy every piece of an update to where `room` has place for it.

        Raises:
            ValueError: what arrived is not what was sent.
            TimeoutError: the trainer did not send in time.
            ConnectionError: the link broke.

        """
        try:
            link = self._connect(update)
            self._receive(link, room)
        except BaseException:
            self._link = None  # the trainer need not wait
            raise

    def skip(self, update: int) -> None:
        """Let the trainer send, and look at nothing."""
        try:
            self._receive(self._connect(update), None)
        except (ConnectionError, TimeoutError) as error:
            logger.warning("Update %d is not read to its end: %s", update, error)
            self._link = None

    def _connect(self, update: int) -> Link:
        rendezvous, source = self._rendezvous, self._source
        made = rendezvous.get(f"links/{source}/{update}")
        if made == GAVE_UP:
            raise ConnectionError(f"Trainer rank {source} {STOPPED}")
        if self._link is None or made != self._made:
            self._link = None
            store = PrefixStore(f"{source}/{self._rank}/{made}", rendezvous.store)
            peer = f"trainer rank {source}"
            self._link = Link(store, 1, self._backend, peer, rendezvous.timeout)
            self._made = made
        return self._link

    def _receive(self, link: Link, room: Callable[[Copy], torch.Tensor] | None) -> None:
        def begin(number: int) -> tuple[torch.Tensor, torch.Tensor, list[Work]]:
            """Read a header, and begin to receive what it announces."""
            memory = self._slots[number % SLOTS]
            bucket = self._buckets[number]
            header = torch.empty(
                len(bucket), 2, dtype=torch.int64, device=memory.device
            )
            link.wait([link.receive(header)])
            header = header.cpu()
            if GAVE_UP in header[:, 0].tolist():
                raise ConnectionError(f"Trainer rank {self._source} {STOPPED}")
            sizes = [
                aligned(nbytes_of(copies[0].block, changed))
                for copies, changed in zip(bucket, header[:, 0].tolist(), strict=True)
            ]
            payload = memory[: sum(sizes)]
            return header, payload, [link.receive(payload)] if len(payload) else []

        wrong: ValueError | None = None
        following = begin(0)
        for number, bucket in enumerate(self._buckets):
            header, payload, works = following
            link.wait(works)
            if number + 1 < len(self._buckets):
                following = begin(number + 1)
            if room is None:
                continue
            start, sums = 0, []
            for copies, changed in zip(bucket, header[:, 0].tolist(), strict=True):
                block = copies[0].block
                size = nbytes_of(block, changed)
                part = payload[start : start + size]
                start += aligned(size)
                sums += [read_block(block, part, changed, room(c)) for c in copies]
            expected = [
                checksum
                for copies, checksum in zip(bucket, header[:, 1].tolist(), strict=True)
                for _ in copies
            ]
            try:
                require_equal(torch.stack(sums), torch.tensor(expected), self._source)
            except ValueError as error:  # read the rest: the trainer need not wait
                wrong = wrong or error
        if wrong is not None:
            raise wrong


def _pack(
    bucket: list[Block],
    memory: torch.Tensor,
    write: Callable[[Block, torch.Tensor], tuple[int, int]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The header of a bucket that is written into `memory`, and the bytes to send."""
    rows, rooms = [], []
    for block in bucket:
        start = block.offset
        changed, checksum = write(block, memory[start : start + block.nbytes])
        rows.append([changed, checksum])
        rooms.append(memory[start : start + aligned(nbytes_of(block, changed))])
    size = sum(map(len, rooms))
    end = bucket[-1].offset + len(rooms[-1])
    payload = memory[:size] if size == end else torch.cat(rooms)
    return torch.tensor(rows, device=memory.device), payload


def backend_of(source: Location, target: Location) -> str:
    """The backend of a link: NCCL wants a device on each side, and not the same."""
    devices = {source.device, target.device}
    return "nccl" if "cpu" not in devices and len(devices) == 2 else "gloo"


def require_equal(found: torch.Tensor, expected: torch.Tensor, source: int) -> None:
    """Raise ValueError unless checksums are those of what trainer rank `source` sent.

    Args:
        found: int64 `[blocks]`, on any device.
        expected: The same on the CPU.
        source: The rank's number.

    """
    differ = int((found.to("cpu") != expected).sum())  # waits for the device
    if differ:
        raise ValueError(
            f"{differ} of {len(expected)} blocks from trainer rank {source} are not "
            "what was sent. Do not change the trainer's weights before "
            "WeightSync.update() returns, nor the engine's by other means between "
            "updates with changed_only; the next update is of all weights."
        )


def _slots(buckets: list[list[Block]], device: torch.device) -> list[torch.Tensor]:
    """Room for as many buckets as are in flight, uint8 `[bytes]` each."""
    ends = (aligned(b.offset + b.nbytes) for bucket in buckets for b in bucket)
    size = max(ends, default=0)
    count = min(SLOTS, len(buckets))
    return [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(count)]
