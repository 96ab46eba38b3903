# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How to read a call of each attention function that is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from .calls import AttentionCall, attention
from .flex import FlexMods

_NEEDS_SUMS = "it asks for the softmax's sums, which vLLM's cache attention has not"


def _read_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    causal: bool = True,
    **said: Any,
) -> AttentionCall:
    causal = causal and mask is None
    return AttentionCall(query, key, value, mask, causal, scale, **said)


def _read_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.dim() == 3:  # [heads, tokens, head_dim]
        q, k, v = (x[None] for x in (query, key, value))
        return AttentionCall(
            q,
            k,
            v,
            attn_mask,
            is_causal,
            scale,
            dropout=dropout_p,
            result=lambda out: out[0],
        )
    return AttentionCall(
        query, key, value, attn_mask, is_causal, scale, dropout=dropout_p
    )


def _read_flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., torch.Tensor] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: Any = None,
) -> AttentionCall:
    """`flex_attention`, of `[batch, heads, tokens, head_dim]`."""
    wants_aux = return_aux is not None

    def result(out: torch.Tensor) -> Any:
        if not wants_aux:
            return out
        from torch.nn.attention.flex_attention import AuxOutput

        return out, AuxOutput()

    needs_sums = return_lse or (wants_aux and any(return_aux))
    return AttentionCall(
        query,
        key,
        value,
        FlexMods(score_mod, block_mask),
        causal=False,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        unservable=_NEEDS_SUMS if needs_sums else None,
        result=result,
    )


def _read_flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> AttentionCall:
    """`flash_attn_func` of flash-attn 2, of `[batch, tokens, heads, head_dim]`."""
    unservable = None
    if alibi_slopes is not None:
        unservable = "it gives alibi_slopes"
    elif return_attn_probs:
        unservable = _NEEDS_SUMS
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    causal, window = _sides(causal, window_size)
    return AttentionCall(
        q,
        k,
        v,
        None,
        causal,
        q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        window=window,
        soft_cap=softcap or None,
        dropout=dropout_p,
        unservable=unservable,
        result=lambda out: out.transpose(1, 2),
    )


def _read_flash_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> AttentionCall:
    """`flash_attn_varlen_func` of flash-attn 2, of `[tokens, heads, head_dim]`."""
    dense = _read_flash(
        q[None],
        k[None],
        v[None],
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )
    return _packed(dense, cu_seqlens_q, block_table)


def _read_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: Sequence[int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> AttentionCall:
    """`varlen_attn` of PyTorch, of `[tokens, heads, head_dim]`."""
    # A window that ends at the token itself is how this function says causal.
    dense = _read_flash(
        query[None],
        key[None],
        value[None],
        softmax_scale=scale,
        window_size=window_size,
        return_attn_probs=return_aux is not None and any(return_aux),
    )
    return _packed(dense, cu_seq_q, block_table)


def _packed(
    dense: AttentionCall, cu_seqlens: torch.Tensor, block_table: torch.Tensor | None
) -> AttentionCall:
    """A call for packed documents, read as one of a batch of one."""
    paged = "it reads from a paged cache of the module's own"
    return replace(
        dense,
        cu_seqlens=cu_seqlens,
        unservable=dense.unservable if block_table is None else paged,
        result=lambda out: out[0].transpose(0, 1),
    )


def _sides(causal: bool, window_size: Sequence[int]) -> tuple[bool, int | None]:
    """Whether a call is causal, and its window, from keys on each side; -1 is all."""
    left, right = window_size
    return causal or right == 0, None if left < 0 else left + 1


READERS: dict[Any, Callable[..., AttentionCall]] = {
    attention: _read_attention,
    F.scaled_dot_product_attention: _read_sdpa,
}
"""For functions that a `TorchFunctionMode` sees; `stand_ins` adds others."""

PLAIN_FUNCTIONS: dict[tuple[str, str], Callable[..., AttentionCall]] = {
    ("torch.nn.attention.flex_attention", "flex_attention"): _read_flex,
    ("torch.nn.attention.varlen", "varlen_attn"): _read_varlen,
    ("flash_attn", "flash_attn_func"): _read_flash,
    ("flash_attn", "flash_attn_varlen_func"): _read_flash_varlen,
}
"""For functions that no mode sees, by module and name; `stand_ins` has them seen."""

PLAIN_OTHERS: tuple[tuple[str, str], ...] = (
    ("flash_attn", "flash_attn_qkvpacked_func"),
    ("flash_attn", "flash_attn_kvpacked_func"),
    ("flash_attn", "flash_attn_varlen_qkvpacked_func"),
    ("flash_attn", "flash_attn_varlen_kvpacked_func"),
    ("flash_attn", "flash_attn_with_kvcache"),
    ("flash_attn_interface", "flash_attn_func"),
    ("flash_attn_interface", "flash_attn_varlen_func"),
    ("xformers.ops", "memory_efficient_attention"),
)
"""Functions that are neither seen nor read; a module that calls one is refused."""

OTHERS: dict[Any, str] = {
    F.multi_head_attention_forward: "torch.nn.MultiheadAttention",
    torch._native_multi_head_attention: "torch.nn.MultiheadAttention",
    torch._transformer_encoder_layer_fwd: "torch.nn.TransformerEncoderLayer",
}
"""Functions that attend inside, where their keys and values cannot be taken."""
