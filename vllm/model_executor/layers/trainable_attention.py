# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention that trains and serves: one module, one state dict.

In an engine step these layers are vLLM's paged `Attention`. Anywhere else they are
differentiable attention over packed variable-length or padded batches.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

import vllm.envs as envs
from vllm.config import (
    VllmConfig,
    get_current_vllm_config,
    get_current_vllm_config_or_none,
)
from vllm.forward_context import is_forward_context_available
from vllm.model_executor.parallel_context import ParallelContext
from vllm.v1.attention.ops.packed_attention import (
    AttentionParams,
    Sequences,
    current_cu_seqlens,
    graph_is_dense,
    packed_sequences,
    select_kernel,
    sequences_of,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention

__all__ = ["TrainableAttention", "TrainableFlashAttention", "packed_sequences"]


class _PagedAttentionMixin:
    """What `TrainableAttention` changes of vLLM's attention layers."""

    # A window that hides nothing, for the sake of its kernel; None for none.
    window_without_effect: int | None = None

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the buffers of an engine are not the model's."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, likewise."""

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> Any:
        spec = super().get_kv_cache_spec(vllm_config)  # type: ignore[misc]
        if self.window_without_effect is not None:
            # Still full attention to the cache; only its kernel is told.
            spec = replace(spec, sliding_window=self.window_without_effect)
        return spec


@functools.cache
def _paged_attention_cls(causal: bool) -> type["Attention"]:
    # imported late: `vllm.model_executor.layers` exports this module
    from vllm.model_executor.layers.attention import Attention, EncoderOnlyAttention

    base = Attention if causal else EncoderOnlyAttention
    return type(f"Paged{base.__name__}", (_PagedAttentionMixin, base), {})


def _keep_bits_at_decode(paged: Any, max_model_len: int) -> None:
    """Have a decode step of `paged` round like a training step, if it would not."""
    if not envs.VLLM_BATCH_INVARIANT or paged.attn_backend.get_name() != "FLASH_ATTN":
        return
    from vllm.v1.attention.backends import flash_attn_invariant

    if paged.sliding_window is not None:
        return
    if flash_attn_invariant.changes_bits_at_decode(paged.head_size):
        # The last token of a sequence is never a query, so none looks further back.
        paged.window_without_effect = max_model_len - 1
        paged.impl.sliding_window = (max_model_len - 2, 0)
        paged.attn_backend = flash_attn_invariant.FlashAttentionInvariantBackend


def _layer_index(vllm_config: VllmConfig, built: int) -> int:
    """Index in the whole model of the attention layer that this stage builds next.

    With one attention for each layer it is the layer's own in every layout. Others
    are numbered behind these, in turns, so that no two stages use one name.
    """
    context = ParallelContext.from_config(vllm_config.parallel_config)
    assert vllm_config.model_config is not None
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    stage = context.layer_range(num_layers)
    if built < len(stage):
        return stage[built]
    turn = built - len(stage)
    return (
        num_layers
        + turn * context.get_pipeline_parallel_world_size()
        + context.get_pipeline_parallel_rank()
    )


def _build_paged_attention(
    layer: "TrainableAttention", prefix: str
) -> "Attention | None":
    """vLLM's attention for `layer`; None where no engine is building a model."""
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None or vllm_config.model_config is None:
        return None
    if not layer.causal and vllm_config.model_config.runner_type != "pooling":
        # It would see only the new tokens of a step. Outside steps, as in a vision
        # encoder, it still is of use.
        return None
    # late, as in _paged_attention_cls
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    if not prefix:
        layers = vllm_config.compilation_config.static_forward_context.values()
        built = sum(isinstance(other, AttentionLayerBase) for other in layers)
        prefix = f"trainable_attention.{_layer_index(vllm_config, built)}"
    if sum(part.isdecimal() for part in prefix.split(".")) != 1:
        raise ValueError(
            f"prefix {prefix!r} must contain exactly one integer, the layer's index, "
            "as in 'model.layers.3.attn'. Leave prefix out to have one made."
        )
    cache_config = vllm_config.cache_config
    if cache_config.sliding_window != layer.sliding_window:
        # The layer's own window holds, as it does in training; vLLM would put the
        # window of config.json in the place of None.
        cache_config = copy.copy(cache_config)
        cache_config.sliding_window = layer.sliding_window
    # Backends without sinks do not take the argument.
    extra: dict[str, Any] = {} if layer.sinks is None else {"sinks": layer.sinks}
    # Not where a factory puts its weights for now, such as the meta device: it has
    # tensors of its own, which no checkpoint fills.
    with vllm_config.device_config.device:
        paged = _paged_attention_cls(layer.causal)(
            num_heads=layer.num_heads,
            head_size=layer.head_dim,
            scale=layer.scale,
            num_kv_heads=layer.num_kv_heads,
            cache_config=cache_config,
            logits_soft_cap=layer.logits_soft_cap,
            per_layer_sliding_window=layer.sliding_window,
            prefix=prefix,
            **extra,
        )
    backend = paged.attn_backend
    if not backend.supports_head_size(layer.head_dim):
        raise ValueError(
            f"vLLM's {backend.get_name()} attention does not take head_dim "
            f"{layer.head_dim}, only {backend.get_supported_head_sizes()}. Choose one "
            "of these, or another attention backend."
        )
    if layer.causal:
        _keep_bits_at_decode(paged, vllm_config.model_config.max_model_len)
    return paged


class TrainableAttention(nn.Module):
    """Scaled dot-product attention of q, k, v that trains and serves.

    Built while an engine builds a model (inside the callable given to
    `ModelRegistry.register_model`) and called in an engine step, it is vLLM's paged
    attention: continuous batching, chunked prefill and prefix caching work. Called
    anywhere else it is differentiable. It has no parameters but `sinks`, and the same
    state dict in both places.

    Under tensor parallelism `num_heads` and `num_kv_heads` are this rank's.

    Args:
        num_heads: Query heads.
        head_dim: Size of each head.
        num_kv_heads: Key and value heads; divides `num_heads`. Default: `num_heads`.
        scale: Factor of the scores. Default: `head_dim ** -0.5`.
        causal: Each token sees itself and earlier tokens. Otherwise all tokens of
            its sequence; vLLM serves that in pooling models only.
        dropout: Probability of dropping an attention weight, in `.train()` only and
            never in an engine step.
        sliding_window: Keys that a token sees, itself included: i sees j where
            `i - j < sliding_window`, and `j - i < sliding_window` if not causal.
        logits_soft_cap: Scores become `cap * tanh(score / cap)`.
        deterministic: The gradient has the same bits on every run, as it also has
            under `torch.use_deterministic_algorithms`.
        sinks: Learn, in the parameter `sinks` `[num_heads]`, a score of each head that
            takes part in the softmax without a value (gpt-oss).
        prefix: Name of the layer in the engine, with its index as the only integer.
            Default: a unique one.

    Raises:
        ValueError: An argument is out of range, or the engine's attention backend
            does not take `head_dim`.

    Reference: FlashAttention-2, https://arxiv.org/abs/2307.08691
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        scale: float | None = None,
        causal: bool = True,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        logits_soft_cap: float | None = None,
        deterministic: bool = False,
        sinks: bool = False,
        prefix: str = "",
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads ({num_heads}) must be a positive multiple of num_kv_heads "
                f"({num_kv_heads}). Under tensor parallelism both are this rank's."
            )
        if head_dim < 1:
            raise ValueError(f"head_dim must be positive, got {head_dim}.")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
        if sliding_window is not None and sliding_window < 1:
            raise ValueError(
                "sliding_window must be at least 1 (the token itself), got "
                f"{sliding_window}. None means no window."
            )
        if logits_soft_cap is not None and logits_soft_cap <= 0:
            raise ValueError(
                f"logits_soft_cap must be positive, got {logits_soft_cap}. None means "
                "no cap."
            )
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.num_kv_heads = num_kv_heads
        self.scale = head_dim**-0.5 if scale is None else scale
        self.causal = causal
        self.dropout = dropout
        self.sliding_window = sliding_window
        self.logits_soft_cap = logits_soft_cap
        self.deterministic = deterministic
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sinks else None
        # a child, so that vLLM finds it when it processes weights after loading
        self.paged = _build_paged_attention(self, prefix)

    def divide_heads(self, ranks: int) -> None:
        """Keep one of `ranks` equal parts of the heads, with its part of the KV cache.

        The caller has taken this rank's part of `sinks`.

        Args:
            ranks: Tensor-parallel ranks that divide the heads among them.

        Raises:
            ValueError: `ranks` does not divide the heads.
        """
        if self.num_heads % ranks or self.num_kv_heads % ranks:
            raise ValueError(
                f"{self.num_heads} query heads and {self.num_kv_heads} key and value "
                f"heads cannot be divided by {ranks} tensor-parallel ranks. Use a "
                "number of ranks that divides both."
            )
        self.num_heads //= ranks
        self.num_kv_heads //= ranks
        if self.paged is not None:
            prefix = self.paged.layer_name
            context = get_current_vllm_config().compilation_config
            del context.static_forward_context[prefix]
            self.paged = _build_paged_attention(self, prefix)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends within each sequence.

        Layouts, where key and value have `num_kv_heads` in place of `num_heads`:

        - packed: `[tokens, num_heads, head_dim]` or `[tokens, num_heads * head_dim]`;
          sequences are bounded by `cu_seqlens`, else by `packed_sequences`, else all
          tokens are one sequence. In an engine step tokens are always packed, and
          vLLM knows the sequences.
        - padded: `[batch, seq, num_heads, head_dim]`, or
          `[batch, seq, num_heads * head_dim]` if `num_heads > 1`; each row is a
          sequence. A batch of one row may be packed like the above.

        Args:
            query: Queries, of a floating dtype.
            key: Keys, of the same dtype.
            value: Values, of the same dtype.
            cu_seqlens: int32 `[num_seqs + 1]`, cumulative lengths of a packed batch.
            attention_mask: Bool or integer `[batch, seq]` for a padded batch, nonzero
                where there is a token. The others see nothing, are not seen, take no
                place (distances are between tokens), and their output is 0.

        Returns:
            The attended values, in the layout and dtype of `query` (under autocast
            in autocast's dtype).

        Raises:
            ValueError: Shapes or `cu_seqlens` do not fit.
            TypeError: Dtypes differ or are not floating.
            RuntimeError: An engine step reaches a layer that no engine built, or a
                recomputation in backward runs outside its `packed_sequences`.
        """
        merged = query.dim() == 2 or (
            query.dim() == 3
            and self.num_heads > 1
            and query.shape[-1] == self.num_heads * self.head_dim
        )
        q = self._split_heads("query", query, self.num_heads, merged)
        k = self._split_heads("key", key, self.num_kv_heads, merged)
        v = self._split_heads("value", value, self.num_kv_heads, merged)
        if q.dim() not in (3, 4) or not (q.shape[:-2] == k.shape[:-2] == v.shape[:-2]):
            raise ValueError(
                "query, key and value must share their leading axes, [tokens] or "
                f"[batch, seq], got shapes {list(query.shape)}, {list(key.shape)} and "
                f"{list(value.shape)}."
            )
        if is_forward_context_available():
            out = self._attend_paged(q, k, v, cu_seqlens, attention_mask)
        else:
            q, k, v = self._match_dtypes(q, k, v)
            if attention_mask is not None:
                out = self._attend_masked(q, k, v, cu_seqlens, attention_mask)
            else:
                out = self._attend(q, k, v, cu_seqlens)
        return out.flatten(-2) if merged else out

    def _split_heads(
        self, name: str, x: torch.Tensor, heads: int, merged: bool
    ) -> torch.Tensor:
        if merged and x.shape[-1] == heads * self.head_dim:
            return x.unflatten(-1, (heads, self.head_dim))
        if not merged and x.shape[-2:] == (heads, self.head_dim):
            return x
        axes = f"{heads * self.head_dim}" if merged else f"{heads}, {self.head_dim}"
        raise ValueError(
            f"{name} must have shape [..., {axes}] ({heads} heads of size "
            f"{self.head_dim}, laid out as the query is), got {list(x.shape)}."
        )

    def _match_dtypes(self, *qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
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

    def _attend_paged(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        if self.paged is None:
            raise RuntimeError(
                "This TrainableAttention cannot take part in an engine step: "
                + (
                    "no engine built it. Build the model inside the callable given to "
                    "ModelRegistry.register_model."
                    if self.causal
                    else "it is not causal. That is served in pooling models only "
                    "(runner='pooling'), built inside the callable given to "
                    "ModelRegistry.register_model."
                )
            )
        if cu_seqlens is not None or attention_mask is not None:
            raise ValueError(
                "In an engine step vLLM knows the sequences: leave cu_seqlens and "
                "attention_mask None."
            )
        out = self.paged(*(x.reshape(-1, x.shape[-2] * x.shape[-1]) for x in (q, k, v)))
        return out.view(q.shape)

    def _attend_masked(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        _check_mask(attention_mask, q.shape[:-2])
        if cu_seqlens is not None:
            raise ValueError("Pass either cu_seqlens or attention_mask, not both.")
        present = attention_mask.to(torch.bool)
        cu_seqlens = F.pad(present.sum(1).cumsum(0, dtype=torch.int32), (1, 0))
        index = present.flatten().nonzero().squeeze(1)
        padded_shape = q.shape
        q, k, v = (x.flatten(0, 1).index_select(0, index) for x in (q, k, v))
        out = self._attend(q, k, v, cu_seqlens)
        padded = out.new_zeros(present.numel(), *out.shape[1:])
        return padded.index_copy(0, index, out).view(padded_shape)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
    ) -> torch.Tensor:
        batch, seq = (1, q.shape[0]) if q.dim() == 3 else q.shape[:2]
        rows = Sequences(num_seqs=batch, max_seqlen=seq)
        if graph_is_dense(cu_seqlens):
            return self._run_kernel(q, k, v, rows)
        return self._attend_eagerly(q, k, v, rows, cu_seqlens)

    @torch.compiler.disable(reason="the lengths of packed sequences differ per batch")
    def _attend_eagerly(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: Sequences,
        cu_seqlens: torch.Tensor | None,
    ) -> torch.Tensor:
        return self._run_kernel(q, k, v, sequences_of(rows, cu_seqlens))

    def _run_kernel(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences
    ) -> torch.Tensor:
        params = AttentionParams(
            scale=self.scale,
            causal=self.causal,
            sliding_window=self.sliding_window,
            logits_soft_cap=self.logits_soft_cap,
            dropout=self.dropout if self.training else 0.0,
            deterministic=(
                self.deterministic or torch.are_deterministic_algorithms_enabled()
            ),
            sinks=self.sinks,
        )
        kernel = select_kernel(q, k, sequences, params)
        shape = q.shape
        if q.dim() == 4:
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return kernel(q, k, v, sequences, params).view(shape)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"num_kv_heads={self.num_kv_heads}, scale={self.scale}, "
            f"causal={self.causal}, dropout={self.dropout}, "
            f"sliding_window={self.sliding_window}, "
            f"logits_soft_cap={self.logits_soft_cap}"
        )


def _check_mask(attention_mask: torch.Tensor, leading: torch.Size) -> None:
    if len(leading) != 2 or attention_mask.shape != leading:
        raise ValueError(
            "attention_mask must be [batch, seq] and belongs to a padded batch, got "
            f"shape {list(attention_mask.shape)} for leading axes {list(leading)}."
        )
    if attention_mask.is_floating_point():
        raise TypeError(
            "attention_mask must be bool or integer, nonzero where there is a token, "
            f"got {attention_mask.dtype}. Additive masks are not taken."
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
        cu_seqlens: torch.Tensor | None = None,
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
    cu_seqlens: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Positions counted from 0 in each sequence."""
    if is_forward_context_available():
        raise ValueError(
            "positions must be given in an engine step: pass on the positions that "
            "vLLM gives the model's forward."
        )
    if attention_mask is not None:
        _check_mask(attention_mask, hidden_states.shape[:-1])
        return (attention_mask.bool().cumsum(1) - 1).clamp(min=0)
    device = hidden_states.device
    positions = torch.arange(hidden_states.shape[-2], device=device)
    if graph_is_dense(cu_seqlens):
        return positions
    if cu_seqlens is None:
        cu_seqlens = current_cu_seqlens()
    if cu_seqlens is not None and cu_seqlens.numel() > 1:
        cu_seqlens = cu_seqlens.to(device)
        index = torch.searchsorted(cu_seqlens, positions, right=True) - 1
        positions = positions - cu_seqlens[index]
    return positions


def _rotate(
    positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates q and k, `[..., heads, head_dim]`, by their positions `[...]`."""
    head_dim = q.shape[-1]
    # Computed anew and in float32, so that no .to(bfloat16) or to_empty() spoils it.
    exponents = torch.arange(0, head_dim, 2, device=q.device, dtype=torch.float32)
    inv_freq = 1.0 / (theta ** (exponents / head_dim))
    angles = positions.to(torch.float32).unsqueeze(-1) * inv_freq
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(-2)  # [..., 1, head_dim]
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)

    def apply(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return apply(q), apply(k)
