# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import os
import subprocess
import sys

import pytest
import torch

from vllm.utils import fork_check
from vllm.utils.fork_check import forked_process_lacks_cuda
from vllm.utils.system_utils import get_mp_context


@pytest.fixture
def forks(monkeypatch):
    """The method is vLLM's default on a GPU, and restored at the end."""
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")


def parent_has_asked(monkeypatch, asked: bool) -> None:
    """What PyTorch says in a forked process, and only there."""
    parent = os.getpid()
    monkeypatch.setattr(fork_check.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "_is_in_bad_fork", lambda: asked and os.getpid() != parent
    )


@pytest.mark.parametrize("asked", [True, False])
def test_a_forked_process_tells(monkeypatch, asked):
    parent_has_asked(monkeypatch, asked)
    assert forked_process_lacks_cuda() is asked


def test_on_a_cpu_nothing_is_asked(monkeypatch):
    parent_has_asked(monkeypatch, True)
    monkeypatch.setattr(fork_check.current_platform, "is_cpu", lambda: True)
    assert not forked_process_lacks_cuda()


@pytest.mark.parametrize("asked, method", [(True, "spawn"), (False, "fork")])
def test_processes_are_spawned_where_a_fork_has_no_cuda(
    monkeypatch, forks, asked, method
):
    parent_has_asked(monkeypatch, asked)
    assert get_mp_context().get_start_method() == method


def test_a_fork_server_is_kept(monkeypatch):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "forkserver")
    parent_has_asked(monkeypatch, True)
    assert get_mp_context().get_start_method() == "forkserver"


# A program that starts a process as vLLM does, which has to be able to use its device.
PROGRAM = """
import sys

{first}
import torch

from vllm.utils.system_utils import get_mp_context


def use(device):
    torch.zeros(1, device=device)


if __name__ == "__main__":
    process = get_mp_context().Process(target=use, args=("{device}",))
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "first",
    [
        "import transformers.masking_utils",
        "import torch; torch.cuda.is_available()",
        "import torch; torch.accelerator.current_accelerator()",
    ],
)
def test_a_process_can_use_the_device_whatever_came_first(tmp_path, first, device):
    """Some of these lines, on some hosts, leave a forked process without CUDA."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(first=first, device=device))
    # vLLM, which is imported here, has set the second one.
    unset = ("VLLM_WORKER_MULTIPROC_METHOD", "PYTORCH_NVML_BASED_CUDA_CHECK")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    subprocess.run([sys.executable, program], env=environment, check=True)
