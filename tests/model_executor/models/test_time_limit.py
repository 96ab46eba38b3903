# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The time limit of a factory, in a worker and in other processes."""

import multiprocessing
import signal
import time
from types import SimpleNamespace

import pytest

from vllm.model_executor.models.callable_model.time_limit import time_limit
from vllm.v1.engine import startup_failure


def test_a_task_is_stopped_where_it_hangs(monkeypatch):
    monkeypatch.setenv("VLLM_MODEL_FACTORY_TIMEOUT_S", "0.1")
    with (
        pytest.raises(TimeoutError, match="the task took longer than 0.1 s") as error,
        time_limit("the task"),
    ):
        time.sleep(60)
    lines = str(error.value).splitlines()
    assert __file__ in lines[1]
    assert "time.sleep(60)" in lines[2]


@pytest.mark.parametrize("limit", ["0", "60"])
def test_a_task_within_its_limit(monkeypatch, limit):
    monkeypatch.setenv("VLLM_MODEL_FACTORY_TIMEOUT_S", limit)
    with time_limit("the task"):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_factory_has_no_time_limit_by_default(monkeypatch):
    monkeypatch.delenv("VLLM_MODEL_FACTORY_TIMEOUT_S", raising=False)
    with time_limit("the factory"):
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def hang_as_a_worker(ready_pipe):
    startup_failure.begin_worker(0, ready_pipe)
    with time_limit("the factory"):
        time.sleep(60)


def test_a_worker_reports_where_it_hangs(monkeypatch):
    monkeypatch.setenv("VLLM_MODEL_FACTORY_TIMEOUT_S", "0.1")
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=hang_as_a_worker, args=(writer,))
    process.start()
    writer.close()
    with pytest.raises(startup_failure.StartupError) as error:
        list(startup_failure.receive({reader: SimpleNamespace(rank=0, proc=process)}))
    assert "the factory took longer than 0.1 s" in str(error.value)
    assert "time.sleep(60)" in str(error.value)
    assert "(on worker rank 0, while setting up" in str(error.value)
    process.join()
    assert process.exitcode == 1
