# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The paged attention of a call site, in a head size that the engine's backend has."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.trainable_attention import TrainableAttention
from vllm.v1.attention.selector import get_attn_backend

from .calls import AttentionCall, UnservableError
from .sites import Site
from .trial import SeenAttention

# Sizes that one backend or another has beyond those of the model.
HEAD_SIZES = (16, 32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def attends_by_vllm(module: nn.Module) -> bool:
    """Whether `module` was written with an attention layer of vLLM's."""
    layers = (AttentionLayerBase, TrainableAttention)
    return any(isinstance(part, layers) for part in module.modules())


class SiteAttention(nn.Module):
    """Attention of one call site, by a `TrainableAttention`.

    Args:
        site: Where it is called.
        seen: What the call asks for.
        vllm_config: The engine's config.

    Raises:
        UnservableError: The engine's backends have no head size that is large enough.

    """

    def __init__(
        self, site: Site, seen: SeenAttention, vllm_config: VllmConfig
    ) -> None:
        super().__init__()
        sinks = seen.sinks
        if sinks is not None and not isinstance(sinks, nn.Parameter):
            raise UnservableError(
                f"{site} computes its sinks, at {seen.line}; expected a parameter"
            )
        self._site = site
        self._repeats = seen.repeats
        self._head_dim = max(seen.head_dim, seen.value_dim)
        self._padded_dim = padded_head_size(self._head_dim, vllm_config, seen, site)
        self._checks_repeats = seen.repeats > 1
        self.attention = TrainableAttention(
            seen.heads,
            self._padded_dim,
            seen.kv_heads,
            scale=seen.scale,
            sliding_window=seen.window,
            logits_soft_cap=seen.soft_cap,
            sinks=False if sinks is None else sinks,
        )

    def forward(self, call: AttentionCall) -> torch.Tensor:
        """`[1, heads, tokens, value_dim]`, in the dtype of the query."""
        if self._checks_repeats:
            self._check_repeats(call)
        # [tokens, heads, head_dim]
        q, k, v = (x[0].transpose(0, 1) for x in (call.query, call.key, call.value))
        if self._repeats > 1:
            k, v = k[:, :: self._repeats], v[:, :: self._repeats]
        value_dim = v.shape[-1]
        # Zeros add nothing to the scores, nor to the output beside them.
        paged = self.attention.paged
        assert paged is not None  # an engine has built this
        q, k, v = (self._padded(x).to(paged.dtype) for x in (q, k, v))
        out = self.attention(q, k, v)[..., :value_dim]
        return out.transpose(0, 1)[None].to(call.query.dtype)

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        missing = self._padded_dim - x.shape[-1]
        return F.pad(x, (0, missing)) if missing else x  # F.pad always copies

    def _check_repeats(self, call: AttentionCall) -> None:
        """In the first call with weights: the keys and values are repeated indeed."""
        for x in (call.key, call.value):
            kept = x[:, :: self._repeats].repeat_interleave(self._repeats, dim=1)
            if not torch.allclose(x, kept, equal_nan=True):
                raise UnservableError(
                    f"{self._site} repeated each key and value head {self._repeats} "
                    "times when the module was tried, and does not with its weights. "
                    "Initialize the module with random weights in the factory."
                )
        self._checks_repeats = False


def padded_head_size(
    head_dim: int, vllm_config: VllmConfig, seen: SeenAttention, site: Site
) -> int:
    """The least head size from `head_dim` on that the engine's backend has."""
    cache_dtype = vllm_config.cache_config.cache_dtype
    sizes = sorted({head_dim, *(size for size in HEAD_SIZES if size > head_dim)})
    for size in sizes:
        try:
            backend = get_attn_backend(
                size,
                torch.get_default_dtype(),
                cache_dtype,
                has_sink=seen.sinks is not None,
                num_heads=seen.heads,
            )
        except ValueError:  # no backend has this size
            continue
        if backend.supports_head_size(size):
            return size
    raise UnservableError(
        f"{site} has heads of size {head_dim}, and no attention backend of this engine "
        f"has that size or a larger one, at {seen.line}"
    )
