# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which blocks of a whole tensor each rank holds, for everything that divides one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.layout import Layout, layout_of
from vllm.training.layouts import divided_parameters

RANKS = 4


@contextmanager
def as_rank(rank: int, ranks: int = RANKS) -> Iterator[None]:
    """Of a group whose collectives do nothing."""
    _clear_sharding_prop_cache()  # it knows the mesh as another rank saw it
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def assert_partition(layouts: list[Layout], copies: int = 1) -> None:
    """The first replicas of all ranks have each element once, or `copies` times."""
    counts = torch.zeros(layouts[0].shape, dtype=torch.int64)
    for layout in layouts:
        assert layout.shape == counts.shape
        for box in layout.boxes:
            if box.replica == 0:
                box.of_whole(counts).add_(1)
    assert (counts == copies).all()


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape)


@pytest.mark.parametrize(
    ("shape", "placements"),
    [
        ((8, 6), (Shard(0), Shard(1))),
        ((9, 6), (Replicate(), Shard(0))),  # uneven
        ((3, 5), (Shard(0), Shard(0))),  # a rank has nothing
        ((5,), (Replicate(), Replicate())),
    ],
    ids=str,
)
def test_dtensor(shape: tuple[int, ...], placements: tuple[Any, Any]) -> None:
    whole, layouts = numbered(*shape), []
    for rank in range(RANKS):
        with as_rank(rank):
            mesh = init_device_mesh("cpu", (2, 2))
            tensor = distribute_tensor(whole, mesh, placements, src_data_rank=None)
            layout = layout_of(nn.Parameter(tensor), nn.Module(), ParallelContext())
            assert layout.holds(tensor.to_local(), whole)
            assert layout.local_shape == tensor.to_local().shape
            layouts.append(layout)
    assert_partition(layouts)


def test_fsdp_of_tensor_parallel_layers() -> None:
    """FSDP2 cuts what tensor parallelism has cut along the same axis, too."""
    found: dict[str, list[Layout]] = {}
    for rank in range(RANKS):
        with as_rank(rank):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 7), nn.LayerNorm(7))
            whole = {n: p.detach().clone() for n, p in model.named_parameters()}
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
            plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
            parallelize_module(model, mesh["model"], plan, src_data_rank=None)
            fully_shard(model, mesh=mesh["data"])
            for name, parameter in model.named_parameters():
                layout = layout_of(parameter, nn.Module(), ParallelContext())
                assert isinstance(parameter, DTensor)
                assert layout.holds(parameter.to_local(), whole[name]), name
                found.setdefault(name, []).append(layout)
    for name, layouts in found.items():
        # The mesh of the norm, which only FSDP cuts, has no model ranks.
        assert_partition(layouts, copies=2 if name.startswith("2.") else 1)


def test_a_pending_sum_is_refused() -> None:
    with as_rank(0):
        mesh = DeviceMesh("cpu", list(range(RANKS)))
        tensor = DTensor.from_local(torch.ones(2), mesh, [Partial()])
        with pytest.raises(ValueError, match="Partial"):
            layout_of(tensor, nn.Module(), ParallelContext())


@pytest.mark.parametrize(("axis", "stride"), [(0, 1), (0, 2), (1, 1)])
def test_megatron(axis: int, stride: int) -> None:
    whole, layouts = numbered(16, 8), []
    for rank in range(RANKS):
        context = ParallelContext(tensor_parallel_size=RANKS, tensor_parallel_rank=rank)
        chunks = whole.chunk(stride * RANKS, axis)[rank::RANKS]
        local = torch.cat(chunks, axis)
        local.tensor_model_parallel = True  # type: ignore[attr-defined]
        local.partition_dim = axis  # type: ignore[attr-defined]
        local.partition_stride = stride  # type: ignore[attr-defined]
        layout = layout_of(local, nn.Module(), context)
        assert layout.holds(local, whole)
        layouts.append(layout)
    assert_partition(layouts)


def layer(kind: type[nn.Module], rank: int, **sizes: Any) -> nn.Module:
    """One of vLLM's, with the attributes that say how it divides a weight."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    made.__dict__.update(tp_rank=rank, tp_size=RANKS, **sizes)
    return made


def qkv(rank: int) -> tuple[nn.Module, int]:
    """8 query heads and 2 of keys, which two ranks have; values are narrower."""
    sizes = {
        "num_heads": 2,
        "num_kv_heads": 1,
        "num_kv_head_replicas": 2,
        "head_size": 6,
        "v_head_size": 4,
    }
    return layer(QKVParallelLinear, rank, **sizes), 2 * 6 + 6 + 4


def merged(rank: int) -> tuple[nn.Module, int]:
    return layer(MergedColumnParallelLinear, rank, output_sizes=[8, 12]), 5


def vocabulary(rank: int) -> tuple[nn.Module, int]:
    """10 words and padding: 4, 4, 2, 0 of 4 rows."""
    start = min(4 * rank, 10)
    shard = SimpleNamespace(
        org_vocab_start_index=start, num_org_elements=min(4, 10 - start)
    )
    sizes = {"org_vocab_size": 10, "shard_indices": shard}
    return layer(VocabParallelEmbedding, rank, **sizes), 4


@pytest.mark.parametrize(
    ("build", "size"), [(qkv, 48 + 12 + 8), (merged, 20), (vocabulary, 10)]
)
def test_rows_of_layers(
    build: Callable[[int], tuple[nn.Module, int]], size: int
) -> None:
    layouts = []
    for rank in range(RANKS):
        owner, rows = build(rank)
        parameter = nn.Parameter(torch.zeros(rows, 3))
        parameter.output_dim = 0  # type: ignore[attr-defined]
        layout = layout_of(parameter, owner, ParallelContext())
        assert layout.shape == (size, 3)
        layouts.append(layout)
    assert_partition(layouts)


def test_columns_of_layers() -> None:
    layouts = []
    for rank in range(RANKS):
        owner = layer(RowParallelLinear, rank, input_size_per_partition=2)
        parameter = nn.Parameter(torch.zeros(3, 2))
        parameter.input_dim = 1  # type: ignore[attr-defined]
        layouts.append(layout_of(parameter, owner, ParallelContext()))
    assert_partition(layouts)


def test_training_follows_the_same_layouts() -> None:
    """Of vLLM's, Megatron's and DTensor's parameters; whole ones are left out."""
    with as_rank(1):
        mesh = DeviceMesh("cpu", list(range(RANKS)))
        model, (fused, rows) = nn.Module(), qkv(1)
        fused.weight = nn.Parameter(torch.zeros(rows, 3))
        fused.weight.output_dim = 0  # type: ignore[attr-defined,union-attr]
        model.qkv, model.norm = fused, nn.LayerNorm(3)
        model.split = nn.Parameter(
            distribute_tensor(numbered(8, 2), mesh, [Shard(0)], src_data_rank=None)
        )
        model.marked = nn.Parameter(torch.zeros(2, 3))
        model.marked.tensor_model_parallel = True  # type: ignore[attr-defined]
        model.marked.partition_dim = 0  # type: ignore[attr-defined]
        model.marked.partition_stride = 1  # type: ignore[attr-defined]
        place = ParallelContext(tensor_parallel_size=RANKS, tensor_parallel_rank=1)
        layouts = divided_parameters(model, place)
    assert {name: tuple(layout.shape) for name, layout in layouts.items()} == {
        "qkv.weight": (68, 3),
        "split": (8, 2),
        "marked": (8, 3),
    }
