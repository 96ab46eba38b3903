# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
from datetime import timedelta
from multiprocessing.shared_memory import SharedMemory
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing

from vllm.distributed.device_communicators import cpu_communicator
from vllm.platforms import current_platform


def join_group(rank: int, folder: str, name: str) -> None:
    current_platform.import_kernels()
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=5),
    )
    communicator = SimpleNamespace(
        device_group=torch.distributed.group.WORLD,
        unique_name=name,
        ranks=[0, 1],
        rank=rank,
        world_size=2,
    )
    shared = cpu_communicator._CPUSHMDistributed(communicator)
    tensor = torch.ones(64)
    shared.all_reduce(tensor)
    assert torch.equal(tensor, torch.full((64,), 2.0))
    torch.distributed.barrier()
    with pytest.raises(FileNotFoundError):
        SharedMemory(f"{shared.group_name}_{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not current_platform.is_cpu(), reason="needs a CPU build")
def test_segments_have_no_name_once_all_have_mapped_them(tmp_path, monkeypatch):
    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "init_shm_manager"):
        pytest.skip("this build has no shared memory operators")
    monkeypatch.setenv("VLLM_DIST_IDENT", tmp_path.name)
    torch.multiprocessing.spawn(join_group, (str(tmp_path), "tp:0"), nprocs=2)
