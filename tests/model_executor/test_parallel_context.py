# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from vllm.config import ParallelConfig
from vllm.model_executor.parallel_context import ParallelContext


def test_outside_vllm_there_is_one_process():
    context = ParallelContext()
    assert context.world_size == 1
    assert context.get_tensor_parallel_world_size() == 1
    assert context.get_pipeline_parallel_world_size() == 1
    assert context.get_data_parallel_size() == 1
    assert context.get_tensor_parallel_rank() == 0
    assert context.get_pipeline_parallel_rank() == 0
    assert context.get_data_parallel_rank() == 0
    assert context.get_tp_process_group() is None
    assert context.get_pp_process_group() is None
    assert context.get_dp_process_group() is None
    assert context.get_ep_process_group() is None
    assert context.get_pcp_process_group() is None
    assert context.get_dcp_process_group() is None
    assert context.is_first_stage and context.is_last_stage
    assert context.layer_range(5) == range(5)


@pytest.mark.parametrize("what", ["device_mesh", "megatron_groups"])
def test_what_needs_groups_says_so(what):
    with pytest.raises(RuntimeError, match=f"{what}.. needs process groups"):
        getattr(ParallelContext(), what)()


def test_sizes_come_from_the_config_without_process_groups():
    config = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=3)
    context = ParallelContext.from_config(config)
    assert context.get_tensor_parallel_world_size() == 2
    assert context.get_pipeline_parallel_world_size() == 3
    assert context.world_size == 6
    assert context.get_tensor_parallel_rank() == 0


def test_context_parallel_sizes():
    config = ParallelConfig(tensor_parallel_size=2, prefill_context_parallel_size=3)
    context = ParallelContext.from_config(config)
    assert context.prefill_context_parallel_size == 3
    assert context.world_size == config.world_size == 6
    config = ParallelConfig(tensor_parallel_size=4, decode_context_parallel_size=2)
    context = ParallelContext.from_config(config)
    assert context.decode_context_parallel_size == 2
    assert context.world_size == config.world_size == 4


@pytest.mark.parametrize(
    ("is_moe_model", "size"), [(True, 2), (None, 2), (False, 1)], ids=str
)
def test_only_a_mixture_of_experts_has_expert_parallelism(is_moe_model, size):
    config = ParallelConfig(tensor_parallel_size=2, enable_expert_parallel=True)
    config.is_moe_model = is_moe_model
    assert ParallelContext.from_config(config).expert_parallel_size == size


def test_immutable_and_picklable():
    context = ParallelContext(tensor_parallel_size=4, tensor_parallel_rank=3)
    assert pickle.loads(pickle.dumps(context)) == context
    with pytest.raises(FrozenInstanceError):
        context.tensor_parallel_rank = 0


def test_layer_range_is_vllms_split(monkeypatch):
    def ranges():
        return [
            ParallelContext(
                pipeline_parallel_size=3, pipeline_parallel_rank=rank
            ).layer_range(7)
            for rank in range(3)
        ]

    assert [i for stage in ranges() for i in stage] == list(range(7))
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "4,2,1")
    assert ranges() == [range(4), range(4, 6), range(6, 7)]
    assert ParallelContext().layer_range(7) == range(7)


def check_groups(context: ParallelContext) -> None:
    rank = torch.distributed.get_rank()
    assert context.get_tensor_parallel_rank() == rank % 2
    assert context.get_pipeline_parallel_rank() == rank // 2
    assert context.is_first_stage == (rank < 2)
    assert context.is_last_stage == (rank >= 2)
    assert context.layer_range(4) == (range(2) if rank < 2 else range(2, 4))

    def summed(group):
        tensor = torch.tensor(rank)
        torch.distributed.all_reduce(tensor, group=group)
        return int(tensor)

    assert summed(context.get_tp_process_group()) == (1 if rank < 2 else 5)
    assert summed(context.get_pp_process_group()) == (2 if rank % 2 == 0 else 4)
    assert summed(context.get_dp_process_group()) == rank
    groups = context.megatron_groups()
    assert groups.tp is context.get_tp_process_group()
    assert groups.pp is context.get_pp_process_group()
    assert groups.cp.size() == groups.ep.size() == 1
    with torch.device("meta"):  # the default device of a factory is the worker's
        mesh = context.device_mesh()
    assert mesh.mesh_dim_names == ("dp", "pp", "pcp", "tp")
    assert mesh.shape == (1, 2, 1, 2)
    assert mesh.get_local_rank("pp") == rank // 2
    assert mesh.get_local_rank("tp") == rank % 2
    for axis in ("tp", "pp", "dp"):
        group = getattr(context, f"get_{axis}_process_group")()
        assert mesh[axis].get_group() is group
    assert pickle.loads(pickle.dumps(context)) == context


def test_ranks_and_groups_of_two_by_two(tmp_path):
    run_ranks(check_groups, tmp_path, tensor_parallel_size=2, pipeline_parallel_size=2)


def check_expert_groups(context: ParallelContext) -> None:
    rank = torch.distributed.get_rank()
    assert context.data_parallel_size == 2 and context.data_parallel_rank == rank // 2
    assert context.expert_parallel_size == 4 and context.expert_parallel_rank == rank
    assert context.get_ep_process_group().size() == 4
    assert context.device_mesh().shape == (2, 1, 1, 2)
    groups = context.megatron_groups()
    assert groups.ep is groups.tp_ep is context.get_ep_process_group()
    assert groups.tp_dp_cp is groups.ep  # all ranks of a stage
    assert groups.expt_tp.size() == groups.expt_dp.size() == 1


def train(model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Two steps of gradient descent; the parameters afterwards, in full."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [
        p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()
    ]


def check_training_on_the_mesh(context: ParallelContext) -> None:
    check_expert_groups(context)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    torch.manual_seed(1)
    batch = torch.randn(6, 8)
    mesh = context.device_mesh()
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(build(), mesh["tp"], plan)
    fully_shard(model, mesh=mesh["dp"])
    mine = batch.chunk(2)[context.data_parallel_rank]
    for ours, whole in zip(train(model, mine), train(build(), batch), strict=True):
        torch.testing.assert_close(ours, whole)


def test_fsdp_and_tensor_parallelism_on_the_mesh(tmp_path):
    run_ranks(
        check_training_on_the_mesh,
        tmp_path,
        tensor_parallel_size=2,
        data_parallel_size=2,
        enable_expert_parallel=True,
    )
