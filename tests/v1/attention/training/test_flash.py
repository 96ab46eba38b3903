# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which calls flash attention takes; what it computes is in test_flash_gpu.py."""

import torch

from vllm.v1.attention.training import flash
from vllm.v1.attention.training.flash import dropout_unsupported, unsupported
from vllm.v1.attention.training.kernel import AttentionParams

PARAMS = AttentionParams(
    scale=0.125,
    causal=True,
    sliding_window=None,
    logits_soft_cap=None,
    dropout=0.0,
    deterministic=False,
)


def test_what_the_kernel_cannot_do_is_named(monkeypatch):
    q = torch.empty(4, 2, 64, dtype=torch.bfloat16)
    assert unsupported(q, PARAMS._replace(dropout=0.1)) == "dropout"
    monkeypatch.setattr(flash, "_fa_version", lambda head_dim: 2)
    assert unsupported(q, PARAMS) is None
    sinks = torch.zeros(2)
    assert unsupported(q, PARAMS._replace(sinks=sinks)) == "attention sinks"
    assert unsupported(q, PARAMS._replace(logits_soft_cap=30.0)) is None


def test_what_dropout_cannot_do_is_named():
    q = torch.empty(4, 2, 64, dtype=torch.bfloat16)
    assert dropout_unsupported(q, PARAMS) is None
    assert dropout_unsupported(q.float(), PARAMS) == "torch.float32"
    capped = PARAMS._replace(logits_soft_cap=30.0)
    assert dropout_unsupported(q, capped) == "a soft cap"
    sinks = PARAMS._replace(sinks=torch.zeros(2))
    assert dropout_unsupported(q, sinks) == "attention sinks"


def test_dtypes_and_head_sizes_that_it_does_not_take():
    assert unsupported(torch.empty(4, 2, 64), PARAMS) == "torch.float32"
    for head_dim in (60, 264):
        q = torch.empty(4, 2, head_dim, dtype=torch.bfloat16)
        assert unsupported(q, PARAMS) == f"head_dim {head_dim}"
    q = torch.empty(4, 2, 256, dtype=torch.bfloat16)
    window = PARAMS._replace(sliding_window=100)
    assert unsupported(q, window) == "a sliding window at head_dim 256"
