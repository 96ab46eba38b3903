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
    outputs = []
    for q_i, k_i, v_i in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        scores = scores_of(layer, q_i, k_i, sinks)
        probs = scores.softmax(-1)[..., : len(q_i)]
        v_i = v_i.repeat_interleave(layer.num_heads // layer.num_kv_heads, dim=1)
        outputs.append(torch.einsum("hqk,khd->qhd", probs, v_i))
    return torch.cat(outputs)


def scores_of(
    layer: TrainableAttention,
    q: torch.Tensor,  # [tokens, heads, head_dim] of one sequence
    k: torch.Tensor,  # [tokens, kv_heads, head_dim]
    sinks: torch.Tensor | None,  # [heads]
) -> torch.Tensor:
    """What the softmax is taken of, `[heads, queries, keys]`; sinks are a last key."""
    k = k.repeat_interleave(layer.num_heads // layer.num_kv_heads, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * layer.scale
    if (cap := layer.logits_soft_cap) is not None:
        scores = cap * torch.tanh(scores / cap)
    index = torch.arange(len(q), device=q.device)
    distance = index[:, None] - index
    hidden = distance < 0 if layer.causal else torch.zeros_like(distance).bool()
    if layer.sliding_window is not None:
        hidden |= distance.abs() >= layer.sliding_window
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        sink = sinks.to(q.dtype).view(-1, 1, 1).expand(-1, len(q), 1)
        scores = torch.cat((scores, sink), dim=-1)
    return scores
