# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How blocks travel between ranks: changed elements, links, memory that is shared."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from weight_sync_sides import Side, local_tensors, manifests

from vllm.distributed.weight_sync.manifest import Manifest
from vllm.distributed.weight_sync.plan import Plan
from vllm.distributed.weight_sync.receiver import receive_all, receiver_of
from vllm.distributed.weight_sync.rendezvous import Rendezvous
from vllm.distributed.weight_sync.sender import Sender
from vllm.distributed.weight_sync.traffic import Copy, Outgoing

TIMEOUT_S = 60.0


def on_this_machine(side: list[Manifest], name: str, process: int) -> list[Manifest]:
    """As they would be in a process, each with a device of its own."""
    for manifest in side:
        manifest.location = dataclasses.replace(
            manifest.location, process=process, device="cpu", machine=name
        )
    return side


def in_bfloat16(side: list[Manifest]) -> list[Manifest]:
    for manifest in side:
        manifest.shards = [
            dataclasses.replace(
                shard, layout=dataclasses.replace(shard.layout, dtype=torch.bfloat16)
            )
            for shard in manifest.shards
        ]
    return side


class Engine:
    """An engine rank: its tensors, and what it receives from each trainer rank."""

    def __init__(
        self, rank: int, manifest: Manifest, sources: int, rendezvous: Rendezvous
    ) -> None:
        self.tensors = [
            tensor.to(shard.layout.dtype)
            for tensor, shard in zip(
                local_tensors(manifest, filled=False), manifest.shards, strict=True
            )
        ]
        found = rendezvous.get_manifests("trainer", sources)
        self.receivers = [
            receiver_of(rank, source, found[source].location, rendezvous)
            for source in range(sources)
        ]

    def receive(self, update: int) -> None:
        def room(copy: Copy) -> torch.Tensor:
            return copy.of_target(self.tensors[copy.target_shard])

        receive_all(self.receivers, update, room)


class World:
    """Trainer ranks of this process and what they send."""

    def __init__(
        self,
        sources: list[Manifest],
        targets: list[Manifest],
        network: bool = False,
        shared: bool = False,
    ) -> None:
        self.sources, self.targets = sources, targets
        self.rendezvous = Rendezvous("127.0.0.1", 0, TIMEOUT_S)
        self.held = [local_tensors(manifest, filled=True) for manifest in sources]
        for rank, manifest in enumerate(sources):
            self.rendezvous.set_manifest("trainer", rank, manifest)
        plan = Plan(sources, targets)
        self.nbytes = plan.nbytes()
        self.senders = []
        for rank, tensors in enumerate(self.held):
            entries: Any = [
                SimpleNamespace(name=shard.names[0], local_tensor=tensor)
                for shard, tensor in zip(sources[rank].shards, tensors, strict=True)
            ]
            if shared:
                for tensor in tensors:
                    tensor.share_memory_()
            readable = range(len(tensors)) if shared else ()
            traffic = Outgoing(plan, rank, sources, targets, 300, readable, network)
            both = (sources, targets)
            # A connection of its own: each waits while another one waits, too.
            own = Rendezvous(*self.rendezvous.address, TIMEOUT_S)
            self.senders.append(Sender(rank, entries, traffic, both, own))

    def send(self, update: int, pool: ThreadPoolExecutor, **options: Any) -> int:
        """By all ranks; returns how many bytes went to engines."""
        jobs = [pool.submit(s.send, update, **options) for s in self.senders]
        errors = [error for job in jobs if (error := job.exception()) is not None]
        if errors:
            raise errors[0]
        return sum(sender.sent_bytes for sender in self.senders)

    def commit(self, update: int) -> None:
        for sender in self.senders:
            sender.committed = update

    def close(self) -> None:
        for sender in self.senders:
            sender.close()

    def expected(self, target: int) -> list[torch.Tensor]:
        """What an engine rank has to hold, put together from all trainer ranks."""
        whole: dict[str, torch.Tensor] = {}
        for manifest, tensors in zip(self.sources, self.held, strict=True):
            for shard, tensor in zip(manifest.shards, tensors, strict=True):
                room = whole.setdefault(shard.names[0], torch.zeros(shard.layout.shape))
                for box, part in shard.layout.parts_of(tensor):
                    box.of_whole(room).copy_(part)
        found = []
        for shard in self.targets[target].shards:
            local = torch.zeros(shard.layout.local_shape, dtype=shard.layout.dtype)
            shard.layout.load(local, whole[shard.names[0]])
            found.append(local)
        return found


def same_bits(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize(
    ("trainer", "engine"),
    [
        (Side(), Side(tp=2, copies=2)),
        (Side(fsdp=3), Side(tp=2)),
        (Side(tp=2, copies=2), Side(pp=2)),
        (Side(tp=4), Side(tp=4, ep=True)),
    ],
    ids=str,
)
def test_changed_elements(trainer: Side, engine: Side) -> None:
    """The same bits as a whole update, and fewer bytes; also after one that failed."""
    here, other = os.getpid(), os.getppid()
    world = World(
        on_this_machine(manifests(trainer, "trainer"), "machine", here),
        in_bfloat16(on_this_machine(manifests(engine, "engine"), "machine", other)),
    )
    count = len(world.sources)
    engines = [
        Engine(rank, manifest, count, world.rendezvous)
        for rank, manifest in enumerate(world.targets)
    ]
    elements = {id(t): t for tensors in world.held for t in tensors if t.numel()}

    def update(number: int, changed_only: bool = True) -> int:
        with ThreadPoolExecutor(count + len(engines)) as pool:
            jobs = [pool.submit(engine.receive, number) for engine in engines]
            sent = world.send(number, pool, changed_only=changed_only)
            errors = [error for job in jobs if (error := job.exception()) is not None]
        if errors:
            raise errors[0]
        for rank, engine in enumerate(engines):
            assert same_bits(engine.tensors, world.expected(rank))
        return sent

    def change(every: int, by: float) -> None:
        # By value, so that ranks that hold the same change the same.
        for tensor in elements.values():
            tensor[tensor % every == 1] += by

    assert update(1) == world.nbytes  # nothing is known yet
    world.commit(1)
    assert update(2) == 0
    world.commit(2)
    change(every=8, by=1e-6)  # is lost in bfloat16
    assert update(3) == 0
    world.commit(3)
    change(every=16, by=900.0)
    assert 0 < update(4) < world.nbytes / 2
    world.commit(4)
    for tensor in elements.values():
        tensor.mul_(-1.5)
    world.held[0][0].view(-1)[0] = -0.0
    sent = update(5)  # as most have changed, whole blocks are less
    assert 0.9 * world.nbytes < sent <= world.nbytes
    world.commit(5)
    assert update(6, changed_only=False) == world.nbytes
    world.commit(6)
    assert update(7) == 0
    # Update 7 is committed nowhere, and the engine lost it.
    engines[0].tensors[0].fill_(3)
    assert update(8) == world.nbytes
    world.commit(8)
    # Something else writes to the engine's weights.
    engines[0].tensors[0].view(-1)[0] = 7
    with pytest.raises(ValueError, match="by other means between"):
        update(9)
    assert update(10) == world.nbytes
    world.close()


def serve(rank: int, manifest: bytes, sources: int, port: int, updates: int) -> None:
    """The process of an engine rank. It says what it received, or what went wrong."""
    rendezvous = Rendezvous("127.0.0.1", port, TIMEOUT_S)
    engine = Engine(rank, Manifest.from_bytes(manifest), sources, rendezvous)
    for update in range(1, updates + 1):
        said: Any
        try:
            engine.receive(update)
            said = [tensor.float().flatten().tolist() for tensor in engine.tensors]
        except (ValueError, ConnectionError, TimeoutError) as error:
            said = f"{type(error).__name__}: {error}"
        rendezvous.set(f"received/{rank}/{update}", said)


@contextmanager
def processes(world: World, updates: int) -> Iterator[list[Any]]:
    context = multiprocessing.get_context("spawn")
    port = world.rendezvous.address[1]
    children = [
        context.Process(
            target=serve,
            args=(rank, manifest.to_bytes(), len(world.sources), port, updates),
        )
        for rank, manifest in enumerate(world.targets)
    ]
    for child in children:
        child.start()
    try:
        yield children
        for child in children:
            child.join(TIMEOUT_S)
            assert child.exitcode is not None
    finally:
        for child in children:
            child.kill()
        world.close()


def received(world: World, rank: int, update: int) -> Any:
    return world.rendezvous.get(f"received/{rank}/{update}")


def assert_arrived(world: World, update: int) -> None:
    for rank in range(len(world.targets)):
        expected = [t.float().flatten().tolist() for t in world.expected(rank)]
        assert received(world, rank, update) == expected


@pytest.mark.parametrize(
    "machine", ["another", pytest.param("machine", marks=pytest.mark.slow)]
)
def test_a_network(machine: str) -> None:
    """Two trainer ranks and two engine ranks; also updates that fail in between."""
    world = World(
        on_this_machine(manifests(Side(tp=2), "trainer"), "machine", os.getpid()),
        in_bfloat16(on_this_machine(manifests(Side(pp=2), "engine"), machine, 1)),
        network=machine == "machine",
    )
    with processes(world, updates=5), ThreadPoolExecutor() as pool:
        assert world.send(1, pool) == world.nbytes
        assert_arrived(world, 1)
        world.commit(1)
        links = [dict(sender._links._links) for sender in world.senders]

        world.held[0][1].view(-1)[3] = 1e4
        assert world.send(2, pool, changed_only=True) == world.nbytes
        world.commit(2)
        assert_arrived(world, 2)
        world.held[0][1].view(-1)[3] = 2e4
        assert 0 < world.send(3, pool, changed_only=True) < 16
        world.commit(3)
        assert_arrived(world, 3)
        assert links == [sender._links._links for sender in world.senders]

        # A rank that fails says so, and the next update connects anew.
        world.held[0][1].view(-1)[3] = float("nan")
        with pytest.raises(ValueError, match=r"not finite: layers\.0\.up"):
            world.send(4, pool, changed_only=True)
        world.held[0][1].view(-1)[3] = 0
        assert world.send(5, pool, changed_only=True) == world.nbytes
        assert_arrived(world, 5)


def test_a_network_that_breaks() -> None:
    world = World(
        on_this_machine(manifests(Side(), "trainer"), "machine", os.getpid()),
        on_this_machine(manifests(Side(), "engine"), "another", 1),
    )
    with processes(world, updates=3) as (engine,), ThreadPoolExecutor() as pool:
        world.send(1, pool)
        world.commit(1)
        assert_arrived(world, 1)
        # A rank that stops in the middle: its engines are told.
        write, count = world.senders[0]._write, iter(range(3))

        def fail(*arguments: Any) -> Any:
            if next(count, None) is None:
                raise MemoryError("the trainer has no more memory")
            return write(*arguments)

        world.senders[0]._write = fail
        with pytest.raises(MemoryError):
            world.send(2, pool)
        assert received(world, 0, 2) == (
            "ConnectionError: Trainer rank 0 gave the update up."
        )
        world.senders[0]._write = write
        # The process of an engine dies while it is sent to.
        blocked = threading.Event()

        def kill(*arguments: Any) -> Any:
            if not blocked.is_set():
                os.kill(engine.pid, signal.SIGKILL)
                engine.join()
                blocked.set()
            return write(*arguments)

        world.senders[0]._write = kill
        with pytest.raises((ConnectionError, TimeoutError), match="engine rank 0"):
            world.send(3, pool)


def test_shared_storage_is_read_where_it_lies() -> None:
    """No buckets; also after a tensor has moved."""
    world = World(
        on_this_machine(manifests(Side(tp=2), "trainer"), "machine", os.getpid()),
        on_this_machine(manifests(Side(tp=2), "engine"), "machine", os.getppid()),
        shared=True,
    )
    assert not any(sender._outgoing.buckets for sender in world.senders)
    with processes(world, updates=3), ThreadPoolExecutor() as pool:
        for update in (1, 2):
            assert world.send(update, pool) == world.nbytes
            assert_arrived(world, update)
            for tensors in world.held:
                for tensor in tensors:
                    tensor.mul_(0.5)
        for tensors in world.held:
            tensors[1].set_(tensors[1].clone())
        world.send(3, pool)
        assert_arrived(world, 3)
