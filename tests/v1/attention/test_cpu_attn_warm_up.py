# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
from types import SimpleNamespace

import torch

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl


def test_a_warm_up_step_returns_zeros():
    layer = impl = SimpleNamespace()  # without metadata nothing is asked of them
    qkv = torch.ones(3, 2, 32)  # [tokens, heads, head_dim]
    output = torch.full((3, 64), float("nan"))
    returned = CPUAttentionBackendImpl.forward(
        impl, layer, qkv, qkv, qkv, torch.empty(0), None, output
    )
    assert torch.equal(returned, torch.zeros(3, 64))
