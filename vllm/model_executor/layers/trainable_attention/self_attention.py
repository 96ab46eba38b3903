# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Self-attention with its projections around `TrainableAttention`."""

import functools
from collections.abc import Callable

import torch
from torch import nn

from vllm.model_executor.layers.trainable_attention.attention import (
    TrainableAttention,
    check_mask,
)
from vllm.v1.attention.training.sequences import (
    CuSeqlens,
    as_cu_seqlens,
    current_cu_seqlens,
    graph_is_dense,
)


class TrainableFlashAttention(nn.Module):
    """Multi-head self-attention, hidden states in and out, that trains and serves.

    Four linear projections, `q_proj`, `k_proj`, `v_proj` and `o_proj`, named as in
    Hugging Face's Llama, an optional rotary embedding, and `TrainableAttention`.
    Under tensor parallelism each rank computes all heads; use `TrainableAttention`
    with parallel projections to divide them.

    Args:
        hidden_size: Size of the hidden states.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides `num_heads`. Default: `num_heads`.
        head_dim: Size of each head. Default: `hidden_size // num_heads`.
        dropout: See `TrainableAttention`, as for the next four.
        scale: Factor of the scores.
        causal: Each token sees itself and earlier tokens only.
        sliding_window: Keys that a token sees.
        logits_soft_cap: Bound of the scores.
        bias: Whether the projections have biases.
        rope_theta: Base of a rotary embedding over the whole head, rotated in halves
            (NeoX style, as in Llama). Default: no rotary embedding.
        rotary_emb: Another rotary embedding instead: a callable or module, called
            as `rotary_emb(positions, q, k)` with q and k `[..., heads, head_dim]`,
            which returns both rotated, out of place.
        prefix: Name of this layer in the engine, such as `model.layers.3.self_attn`.
            Default: a unique one.

    Raises:
        ValueError: An argument is out of range, or the engine's attention backend
            does not take `head_dim`.

    References: FlashAttention-2, https://arxiv.org/abs/2307.08691; rotary embedding,
    https://arxiv.org/abs/2104.09864
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        causal: bool = True,
        sliding_window: int | None = None,
        logits_soft_cap: float | None = None,
        bias: bool = False,
        rope_theta: float | None = None,
        rotary_emb: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        if head_dim is None:
            if num_heads < 1 or hidden_size % num_heads:
                raise ValueError(
                    f"hidden_size ({hidden_size}) is not a multiple of num_heads "
                    f"({num_heads}). Change one, or give head_dim."
                )
            head_dim = hidden_size // num_heads
        if rope_theta is not None and rotary_emb is not None:
            raise ValueError("Give either rope_theta or rotary_emb, not both.")
        if rope_theta is not None and (rope_theta <= 0 or head_dim % 2):
            raise ValueError(
                "A rotary embedding needs a positive rope_theta and an even head_dim, "
                f"got {rope_theta} and {head_dim}."
            )
        self.hidden_size = hidden_size
        self.rope_theta = rope_theta
        self.rotary_emb = (
            rotary_emb
            if rope_theta is None
            else functools.partial(_rotate, theta=rope_theta)
        )
        self.attn = TrainableAttention(
            num_heads,
            head_dim,
            num_kv_heads,
            scale=scale,
            causal=causal,
            dropout=dropout,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            prefix=f"{prefix}.attn" if prefix else "",
        )
        q_size = num_heads * head_dim
        kv_size = self.attn.num_kv_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, q_size, bias=bias)
        self.k_proj = nn.Linear(hidden_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, hidden_size, bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor | None = None,
        cu_seqlens: CuSeqlens | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends within each sequence.

        Args:
            hidden_states: Packed `[tokens, hidden_size]`, the only layout in an
                engine step, or padded `[batch, seq, hidden_size]`.
            positions: Integer positions for the rotary embedding, `[tokens]`,
                `[batch, seq]` or `[seq]`. Required in an engine step. Default:
                counted from 0 in each sequence.
            cu_seqlens: See `TrainableAttention.forward`.
            attention_mask: See `TrainableAttention.forward`.

        Returns:
            A tensor of the shape of `hidden_states`.

        Raises:
            ValueError: Shapes or `cu_seqlens` do not fit, or `positions` are missing
                in an engine step.
        """
        if (
            hidden_states.dim() not in (2, 3)
            or hidden_states.shape[-1] != self.hidden_size
        ):
            raise ValueError(
                f"hidden_states must be [tokens, {self.hidden_size}] or [batch, seq, "
                f"{self.hidden_size}], got {list(hidden_states.shape)}. They come "
                "first, positions second."
            )
        q_heads = (self.attn.num_heads, self.attn.head_dim)
        kv_heads = (self.attn.num_kv_heads, self.attn.head_dim)
        # each [..., heads, head_dim]
        q = self.q_proj(hidden_states).unflatten(-1, q_heads)
        k = self.k_proj(hidden_states).unflatten(-1, kv_heads)
        v = self.v_proj(hidden_states).unflatten(-1, kv_heads)
        if self.rotary_emb is not None:
            if positions is None:
                if self.attn.in_engine_step():
                    raise ValueError(
                        "positions must be given in an engine step: pass on the "
                        "positions that vLLM gives the model's forward."
                    )
                positions = _default_positions(
                    hidden_states, cu_seqlens, attention_mask
                )
            q, k = self.rotary_emb(positions, q, k)
        out = self.attn(q, k, v, cu_seqlens, attention_mask)
        return self.o_proj(out.flatten(-2))

    def extra_repr(self) -> str:
        return f"rope_theta={self.rope_theta}" if self.rope_theta else ""


def _default_positions(
    hidden_states: torch.Tensor,
    cu_seqlens: CuSeqlens | None,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Positions counted from 0 in each sequence."""
    if attention_mask is not None:
        check_mask(attention_mask, hidden_states.shape[:-1])
        return (attention_mask.bool().cumsum(1) - 1).clamp(min=0)
    device = hidden_states.device
    positions = torch.arange(hidden_states.shape[-2], device=device)
    if graph_is_dense(cu_seqlens):
        return positions
    if cu_seqlens is None:
        cu_seqlens = current_cu_seqlens()
    if cu_seqlens is not None:
        cu_seqlens = as_cu_seqlens(cu_seqlens).to(device)
    if cu_seqlens is not None and cu_seqlens.numel() > 1:
        index = torch.searchsorted(cu_seqlens, positions, right=True) - 1
        positions = positions - cu_seqlens[index]
    return positions


def _rotate(
    positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates q and k, `[..., heads, head_dim]`, by their positions `[...]`."""
    head_dim = q.shape[-1]
    # Computed in each call and in float32, so that .to(bfloat16) cannot round it.
    exponents = torch.arange(0, head_dim, 2, device=q.device, dtype=torch.float32)
    inv_freq = 1.0 / (theta ** (exponents / head_dim))
    angles = positions.to(torch.float32).unsqueeze(-1) * inv_freq
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(-2)  # [..., 1, head_dim]
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)

    def apply(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return apply(q), apply(k)
