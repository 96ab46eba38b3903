# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import os
from types import SimpleNamespace

import pytest
import torch

from vllm.platforms import current_platform

if not current_platform.is_cpu():  # it replaces functions of torch.cuda
    pytest.skip("needs vLLM for a CPU", allow_module_level=True)

from vllm.v1.worker import cpu_worker  # noqa: E402


class ReachedError(Exception):
    """The worker joins its process group."""


@pytest.mark.parametrize(
    ("init_method", "expected"),
    [("env://", "29512"), ("tcp://127.0.0.1:4567", "4567")],
)
def test_shared_memory_is_named_after_the_job(monkeypatch, init_method, expected):
    """Two jobs of a launcher on one host do not share the name."""

    def join(*args: object) -> None:
        raise ReachedError

    monkeypatch.setattr(cpu_worker, "init_worker_distributed_environment", join)
    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads)
    monkeypatch.setenv("MASTER_PORT", "29512")
    monkeypatch.setenv("VLLM_DIST_IDENT", "")
    worker = SimpleNamespace(
        distributed_init_method=init_method,
        local_omp_cpuid="nobind",
        vllm_config=SimpleNamespace(speculative_config=None),
        rank=0,
        local_rank=0,
    )
    with pytest.raises(ReachedError):
        cpu_worker.CPUWorker.init_device(worker)
    assert os.environ["VLLM_DIST_IDENT"] == expected
