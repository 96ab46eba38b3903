# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Training attention of rows or of packed sequences, by the kernel that fits."""

from __future__ import annotations

import torch

from vllm.v1.attention.training.kernel import AttentionParams
from vllm.v1.attention.training.select import select_kernel
from vllm.v1.attention.training.sequences import (
    CuSeqlens,
    Sequences,
    graph_is_dense,
    sequences_of,
)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: AttentionParams,
    cu_seqlens: CuSeqlens | None = None,
) -> torch.Tensor:
    """Differentiable attention within each sequence.

    Args:
        q: `[batch, seq, heads, head_dim]`, each row a sequence, or packed
            `[tokens, heads, head_dim]`.
        k: As q, with key heads.
        v: As k.
        params: What is computed.
        cu_seqlens: int32 `[num_seqs + 1]`, where packed sequences begin and end.
            Default: those of `packed_sequences`, if any.

    Returns:
        The attended values, as q.

    Raises:
        ValueError: The lengths do not fit the batch.
        TypeError: q, k and v have several dtypes, or one that is not floating.
        RuntimeError: A recomputation in backward runs outside its `packed_sequences`.

    """
    q, k, v = _match_dtypes(q, k, v)
    batch, seq = (1, q.shape[0]) if q.dim() == 3 else q.shape[:2]
    rows = Sequences(num_seqs=batch, max_seqlen=seq)
    if graph_is_dense(cu_seqlens):
        return _run_kernel(q, k, v, rows, params)
    return _attend_eagerly(q, k, v, rows, params, cu_seqlens)


def attend_present(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: AttentionParams,
    present: torch.Tensor,
    cu_seqlens: CuSeqlens,
) -> torch.Tensor:
    """`attend` of a padded batch; the output of what is no token is 0.

    Args:
        q: `[batch, seq, heads, head_dim]`.
        k: As q, with key heads.
        v: As k.
        params: What is computed.
        present: int64 `[tokens]`, which of the `batch * seq` places have a token.
        cu_seqlens: int32 `[num_seqs + 1]`, where sequences of these tokens begin.

    """
    padded_shape = q.shape
    q, k, v = (x.flatten(0, 1).index_select(0, present) for x in (q, k, v))
    out = attend(q, k, v, params, cu_seqlens)
    padded = out.new_zeros(padded_shape[0] * padded_shape[1], *out.shape[1:])
    return padded.index_copy(0, present, out).view(padded_shape)


def _match_dtypes(*qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    device_type = qkv[0].device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        # like PyTorch's attention, which leaves float64 alone
        qkv = tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in qkv)
    dtypes = [x.dtype for x in qkv]
    if not dtypes[0].is_floating_point or len(set(dtypes)) > 1:
        raise TypeError(
            "query, key and value must have one floating dtype, got "
            f"{', '.join(map(str, dtypes))}. Cast them, or use torch.autocast."
        )
    return qkv


@torch.compiler.disable(reason="the lengths of packed sequences differ per batch")
def _attend_eagerly(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: Sequences,
    params: AttentionParams,
    cu_seqlens: CuSeqlens | None,
) -> torch.Tensor:
    return _run_kernel(q, k, v, sequences_of(rows, cu_seqlens), params)


def _run_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences,
    params: AttentionParams,
) -> torch.Tensor:
    kernel = select_kernel(q, k, sequences, params)
    shape = q.shape
    if q.dim() == 4:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return kernel(q, k, v, sequences, params).view(shape)
