# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`TrainableAttention`: attention of q, k and v that trains and serves."""

import torch
import torch.nn.functional as F
from torch import nn

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.trainable_attention.engine_step import (
    EngineLayer,
    EngineStep,
    current_step,
)
from vllm.model_executor.layers.trainable_attention.paged import build_paged_attention
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.training.attend import attend, attend_present
from vllm.v1.attention.training.kernel import AttentionParams
from vllm.v1.attention.training.sequences import CuSeqlens


class TrainableAttention(EngineLayer):
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
            takes part in the softmax without a value (gpt-oss). A parameter of that
            shape is used as it is.
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
        sinks: bool | nn.Parameter = False,
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
        self.sinks: nn.Parameter | None = None
        if isinstance(sinks, nn.Parameter):
            self.sinks = sinks
        elif sinks:
            self.sinks = nn.Parameter(torch.zeros(num_heads))
        # Children, so that vLLM finds them when it processes weights after loading:
        # the paged layer of the first call in a forward, and those of later calls.
        self.paged = build_paged_attention(self, prefix)
        self.paged_later: nn.ModuleList | None = None

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
            self.paged = build_paged_attention(self, prefix)

    def _add_kv_caches(self, calls: int) -> None:
        """Add KV caches until there is one for each of the `calls` in one forward.

        Call this while the engine loads the model; it allocates the caches afterwards.
        """
        assert self.paged is not None
        later = [] if self.paged_later is None else list(self.paged_later)
        device = next(self.paged.buffers()).device
        while 1 + len(later) < calls:
            with set_default_torch_dtype(self.paged.dtype), device:
                paged = build_paged_attention(self, prefix="")
            assert paged is not None
            paged.process_weights_after_loading(self.paged.dtype)
            later.append(paged)
        if later:
            self.paged_later = nn.ModuleList(later)

    @property
    def _engine_half(self) -> nn.Module | None:
        return self.paged

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: CuSeqlens | None = None,
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
            cu_seqlens: int32 `[num_seqs + 1]`, cumulative lengths of a packed batch. A
                list or an array will do.
            attention_mask: Bool or integer `[batch, seq]` for a padded batch, nonzero
                where there is a token. The others see nothing, are not seen, take no
                place (distances are between tokens), and their output is 0.

        Returns:
            The attended values, in the layout and dtype of `query` (under autocast
            in autocast's dtype).

        Raises:
            ValueError: Shapes or `cu_seqlens` do not fit.
            TypeError: Dtypes differ or are not floating, or `cu_seqlens` cannot be
                made a tensor.
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
        if self.in_engine_step():
            out = self._attend_paged(q, k, v, cu_seqlens, attention_mask)
        else:
            if attention_mask is not None:
                out = self._attend_masked(q, k, v, cu_seqlens, attention_mask)
            else:
                out = attend(q, k, v, self._params(), cu_seqlens)
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

    def _attend_paged(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: CuSeqlens | None,
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
        paged = self._paged_of_this_call(current_step())
        out = paged(*(x.reshape(-1, x.shape[-2] * x.shape[-1]) for x in (q, k, v)))
        return out.view(q.shape)

    def _paged_of_this_call(self, step: EngineStep | None) -> nn.Module:
        assert self.paged is not None
        if step is None or not self.causal:  # not counted, or without a KV cache
            return self.paged
        later = self.paged_later
        caches = 1 if later is None else 1 + len(later)
        index = step.cache_index(self.paged.layer_name, caches)
        return self.paged if later is None or index == 0 else later[index - 1]

    def _attend_masked(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: CuSeqlens | None,
        attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        check_mask(attention_mask, q.shape[:-2])
        if cu_seqlens is not None:
            raise ValueError("Pass either cu_seqlens or attention_mask, not both.")
        present = attention_mask.to(torch.bool)
        cu_seqlens = F.pad(present.sum(1).cumsum(0, dtype=torch.int32), (1, 0))
        index = present.flatten().nonzero().squeeze(1)
        return attend_present(q, k, v, self._params(), index, cu_seqlens)

    def _params(self) -> AttentionParams:
        return AttentionParams(
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

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"num_kv_heads={self.num_kv_heads}, scale={self.scale}, "
            f"causal={self.causal}, dropout={self.dropout}, "
            f"sliding_window={self.sliding_window}, "
            f"logits_soft_cap={self.logits_soft_cap}"
        )


def check_mask(attention_mask: torch.Tensor, leading: torch.Size) -> None:
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
