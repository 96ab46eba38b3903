# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A killed program leaves no engine core and no worker."""

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm.utils import process_lifetime

# A program that starts one child and waits; the child says its number and hangs as a
# starting engine core or worker may.
PROGRAM = """
import multiprocessing, os, sys, time

def hang(*args, **kwargs):
    print(os.getpid(), flush=True)
    time.sleep(600)

def engine_core(_):
    from vllm.v1.engine import core
    core.maybe_register_config_serialize_by_value = hang
    core.EngineCoreProc.run_engine_core(vllm_config=None)

def worker(pipes):
    from types import SimpleNamespace
    from vllm.v1.executor import multiproc_executor as executor
    executor.set_worker_net_device = lambda *args: None
    executor.maybe_init_worker_tracer = hang
    parallel_config = SimpleNamespace(assigned_physical_gpu_ids=None)
    vllm_config = SimpleNamespace(parallel_config=parallel_config)
    death_pipe, ready_pipe = pipes
    executor.WorkerProc.worker_main(
        rank=0, vllm_config=vllm_config, death_pipe=death_pipe, ready_pipe=ready_pipe
    )

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    death, to_close = context.Pipe(duplex=False)
    _, ready = context.Pipe(duplex=False)
    target = {"engine_core": engine_core, "worker": worker}[sys.argv[1]]

    def child():
        to_close.close()
        target((death, ready))

    process = context.Process(target=child)
    process.start()
    process.join()
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # nobody may be there to wait for it


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["engine_core", "worker"])
def test_a_child_ends_with_the_process_it_works_for(kind):
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, kind], stdout=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    child = 0
    while not child:  # past what vLLM logs
        line = program.stdout.readline()
        assert line, f"the program ended with {program.wait()}"
        child = int(line) if line.strip().isdigit() else 0
    try:
        assert is_running(child)
        program.kill()
        program.wait()
        deadline = time.monotonic() + 60
        while is_running(child) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_running(child)
    finally:
        program.stdout.close()
        if is_running(child):
            os.kill(child, signal.SIGKILL)


def registers(path: Path) -> None:
    process_lifetime.exit_with_parent()
    atexit.register(path.touch)


def test_a_spawned_child_runs_what_was_registered_for_its_end(tmp_path):
    path = tmp_path / "ran"
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=registers, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert path.exists()
