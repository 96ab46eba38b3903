# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention in blocks of queries, in plain PyTorch, for what no fused kernel takes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vllm.v1.attention.training.kernel import AttentionParams, sink_gradient
from vllm.v1.attention.training.sequences import Sequences

# Queries in a block. They are few, so that a causal block skips later keys, and fewer
# where the scores of all heads would take more than 16 MiB in float32.
_BLOCK_ROWS = 256
_MAX_BLOCK_SCORES = 1 << 22


class _BlockwiseAttention(torch.autograd.Function):
    """Attention in blocks of queries, with the log-sum-exp kept for the backward.

    It takes what PyTorch's fused kernels do not: a sliding window, a soft cap, dropout
    and attention sinks. Memory is linear in tokens, K and V are not expanded for
    grouped queries, and half precision is computed in float32. The backward recomputes
    the probabilities, as in FlashAttention (https://arxiv.org/abs/2205.14135), and
    draws the same dropout again from `seed`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,  # [tokens, heads, head_dim]
        k: torch.Tensor,  # [tokens, kv_heads, head_dim]
        v: torch.Tensor,  # [tokens, kv_heads, head_dim]
        sinks: torch.Tensor | None,  # [heads]
        lengths: tuple[int, ...],
        params: AttentionParams,
        seed: int,
    ) -> torch.Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[0], q.shape[1], dtype=_accumulation_dtype(q))
        blocks = _Blocks(q, k, v, lengths, params, seed)
        with torch.autocast(q.device.type, enabled=False):
            for rows, cols, mask, kept in blocks:
                scores, _ = blocks.scores(rows, cols, mask)
                block_lse = scores.logsumexp(-1, keepdim=True)
                if sinks is not None:
                    sink = sinks.to(lse.dtype).view(*scores.shape[:2], 1, 1)
                    block_lse = torch.logaddexp(block_lse, sink)
                probs = (scores - block_lse).exp_()
                if kept is not None:
                    probs *= kept
                out[rows] = blocks.ungroup(probs.flatten(1, 2) @ blocks.keys(v, cols))
                lse[rows] = blocks.ungroup(block_lse.flatten(1, 2)).squeeze(-1)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.lengths, ctx.params, ctx.seed = lengths, params._replace(sinks=None), seed
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        params = ctx.params
        # Each row is written once, by its block; keys are summed over blocks.
        grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        grad_k, grad_v = (
            torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (k, v)
        )
        blocks = _Blocks(q, k, v, ctx.lengths, params, ctx.seed)
        with torch.autocast(q.device.type, enabled=False):
            for rows, cols, mask, kept in blocks:
                scores, cap_slope = blocks.scores(rows, cols, mask)
                block_lse = blocks.group(lse[rows].unsqueeze(-1))
                probs = (scores - block_lse.unflatten(1, scores.shape[1:3])).exp_()
                grad_block = blocks.group(grad_out[rows])
                # The sum over keys of P * dP, without the scores.
                delta = (grad_block * blocks.group(out[rows])).sum(-1, keepdim=True)
                grad_probs = grad_block @ blocks.keys(v, cols).mT
                dropped = probs
                if kept is not None:
                    dropped = probs * kept
                    grad_probs = grad_probs * kept.flatten(1, 2)
                grad_v[cols] += (dropped.flatten(1, 2).mT @ grad_block).transpose(0, 1)
                grad_scores = probs.flatten(1, 2) * (grad_probs - delta)
                if cap_slope is not None:
                    grad_scores *= cap_slope.flatten(1, 2)
                grad_scores *= params.scale
                grad_q[rows] = blocks.ungroup(grad_scores @ blocks.keys(k, cols))
                grad_k[cols] += (grad_scores.mT @ blocks.group(q[rows])).transpose(0, 1)
        grad_sinks = None if sinks is None else sink_gradient(grad_out, sinks, out, lse)
        grad_kv = grad_k.to(k.dtype), grad_v.to(v.dtype)
        return grad_q, *grad_kv, grad_sinks, None, None, None


class _Blocks:
    """Walks over blocks of queries and the keys that they see, always in one order.

    A block's tensors are grouped by KV head, `[kv_heads, group * rows, ...]`, so that
    one product serves all query heads that share a KV head.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: tuple[int, ...],
        params: AttentionParams,
        seed: int,
    ) -> None:
        self.q, self.k, self.v = q, k, v
        self.lengths, self.params, self.seed = lengths, params, seed
        self.kv_heads, self.group_size = k.shape[1], q.shape[1] // k.shape[1]
        self.dtype = _accumulation_dtype(q)

    def __iter__(
        self,
    ) -> Iterator[tuple[slice, slice, torch.Tensor | None, torch.Tensor | None]]:
        """Yields query rows, key columns, which keys are hidden, dropout factors."""
        heads, device = self.q.shape[1], self.q.device
        causal, window = self.params.causal, self.params.sliding_window
        dropout = self.params.dropout
        generator = None
        if dropout > 0:
            generator = torch.Generator(device).manual_seed(self.seed)
        first = 0
        for length in self.lengths:
            reach = max(length, 1)
            if window is not None:
                reach = min(reach, 2 * window + _BLOCK_ROWS)
            step = min(_BLOCK_ROWS, max(16, _MAX_BLOCK_SCORES // (heads * reach)))
            for start in range(0, length, step):
                end = min(start + step, length)
                lo = 0 if window is None else max(0, start - window + 1)
                hi = end if causal else length
                if window is not None:
                    hi = min(hi, end + window - 1)
                mask = None
                if causal or window is not None:
                    row = torch.arange(start, end, device=device).unsqueeze(1)
                    distance = row - torch.arange(lo, hi, device=device)
                    latest = 0 if causal or window is None else 1 - window
                    mask = distance < latest  # [rows, cols]
                    if window is not None:
                        mask |= distance >= window
                kept = None
                if generator is not None:
                    shape = (self.kv_heads, self.group_size, end - start, hi - lo)
                    draws = torch.rand(
                        shape, generator=generator, device=device, dtype=torch.float32
                    )
                    kept = (draws >= dropout).to(self.dtype).div_(1 - dropout)
                rows = slice(first + start, first + end)
                yield rows, slice(first + lo, first + hi), mask, kept
            first += length

    def group(self, x: torch.Tensor) -> torch.Tensor:
        # [rows, heads, d] -> [kv_heads, group * rows, d]
        x = x.to(self.dtype).unflatten(1, (self.kv_heads, self.group_size))
        return x.permute(1, 2, 0, 3).flatten(1, 2)

    def ungroup(self, x: torch.Tensor) -> torch.Tensor:
        # [kv_heads, group * rows, d] -> [rows, heads, d]
        return x.unflatten(1, (self.group_size, -1)).permute(2, 0, 1, 3).flatten(1, 2)

    def keys(self, x: torch.Tensor, cols: slice) -> torch.Tensor:
        # [tokens, kv_heads, d] -> [kv_heads, cols, d]
        return x[cols].to(self.dtype).transpose(0, 1)

    def scores(
        self, rows: slice, cols: slice, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scaled, capped and masked scores, and the soft cap's derivative."""
        scores = self.group(self.q[rows]) @ self.keys(self.k, cols).mT
        scores = scores.mul_(self.params.scale).unflatten(1, (self.group_size, -1))
        slope = None
        if (cap := self.params.logits_soft_cap) is not None:
            tanh = (scores / cap).tanh_()
            scores, slope = cap * tanh, 1 - tanh * tanh
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        return scores, slope  # [kv_heads, group, rows, cols]


def _accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def blockwise_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences,
    params: AttentionParams,
) -> torch.Tensor:
    """An `AttentionKernel` that takes all of `AttentionParams`, on any device."""
    if params.dropout > 0:
        return _blockwise_with_dropout(q, k, v, sequences.lengths, params)
    return _BlockwiseAttention.apply(
        q, k, v, params.sinks, sequences.lengths, params, 0
    )


@torch.compiler.disable(reason="random generators cannot be traced")
def _blockwise_with_dropout(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    params: AttentionParams,
) -> torch.Tensor:
    # The seed comes from the CPU's generator, which torch.manual_seed and activation
    # checkpointing set, and for which no device is waited for.
    seed = int(torch.randint(2**63 - 1, ()))
    return _BlockwiseAttention.apply(q, k, v, params.sinks, lengths, params, seed)
