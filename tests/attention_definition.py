# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What `TrainableAttention` computes, by the definition, for its tests."""

import torch

from vllm.model_executor.layers import TrainableAttention


def attention(
    layer: TrainableAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    lengths: tuple[int, ...],
) -> torch.Tensor:
    """Explicit scores and softmax, one sequence after another."""
    group = layer.num_heads // layer.num_kv_heads
    outputs = []
    for q_i, k_i, v_i in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        k_i, v_i = (x.repeat_interleave(group, dim=1) for x in (k_i, v_i))
        scores = torch.einsum("qhd,khd->hqk", q_i, k_i) * layer.scale
        if (cap := layer.logits_soft_cap) is not None:
            scores = cap * torch.tanh(scores / cap)
        index = torch.arange(len(q_i), device=q.device)
        distance = index[:, None] - index
        hidden = distance < 0 if layer.causal else torch.zeros_like(distance).bool()
        if layer.sliding_window is not None:
            hidden |= distance.abs() >= layer.sliding_window
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            sink = sinks.to(q.dtype).view(-1, 1, 1).expand(-1, len(q_i), 1)
            scores = torch.cat((scores, sink), dim=-1)
        probs = scores.softmax(-1)[..., : len(q_i)]
        outputs.append(torch.einsum("hqk,khd->qhd", probs, v_i))
    return torch.cat(outputs)
