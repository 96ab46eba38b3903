# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The tree product on a GPU, in Triton.

A program computes a tile of the result over one subtree of leaves. Its tensor-core
operations walk the features of a leaf from first to last, in whatever tile; so the size
of tiles does not change the bits. Where there are too few tiles to keep the GPU busy,
as in decode steps, more programs share the leaves of a tile, and a second kernel adds
their subtrees.
"""

import torch

from vllm.triton_utils import tl, triton

# Programs that keep a GPU busy. It decides who adds what, not in which order.
BUSY = 128


@triton.jit
def _subtree_of_products(  # type: ignore[no-untyped-def]
    x_rows,  # pointers to the first feature of each row
    weight_rows,
    leaf_size,
    LEAVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums of products over `LEAVES` leaves, float32 `[BLOCK_M, BLOCK_N]`."""
    if LEAVES == 1:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, leaf_size, BLOCK_K):
            features = start + tl.arange(0, BLOCK_K)
            inside = features < leaf_size
            x = tl.load(
                x_rows[:, None] + features[None, :], mask=inside[None, :], other=0.0
            )
            weight = tl.load(
                weight_rows[None, :] + features[:, None],
                mask=inside[:, None],
                other=0.0,
            )
            total = tl.dot(x, weight, total, input_precision="ieee")
    else:
        HALF: tl.constexpr = LEAVES // 2
        left = _subtree_of_products(
            x_rows, weight_rows, leaf_size, HALF, BLOCK_M, BLOCK_N, BLOCK_K
        )
        shift = HALF * leaf_size
        right = _subtree_of_products(
            x_rows + shift,
            weight_rows + shift,
            leaf_size,
            HALF,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        total = left + right
    return total


@triton.jit
def _product_kernel(  # type: ignore[no-untyped-def]
    x,  # [rows, features]
    weight,  # [outputs, features]
    bias,  # [outputs]
    out,  # [subtrees, rows, outputs]
    rows,
    outputs,
    leaf_size,
    x_stride,
    weight_stride,
    LEAVES: tl.constexpr,  # of a subtree
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Tiles that share rows of the weight run near each other, for the L2 cache.
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    tile, subtree = tl.program_id(0), tl.program_id(1)
    group = tile // (GROUP_M * tiles_n)
    group_size = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + tile % group_size
    tile_n = tile % (GROUP_M * tiles_n) // group_size

    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    first = subtree * LEAVES * leaf_size
    # Rows after the last are read as the first, and not written.
    x_rows = x + tl.where(m < rows, m, 0) * x_stride + first
    weight_rows = weight + tl.where(n < outputs, n, 0) * weight_stride + first
    total = _subtree_of_products(
        x_rows, weight_rows, leaf_size, LEAVES, BLOCK_M, BLOCK_N, BLOCK_K
    )
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    out_rows = out + (subtree.to(tl.int64) * rows + m[:, None]) * outputs
    tl.store(
        out_rows + n[None, :],
        total.to(out.dtype.element_ty),
        mask=(m[:, None] < rows) & (n[None, :] < outputs),
    )


@triton.jit
def _subtree_of_sums(  # type: ignore[no-untyped-def]
    parts, offsets, inside, stride, PARTS: tl.constexpr
):
    if PARTS == 1:
        total = tl.load(parts + offsets, mask=inside, other=0.0)
    else:
        HALF: tl.constexpr = PARTS // 2
        left = _subtree_of_sums(parts, offsets, inside, stride, HALF)
        right = _subtree_of_sums(parts + HALF * stride, offsets, inside, stride, HALF)
        total = left + right
    return total


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    parts,  # float32 [PARTS, numel]
    bias,  # [outputs]
    out,  # [numel]
    numel,
    outputs,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    stride = tl.cast(numel, tl.int64)  # one output is a constant to the compiler
    total = _subtree_of_sums(parts, offsets, inside, stride, PARTS)
    if HAS_BIAS:
        column = offsets % outputs
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=inside)


def triton_tree_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    leaves: int,
    partial: bool,
) -> torch.Tensor:
    """`tree_product` for bfloat16, float16 and float32."""
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    (rows, features), outputs = x.shape, weight.shape[0]
    dtype = torch.float32 if partial else x.dtype
    block_m = min(128, max(16, triton.next_power_of_2(rows)))
    block_n, block_k = 128, 32 if x.dtype == torch.float32 else 64
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(outputs, block_n)
    subtrees = 1
    while subtrees < leaves and tiles * subtrees < BUSY:
        subtrees *= 2
    whole = subtrees == 1
    out = x.new_empty(
        (subtrees, rows, outputs), dtype=dtype if whole else torch.float32
    )
    if rows == 0 or outputs == 0:
        return out.new_empty((rows, outputs), dtype=dtype)
    _product_kernel[(tiles, subtrees)](
        x,
        weight,
        bias,
        out,
        rows,
        outputs,
        features // leaves,
        x.stride(0),
        weight.stride(0),
        LEAVES=leaves // subtrees,
        HAS_BIAS=bias is not None and whole,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=8,
        num_warps=8 if block_m == 128 else 4,
        num_stages=3,
    )
    if whole:
        return out[0]
    return triton_tree_total(out, bias, dtype)


def triton_tree_total(
    parts: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """`tree_total` for float32, in one kernel.

    Args:
        parts: Float32 `[subtrees, rows, outputs]`, contiguous.
        bias: `[outputs]`, or None.
        dtype: Of the result.

    Returns:
        `[rows, outputs]`.

    """
    subtrees, rows, outputs = parts.shape
    out = parts.new_empty((rows, outputs), dtype=dtype)
    block = 1024
    _sum_kernel[(triton.cdiv(out.numel(), block),)](
        parts,
        bias,
        out,
        out.numel(),
        outputs,
        PARTS=subtrees,
        HAS_BIAS=bias is not None,
        BLOCK=block,
    )
    return out
