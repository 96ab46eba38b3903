# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Transformers' models: their attention interface, for the engine's copy alone."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .calls import attention
from .sites import running

NAME = "vllm_adapter"


def use_seen_attention(module: nn.Module, always: bool = False) -> None:
    """Have `module`, if Transformers' attention is in it, call our `attention`.

    Its submodules get a copy of their config, because a trainer's may be the same.

    Args:
        module: Any module.
        always: Also within `own_attention`.

    """
    if "transformers" not in sys.modules:
        return
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    memo: dict[int, Any] = {}
    for part in module.modules():
        if isinstance(part, PreTrainedModel) and part._can_set_attn_implementation():
            AttentionInterface.register(NAME, _attend)
            AttentionMaskInterface.register(NAME, _mask)
            for inner in part.modules():
                config: Any = getattr(inner, "config", None)
                if hasattr(config, "_attn_implementation_internal"):
                    own = copy.deepcopy(config, memo)
                    inner.config = own
                    if own._attn_implementation_internal != NAME:
                        before = own._attn_implementation_internal
                        own._own_attn_implementation = NAME if always else before
                        own._attn_implementation_internal = NAME


def leaves_out_caps(module: nn.Module) -> bool:
    """Whether Transformers' own attention of `module` ignores a soft cap.

    Its `sdpa` does so without a word, as PyTorch's function takes none.
    """
    configs = (getattr(part, "config", None) for part in module.modules())
    return any(getattr(c, "_own_attn_implementation", None) == "sdpa" for c in configs)


@contextmanager
def own_attention(module: nn.Module) -> Iterator[None]:
    """Within, Transformers' models attend as they did before `use_seen_attention`."""
    changed = []
    for part in module.modules():
        config: Any = getattr(part, "config", None)
        if getattr(config, "_attn_implementation_internal", None) == NAME:
            config._attn_implementation_internal = config._own_attn_implementation
            changed.append(config)
    try:
        yield
    finally:
        for config in changed:
            config._attn_implementation_internal = NAME


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`[batch, heads, tokens, head_dim]` -> `[batch, tokens, heads, value_dim]`."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    out = attention(
        query,
        key,
        value,
        attention_mask,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        soft_cap=softcap,
        sinks=s_aux,
        causal=bool(is_causal),
        dropout=dropout,
    )
    return out.transpose(1, 2), None


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The mask as a tensor; None in an engine step, where vLLM knows what is seen.

    In training it is None where it is causal and says nothing else.
    """
    from transformers.masking_utils import sdpa_mask

    forward = running()
    if forward is None:
        # Transformers skips such a mask, but not while the compiler of PyTorch before
        # 2.14 traces. The values of a mask cannot be read there.
        if torch.compiler.is_compiling() and _is_causal_alone(**kwargs):
            return None
        return sdpa_mask(*args, **kwargs)
    if not forward.wants_masks:
        return None
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def _is_causal_alone(
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> bool:
    """Whether a mask with these arguments says nothing but that it is causal."""
    shows_all = local_size is None or kv_length < local_size
    no_padding = attention_mask is None and q_length == kv_length
    return allow_is_causal_skip and shows_all and no_padding
