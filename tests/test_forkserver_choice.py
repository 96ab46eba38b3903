# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import pytest

from vllm import envs


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_may_be_started_by(method, monkeypatch):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", method)
    get = envs.environment_variables["VLLM_WORKER_MULTIPROC_METHOD"]
    assert get() == method


def test_another_method_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "thread")
    with pytest.raises(ValueError, match="forkserver"):
        envs.environment_variables["VLLM_WORKER_MULTIPROC_METHOD"]()
