# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sums over ranks whose GPUs read each other's memory have the bits of the tree.

The kernel runs in Triton's interpreter on a CPU, where one process has what all ranks
have; between two GPUs (`-m gpu`) all of it runs.
"""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from ranks import run_ranks
from torch.distributed import ProcessGroup
from triton_interpreter import interpret

from vllm.distributed.parallel_state import GroupCoordinator, get_tp_group
from vllm.model_executor.layers.tree_linear.product import tree_total
from vllm.model_executor.parallel_context import ParallelContext


def interpreted() -> list[bool]:
    from vllm.model_executor.layers.tree_linear.peer_sums import run_sum

    equal = []
    for ranks in (1, 2, 4, 8):
        for dtype in (torch.float32, torch.float16):
            parts = torch.randn(ranks, 67, 150)
            bias = torch.randn(150, dtype=dtype)
            addresses = torch.tensor([part.data_ptr() for part in parts])
            for given in (bias, None):
                out = torch.empty(67, 150, dtype=dtype)
                run_sum(addresses, given, out)
                equal.append(torch.equal(out, tree_total(parts, given, dtype)))
    return equal


def test_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton.runtime.interpreter")
    equal = interpret(__file__, "interpreted")
    assert len(equal) == 16 and all(equal)


def test_a_rank_that_cannot_share_its_memory(tmp_path: Path) -> None:
    """All ranks take the other way. The GPUs are stood in for."""
    run_ranks(room_of_one_that_fails, tmp_path, tensor_parallel_size=2)


def room_of_one_that_fails(context: ParallelContext) -> None:
    from vllm.model_executor.layers.tree_linear import peer_sums

    def make(failing: list[int], group: ProcessGroup, device: torch.device) -> str:
        if group.rank() in failing:
            raise RuntimeError("pidfd_getfd: Operation not permitted")
        return "room"

    group = get_tp_group().device_group
    platform = SimpleNamespace(
        is_cuda=lambda: True,
        is_fully_connected=lambda devices: devices == [0, 0],
        visible_device_id_to_physical_device_id=int,
    )
    with (
        patch.object(peer_sums, "current_platform", platform),
        patch.object(torch.cuda, "current_device", lambda: 0),
    ):
        for failing, expected in (([1], None), ([], "room")):
            with patch.object(peer_sums, "PeerRoom", partial(make, failing)):
                peer_sums.room_of.cache_clear()
                assert peer_sums.room_of(group) == expected
    peer_sums.room_of.cache_clear()


@pytest.mark.gpu(2)
def test_between_gpus(tmp_path: Path) -> None:
    run_ranks(compare_with_a_gather, tmp_path, tensor_parallel_size=2)


def compare_with_a_gather(context: ParallelContext) -> None:
    from vllm.model_executor.layers.tree_linear import peer_sums

    group = get_tp_group()
    assert peer_sums.room_of(group.device_group) is not None
    longest = peer_sums.ROOM // 4 // 1000
    for rows in (1, 67, longest, 3 * longest + 5):
        for dtype in (torch.bfloat16, torch.float32):
            torch.manual_seed(group.rank_in_group)
            local = torch.randn(rows, 1000)
            torch.manual_seed(0)
            bias = torch.randn(1000, dtype=dtype)
            parts = group.all_gather(local[None], dim=0)
            for given in (bias, None):
                expected = tree_total(parts, given, dtype)
                assert torch.equal(total(group, local, given, dtype), expected)
    replay_many_times(group)


def replay_many_times(group: GroupCoordinator) -> None:
    """One room serves many sums of a graph, whose inputs differ in each replay."""
    locals_ = [torch.zeros(rows, 1000) for rows in (7, 300, 1)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [total(group, local, None, torch.bfloat16) for local in locals_]
    for replay in range(50):
        torch.manual_seed(100 * replay + group.rank_in_group)
        for local in locals_:
            local.normal_()
        graph.replay()
        for local, sum_ in zip(locals_, found, strict=True):
            parts = group.all_gather(local[None], dim=0)
            assert torch.equal(sum_, tree_total(parts, None, torch.bfloat16)), replay


def total(
    group: GroupCoordinator,
    local: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    name = group.device_group.group_name
    return torch.ops.vllm.tree_total_of_ranks(local, bias, dtype, name)
