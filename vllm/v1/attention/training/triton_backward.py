# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The gradient of packed flash attention in Triton, with the same bits on every run.

It needs no library but Triton, so a deterministic gradient and one of a soft cap are
always there. One program writes each block of dK and dV, and another one each block of
dQ. So nothing is added by atomics, and the order of every sum is fixed. The
probabilities are computed again from the log-sum-exp of the forward, as in
FlashAttention-2 (https://arxiv.org/abs/2307.08691).
"""

import torch

from vllm.triton_utils import tl, triton
from vllm.v1.attention.training.kernel import Gradients, empty_gradients

# exp(x) is computed as exp2(x * LOG2_E), because the hardware has powers of 2.
LOG2_E = 1.4426950408889634
UNLIMITED = 1 << 30  # keys: more than any sequence has


@triton.jit
def _load_block(tensor, tokens, stride, head, head_stride, dims, mask):
    """One head of some tokens, `[tokens, BLOCK_D]`, with zeros outside `mask`."""
    offsets = tokens[:, None] * stride + head * head_stride + dims[None, :]
    return tl.load(tensor + offsets, mask=mask, other=0.0)


@triton.jit
def _probabilities(  # type: ignore[no-untyped-def]
    q, k, lse, scale, soft_cap, CAPPED: tl.constexpr, LOG2_E: tl.constexpr
):
    """Probabilities `[queries, keys]` before masking, and the soft cap's derivative."""
    scores = tl.dot(q, tl.trans(k)) * scale
    slope = scores
    if CAPPED:
        # tanh(x) = 2 sigmoid(2 x) - 1
        tanh = 2.0 * tl.sigmoid(2.0 * scores / soft_cap) - 1.0
        scores = soft_cap * tanh
        slope = 1.0 - tanh * tanh
    return tl.exp2((scores - lse[:, None]) * LOG2_E), slope


@triton.jit
def _visible(rows, cols, length, left, right):
    """Which keys `cols` each query of `rows` sees: `left` before it, `right` after."""
    distance = rows[:, None] - cols[None, :]
    inside = (rows[:, None] < length) & (cols[None, :] < length)
    return inside & (distance <= left) & (-distance <= right)


@triton.jit
def _grad_key_value_kernel(  # type: ignore[no-untyped-def]
    grad_out,
    q,
    k,
    v,
    lse,  # [heads, tokens]
    delta,  # [heads, tokens]
    grad_k,
    grad_v,
    cu_seqlens,
    tokens,
    scale,
    soft_cap,
    left,
    right,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    GROUP: tl.constexpr,  # query heads of a key-value head
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    OUT_STRIDE: tl.constexpr,  # of contiguous [tokens, heads, head_dim]
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAPPED: tl.constexpr,
    LOG2_E: tl.constexpr,
):
    kv_head = tl.program_id(0) % KV_HEADS
    sequence = tl.program_id(0) // KV_HEADS
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - begin).to(tl.int32)
    first = tl.program_id(1) * BLOCK_K
    if first >= length:
        return
    cols = first + tl.arange(0, BLOCK_K)
    dims = tl.arange(0, BLOCK_D)
    col_mask = (cols < length)[:, None] & (dims < HEAD_DIM)[None, :]
    key_tokens = begin + cols
    k_block = _load_block(
        k, key_tokens, k_stride, kv_head, k_head_stride, dims, col_mask
    )
    v_block = _load_block(
        v, key_tokens, v_stride, kv_head, v_head_stride, dims, col_mask
    )
    dk = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    begin_q = tl.maximum(first - right, 0) // BLOCK_Q * BLOCK_Q
    end_q = tl.minimum(length, first + BLOCK_K + left)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        head_offset = head.to(tl.int64) * tokens
        for start in range(begin_q, end_q, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            row_tokens = begin + rows
            row_mask = (rows < length)[:, None] & (dims < HEAD_DIM)[None, :]
            q_block = _load_block(
                q, row_tokens, q_stride, head, q_head_stride, dims, row_mask
            )
            do_block = _load_block(
                grad_out, row_tokens, OUT_STRIDE, head, HEAD_DIM, dims, row_mask
            )
            row_lse = tl.load(lse + head_offset + row_tokens, mask=rows < length)
            row_delta = tl.load(delta + head_offset + row_tokens, mask=rows < length)
            probs, slope = _probabilities(
                q_block, k_block, row_lse, scale, soft_cap, CAPPED, LOG2_E
            )
            seen = _visible(rows, cols, length, left, right)
            probs = tl.where(seen, probs, 0.0)
            dv += tl.dot(tl.trans(probs.to(do_block.dtype)), do_block)
            dp = tl.dot(do_block, tl.trans(v_block))
            ds = tl.where(seen, probs * (dp - row_delta[:, None]), 0.0)
            if CAPPED:
                ds = tl.where(seen, ds * slope, 0.0)
            dk += tl.dot(tl.trans(ds.to(q_block.dtype)), q_block)
    offset = (key_tokens[:, None] * KV_HEADS + kv_head) * HEAD_DIM + dims[None, :]
    dtype = grad_k.dtype.element_ty
    tl.store(grad_k + offset, (dk * scale).to(dtype), mask=col_mask)
    tl.store(grad_v + offset, dv.to(dtype), mask=col_mask)


@triton.jit
def _grad_query_kernel(  # type: ignore[no-untyped-def]
    grad_out,
    q,
    k,
    v,
    lse,  # [heads, tokens]
    delta,  # [heads, tokens]
    grad_q,
    cu_seqlens,
    tokens,
    scale,
    soft_cap,
    left,
    right,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    OUT_STRIDE: tl.constexpr,  # of contiguous [tokens, heads, head_dim]
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAPPED: tl.constexpr,
    LOG2_E: tl.constexpr,
):
    head = tl.program_id(0) % (KV_HEADS * GROUP)
    sequence = tl.program_id(0) // (KV_HEADS * GROUP)
    kv_head = head // GROUP
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - begin).to(tl.int32)
    first = tl.program_id(1) * BLOCK_Q
    if first >= length:
        return
    rows = first + tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, BLOCK_D)
    row_tokens = begin + rows
    row_mask = (rows < length)[:, None] & (dims < HEAD_DIM)[None, :]
    q_block = _load_block(q, row_tokens, q_stride, head, q_head_stride, dims, row_mask)
    do_block = _load_block(
        grad_out, row_tokens, OUT_STRIDE, head, HEAD_DIM, dims, row_mask
    )
    head_offset = head.to(tl.int64) * tokens
    row_lse = tl.load(lse + head_offset + row_tokens, mask=rows < length)
    row_delta = tl.load(delta + head_offset + row_tokens, mask=rows < length)
    begin_k = tl.maximum(first - left, 0) // BLOCK_K * BLOCK_K
    end_k = tl.minimum(length, first + BLOCK_Q + right)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    for start in range(begin_k, end_k, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        key_tokens = begin + cols
        col_mask = (cols < length)[:, None] & (dims < HEAD_DIM)[None, :]
        k_block = _load_block(
            k, key_tokens, k_stride, kv_head, k_head_stride, dims, col_mask
        )
        v_block = _load_block(
            v, key_tokens, v_stride, kv_head, v_head_stride, dims, col_mask
        )
        probs, slope = _probabilities(
            q_block, k_block, row_lse, scale, soft_cap, CAPPED, LOG2_E
        )
        seen = _visible(rows, cols, length, left, right)
        dp = tl.dot(do_block, tl.trans(v_block))
        ds = tl.where(seen, probs * (dp - row_delta[:, None]), 0.0)
        if CAPPED:
            ds = tl.where(seen, ds * slope, 0.0)
        dq += tl.dot(ds.to(k_block.dtype), k_block)
    offset = row_tokens[:, None] * OUT_STRIDE + head * HEAD_DIM + dims[None, :]
    tl.store(grad_q + offset, (dq * scale).to(grad_q.dtype.element_ty), mask=row_mask)


def _blocks(head_dim: int) -> tuple[int, int, int]:
    """Tokens of the block that a program owns, of those it walks over, and warps.

    They are fixed by the head size alone, and not tuned at run time, because another
    block size sums in another order. Measured on an H100.
    """
    if head_dim <= 64:
        return 64, 64, 4
    if head_dim <= 128:
        return 64, 32, 4
    return 32, 32, 4


def attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool,
    window: tuple[int, int],
    soft_cap: float,
) -> Gradients:
    """Gradients of q, k and v, in their dtypes; equal inputs give equal bits.

    Args:
        grad_out: contiguous `[tokens, heads, head_dim]`, float16 or bfloat16, as are
            the next four.
        q: `[tokens, heads, head_dim]`; the last axis contiguous, as for k and v.
        k: `[tokens, kv_heads, head_dim]`.
        v: `[tokens, kv_heads, head_dim]`.
        out: `[tokens, heads, head_dim]`, the forward's.
        lse: float32 `[heads, tokens]`, the forward's; with attention sinks, theirs too.
        cu_seqlens: int32 `[num_seqs + 1]`.
        max_seqlen: The longest sequence's tokens.
        scale: Factor of the scores.
        causal: A query sees no later keys, whatever `window` says.
        window: Keys seen before and after a query, -1 for all.
        soft_cap: Scores became `soft_cap * tanh(score / soft_cap)`, 0 for none.
    """
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    # [tokens, heads, head_dim] -> [heads, tokens]: the sum over keys of P * dP
    delta = (out.float() * grad_out.float()).sum(-1).T.contiguous()
    lse = lse.contiguous()
    grad_q, grad_k, grad_v = empty_gradients(q, k, v)
    left, right = (UNLIMITED if side < 0 else side for side in window)
    right = 0 if causal else right
    num_seqs = len(cu_seqlens) - 1
    owned, walked, num_warps = _blocks(head_dim)
    inputs = (grad_out, q, k, v, lse, delta)
    numbers = (tokens, scale, soft_cap or 1.0, left, right)
    strides = [x.stride(axis) for x in (q, k, v) for axis in (0, 1)]
    constants = {
        "GROUP": heads // kv_heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "OUT_STRIDE": heads * head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "CAPPED": soft_cap != 0,
        "LOG2_E": LOG2_E,
        "num_warps": num_warps,
    }
    programs = triton.cdiv(max_seqlen, owned)
    _grad_key_value_kernel[(num_seqs * kv_heads, programs)](
        *inputs,
        grad_k,
        grad_v,
        cu_seqlens,
        *numbers,
        *strides,
        BLOCK_Q=walked,
        BLOCK_K=owned,
        # No software pipelining. With it the compiled kernel has a race: Triton 3.6.0
        # on an H100 gave another dK on each run, off by up to 5 % at head_dim 128.
        num_stages=1,
        **constants,
    )
    _grad_query_kernel[(num_seqs * heads, programs)](
        *inputs,
        grad_q,
        cu_seqlens,
        *numbers,
        *strides,
        BLOCK_Q=owned,
        BLOCK_K=walked,
        **constants,
    )
    return grad_q, grad_k, grad_v
