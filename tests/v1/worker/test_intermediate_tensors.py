# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
from types import SimpleNamespace

import torch

from vllm.sequence import IntermediateTensors
from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def test_buffers_are_allocated_by_their_first_use():
    """A worker that skips the dummy run has none when the first step comes."""

    def make_empty(batch_size: int, dtype: torch.dtype, device: torch.device):
        shape = (batch_size, 4)  # [tokens, hidden_size]
        hidden = torch.zeros(shape, dtype=dtype, device=device)
        return IntermediateTensors({"hidden_states": hidden})

    runner = SimpleNamespace(
        intermediate_tensors=None,
        model=SimpleNamespace(make_empty_intermediate_tensors=make_empty),
        max_num_tokens=8,
        model_config=SimpleNamespace(dtype=torch.float32),
        device=torch.device("cpu"),
    )
    received = IntermediateTensors({"hidden_states": torch.ones(3, 4)})
    gathered = GPUModelRunner.sync_and_gather_intermediate_tensors(
        runner, 3, received, sync_self=True
    )
    assert torch.equal(gathered["hidden_states"], torch.ones(3, 4))
    assert runner.intermediate_tensors["hidden_states"].shape == (8, 4)
    kept = runner.intermediate_tensors
    GPUModelRunner.sync_and_gather_intermediate_tensors(runner, 3, received, True)
    assert runner.intermediate_tensors is kept
