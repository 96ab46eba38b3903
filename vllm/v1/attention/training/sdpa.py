# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""PyTorch's `scaled_dot_product_attention` over packed sequences.

It takes neither a sliding window, a soft cap, dropout nor attention sinks: what a mask
would need as memory for every score is left to `blockwise.py`.
"""

import torch
import torch.nn.functional as F

from vllm.v1.attention.training.kernel import AttentionParams
from vllm.v1.attention.training.sequences import Sequences


def sdpa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences,
    params: AttentionParams,
) -> torch.Tensor:
    """An `AttentionKernel`: one call per sequence, or one for rows of equal length."""

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:  # each [batch, seq, heads, head_dim]
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=params.causal,
            scale=params.scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2)

    if sequences.cu_seqlens is None:
        rows = (sequences.num_seqs, sequences.max_seqlen)
        return attend(*(x.unflatten(0, rows) for x in (q, k, v))).flatten(0, 1)
    # split, unlike slices, has a backward that writes each gradient once
    lengths = sequences.lengths or (0,)
    pieces = (x.unsqueeze(0).split(lengths, dim=1) for x in (q, k, v))
    return torch.cat(list(map(attend, *pieces)), dim=1).squeeze(0)
