# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
from types import SimpleNamespace

import torch
from torch import nn

from vllm.device_allocator.sleep_tensors import tensors_to_keep
from vllm.v1.worker.gpu_worker import Worker


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("saved", torch.ones(1))
        self.constant = torch.ones(2)

    def unregistered_tensors(self):
        yield "constant", self.constant


def test_buffers_and_what_the_model_names():
    assert [name for name, _ in tensors_to_keep(Constant())] == ["saved", "constant"]
    assert [name for name, _ in tensors_to_keep(nn.BatchNorm1d(2))] == [
        "running_mean",
        "running_var",
        "num_batches_tracked",
    ]


def test_the_worker_restores_them(monkeypatch):
    model = Constant()
    kept = (model.saved, model.constant)

    def suspend(level):
        for tensor in kept:
            tensor.fill_(float("nan"))

    worker = object.__new__(Worker)
    worker.model_runner = SimpleNamespace(model=model)
    worker._sleep_mode_backend = SimpleNamespace(suspend=suspend, resume=lambda _: None)
    config = SimpleNamespace(
        enable_nccl_comm_suspend=False, sleep_preserve_parameter_names=None
    )
    worker.model_config = config
    worker.vllm_config = SimpleNamespace(model_config=config)
    worker._sleep_saved_draft_buffers = {}
    monkeypatch.setattr(Worker, "get_draft_model", lambda _: None)
    monkeypatch.setattr(Worker, "synchronize_device", lambda _: None)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (0, 0))
    worker.sleep(level=2)
    assert all(tensor.isnan().all() for tensor in kept)
    worker.wake_up(tags=["weights"])
    assert all(bool((tensor == 1).all()) for tensor in kept)
