# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Plans over all pairs of layouts: every element arrives, and none of them twice."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from weight_sync_sides import Side, layout, local_tensors, manifests

from vllm.distributed.weight_sync.blocks import checksum
from vllm.distributed.weight_sync.delta import WHOLE, Deltas, read_block
from vllm.distributed.weight_sync.manifest import Location, Manifest, Shard
from vllm.distributed.weight_sync.plan import Plan
from vllm.distributed.weight_sync.traffic import Outgoing
from vllm.model_executor.parameters.layout import Box

SIDES = [
    Side(tp=tp, pp=pp, fsdp=fsdp, ep=ep)
    for tp, pp, fsdp, ep in itertools.product(
        (1, 2, 4), (1, 2), (1, 2, 3), (False, True)
    )
    if not (ep and (tp == 1 or fsdp > 1))
]
ENGINES = [side for side in SIDES if side.fsdp == 1]


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize("bucket_bytes", [100, 1 << 20])
def test_every_element_arrives_once(engine: Side, bucket_bytes: int) -> None:
    """Over all trainers; the number of bytes is that of the engine's tensors."""
    engine = dataclasses.replace(engine, copies=2)
    targets = manifests(engine, "engine")
    for trainer in SIDES:
        sources = manifests(dataclasses.replace(trainer, copies=2), "trainer")
        plan = Plan(sources, targets)
        held = [local_tensors(manifest, filled=True) for manifest in sources]
        received = [local_tensors(manifest, filled=False) for manifest in targets]
        moved = 0
        for source in range(len(sources)):
            sent = Outgoing(plan, source, sources, targets, bucket_bytes)
            deltas = Deltas()
            memory = torch.zeros(sent.ring.bucket_bytes, dtype=torch.uint8)
            for bucket in sent.buckets:
                for block in bucket:
                    part = block.of_source(held[source][block.shard])
                    deltas.write(block, part, block.bytes_in(memory))
                number = bucket[0].bucket
                for target, tensors in enumerate(received):
                    for copy in sent.copies(target):
                        if copy.bucket != number:
                            continue
                        room = copy.of_target(tensors[copy.target_shard])
                        assert room.isnan().all()
                        found = copy.block
                        read_block(found, found.bytes_in(memory), WHOLE, room)
                        moved += room.nbytes
        for manifest, tensors in zip(targets, received, strict=True):
            expected = local_tensors(manifest, filled=True)
            for tensor, value in zip(tensors, expected, strict=True):
                assert torch.equal(tensor, value)
        minimum = sum(4 * t.numel() for tensors in received for t in tensors)
        assert moved == plan.nbytes() == minimum


def test_ranks_that_hold_the_same_take_turns() -> None:
    sources = manifests(Side(copies=2), "trainer")
    targets = manifests(Side(copies=2), "engine")
    plan = Plan(sources, targets)
    loads = [
        sum(p.nbytes for p in plan.pieces() if p.source == source) for source in (0, 1)
    ]
    assert abs(loads[0] - loads[1]) < 0.3 * sum(loads)


def test_a_rank_of_the_same_process_is_preferred() -> None:
    sources = manifests(Side(copies=2), "trainer")
    targets = manifests(Side(), "engine")
    near = dataclasses.replace(sources[1].location, process=1)
    sources[1].location = targets[0].location = near
    assert {piece.source for piece in Plan(sources, targets).pieces()} == {1}


def renamed(manifest: Manifest, index: int, **changes: object) -> None:
    shard = manifest.shards[index]
    manifest.shards[index] = dataclasses.replace(shard, **changes)  # type: ignore[arg-type]


def test_what_differs_is_named() -> None:
    """In one error, with names and shapes of both sides."""
    sources, targets = manifests(Side(), "trainer"), manifests(Side(), "engine")
    renamed(sources[0], 0, names=("layers.0.other",))
    renamed(sources[0], 1, layout=layout((8, 12), Box((0, 0), (0, 0), (8, 12))))
    with pytest.raises(ValueError) as error:
        Plan(sources, targets)
    message = str(error.value)
    assert "1 missing in the trainer: layers.0.norm" in message
    assert "1 missing in the engine: layers.0.other" in message
    assert "layers.0.up ([16, 12] in the engine, [8, 12] in the trainer)" in message


def test_a_part_that_no_rank_holds_is_named() -> None:
    sources, targets = manifests(Side(tp=2), "trainer"), manifests(Side(), "engine")
    with pytest.raises(ValueError, match=r"elements of layers\.0\.up from \[8, 0\]"):
        Plan(sources[:1], targets)


def test_tied_tensors_under_either_name() -> None:
    """One tensor of the trainer fills both of an engine, and the other way round."""
    box = Box((0, 0), (0, 0), (4, 2))
    both = [Shard(("embedding", "head"), layout((4, 2), box))]
    apart = [Shard((name,), layout((4, 2), box)) for name in ("embedding", "head")]
    location = Location("machine", 1, "cpu", ())
    tied, untied = Manifest(location, both), Manifest(location, apart)
    filled = [p.target_shard for p in Plan([tied], [untied]).pieces()]
    assert filled == [0, 1]
    with pytest.raises(ValueError, match="tied in the engine.*: embedding and head"):
        Plan([untied], [tied])


def test_a_manifest_survives_its_bytes() -> None:
    known: dict[bytes, list[Shard]] = {}
    for manifest in manifests(Side(tp=2, fsdp=3, copies=2), "trainer"):
        read = Manifest.from_bytes(manifest.to_bytes(), known)
        assert read.location == manifest.location
        assert read.shards == manifest.shards
    assert len(known) == 6  # copies share what was read


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("shape", [(), (7,), (3, 16), (5, 3)])
def test_a_checksum_depends_on_bits_and_not_on_strides(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    values = torch.randint(-100, 100, (*shape, 2)).to(dtype)
    strided, plain = values[..., 0], values[..., 0].clone()
    shifted = torch.empty(plain.numel() + 1, dtype=dtype)[1:].view(shape)
    shifted.copy_(plain)
    sums = {int(checksum(block)) for block in (strided, plain, shifted)}
    assert len(sums) == 1
    plain.view(-1)[0] += 1
    assert int(checksum(plain)) not in sums
