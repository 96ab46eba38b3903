# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from ranks import run_ranks

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
    mesh = context.device_mesh()
    assert mesh.mesh_dim_names == ("tp",) and mesh.size() == 2
    assert pickle.loads(pickle.dumps(context)) == context


def test_ranks_and_groups_of_two_by_two(tmp_path):
    run_ranks(check_groups, tmp_path, tensor_parallel_size=2, pipeline_parallel_size=2)
