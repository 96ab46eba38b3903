# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The Triton gradient against autograd in float64, in Triton's interpreter on a CPU.

test_flash_gpu.py runs the compiled kernels.
"""

import pytest
import torch
import torch.nn.functional as F
from attention_definition import attention, scores_of
from torch import nn
from triton_interpreter import interpret

from vllm.model_executor.layers import TrainableAttention

pytest.importorskip("triton.runtime.interpreter")

CASES = {
    "causal, grouped heads": (64, 2, True, (-1, -1), 0.0, False),
    "not causal": (64, 4, False, (-1, -1), 0.0, False),
    "window, sinks, one KV head": (96, 1, True, (20, 0), 0.0, True),
    "window on both sides, soft cap": (80, 2, False, (20, 20), 2.0, False),
    "causal, soft cap": (128, 2, True, (-1, -1), 2.0, False),
    "large heads": (256, 2, True, (-1, -1), 0.0, False),
}
LENGTHS = (0, 1, 130, 0, 65)


def errors() -> dict[str, list[float]]:
    """Relative errors of dQ, dK and dV, for each case; run by the interpreter."""
    from vllm.v1.attention.training.triton_backward import attention_backward

    torch.manual_seed(0)
    found = {}
    tokens, heads = sum(LENGTHS), 4
    cu_seqlens = F.pad(torch.tensor(LENGTHS).cumsum(0, dtype=torch.int32), (1, 0))
    for name, (head_dim, kv_heads, causal, window, cap, sinks) in CASES.items():
        layer = TrainableAttention(
            heads,
            head_dim,
            kv_heads,
            causal=causal,
            sliding_window=window[0] + 1 if window[0] >= 0 else None,
            logits_soft_cap=cap or None,
            sinks=sinks,
        )
        if layer.sinks is not None:
            nn.init.normal_(layer.sinks)
        q, k, v = (
            torch.randn(tokens, n, head_dim).half() for n in (heads, kv_heads, kv_heads)
        )
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        sink = None if layer.sinks is None else layer.sinks.detach().double()
        out = attention(layer, *exact, sink, LENGTHS)
        grad = torch.randn_like(out).half()
        expected = torch.autograd.grad(out, exact, grad.double())
        lse = log_sum_exp(layer, *exact[:2], sink).detach().float()
        ours = attention_backward(
            grad,
            q,
            k,
            v,
            out.detach().half(),
            lse,
            cu_seqlens,
            max(LENGTHS),
            layer.scale,
            causal,
            window,
            cap,
        )
        found[name] = [
            float((x.double() - y).norm() / y.norm())
            for x, y in zip(ours, expected, strict=True)
        ]
    return found


def log_sum_exp(
    layer: TrainableAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Of each query's scores, `[heads, tokens]`."""
    return torch.cat(
        [
            scores_of(layer, q_i, k_i, sinks).logsumexp(-1)
            for q_i, k_i in zip(q.split(LENGTHS), k.split(LENGTHS), strict=True)
        ],
        dim=1,
    )


def test_gradients_in_the_interpreter() -> None:
    found = interpret(__file__, "errors")
    assert found.keys() == CASES.keys()
    for name, relative in found.items():
        # float16 has 11 bits: half a unit in the last place is 4.9e-4.
        assert max(relative) < 4.9e-4, (name, relative)
