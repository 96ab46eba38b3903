# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import os

import pytest

from vllm import envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_may_be_started_by(method, monkeypatch):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", method)
    get = envs.environment_variables["VLLM_WORKER_MULTIPROC_METHOD"]
    assert get() == method
    VllmConfig()
    assert get() == method


def test_a_cpu_spawns_by_default(monkeypatch):
    if not current_platform.is_cpu():
        pytest.skip("other platforms fork by default")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")  # restored at the end
    del os.environ["VLLM_WORKER_MULTIPROC_METHOD"]
    VllmConfig()
    assert envs.VLLM_WORKER_MULTIPROC_METHOD == "spawn"


def test_another_method_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "thread")
    with pytest.raises(ValueError, match="forkserver"):
        envs.environment_variables["VLLM_WORKER_MULTIPROC_METHOD"]()
