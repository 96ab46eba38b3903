# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention modules of libraries, which are known by their forward.

Their forward reaches its kernel in a way that cannot be seen, or writes attention out.
A call of the whole module is an attention call in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import handle_torch_function

from vllm.model_executor.models.plans.layers import become

from .calls import AttentionCall, is_watched
from .flex import FlexMods
from .readers import READERS
from .rebind import rebind
from .stand_ins import by_plain_operators
from .transformers_attention import use_seen_attention


class LibraryAttention(nn.Module):
    """An attention module of a library, whose calls are seen."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return core_attention(self, super().forward, *args, **kwargs)


def show_library_attention(module: nn.Module) -> None:
    """Have the known attention modules in `module` be seen; each stays the same."""
    for part in module.modules():
        reader = _READERS.get(_name_of_forward(part))
        if reader is not None:
            become(part, LibraryAttention, vllm_reader=reader)


def core_attention(
    part: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """The forward of a library's attention module, seen as one call."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    if is_watched(tensors):
        return handle_torch_function(
            core_attention, tensors, part, forward, *args, **kwargs
        )
    if tensors[0].device.type == "cpu" and part.vllm_reader is _read_megatron:
        # Megatron's asks for a CUDA device.
        return by_plain_operators(_read_megatron(part, *args, **kwargs))
    return forward(*args, **kwargs)


def _read_core_attention(
    part: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> AttentionCall:
    return part.vllm_reader(part, *args, **kwargs)


def _name_of_forward(part: nn.Module) -> str:
    forward = type(part).forward
    return f"{forward.__module__}.{forward.__qualname__}"


def _read_megatron(
    part: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    attn_mask_type: Any = None,
    attention_bias: torch.Tensor | None = None,
    packed_seq_params: Any = None,
) -> AttentionCall:
    """`DotProductAttention`, of `[tokens, batch, heads, head_dim]`."""
    softmax = part.scale_mask_softmax
    # [batch, heads, tokens, head_dim]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    causal = softmax.attn_mask_type.name == "causal"
    window = None
    # It takes a mask for what is hidden, and none beside a window.
    mask = None if attention_mask is None else ~attention_mask
    if softmax.window_size is not None:
        mask, causal, window = None, True, softmax.window_size[0] + 1
    unservable = None
    if attention_bias is not None:
        unservable = "it gives attention_bias"
    elif packed_seq_params is not None:
        unservable = "it gives packed_seq_params"
    dropout = part.attention_dropout
    return AttentionCall(
        q,
        k,
        v,
        mask,
        causal and mask is None,
        part.softmax_scale * (softmax.scale or 1),
        window=window,
        sinks=part.softmax_offset,
        dropout=dropout.p if dropout.training else 0.0,
        unservable=unservable,
        result=lambda out: out.permute(2, 0, 1, 3).flatten(2),
    )


def _read_torchtitan_flex(
    part: Any,
    q_BLNH: torch.Tensor,  # noqa: N803 - the library's name
    k_BLNH: torch.Tensor,  # noqa: N803
    v_BLNH: torch.Tensor,  # noqa: N803
    *,
    attention_masks: Any,
    score_mod: Any = None,
    scale: float | None = None,
    out_transform: Any = None,
    **kwargs: Any,
) -> AttentionCall:
    """`FlexAttention`, of `[batch, tokens, heads, head_dim]`."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
    call = AttentionCall(
        q,
        k,
        v,
        FlexMods(score_mod, attention_masks),
        causal=False,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        result=lambda out: out.transpose(1, 2),
    )
    if out_transform is not None:
        return replace(call, unservable="its out_transform asks for the softmax's sums")
    return call


_READERS: dict[str, Callable[..., AttentionCall]] = {
    "megatron.core.transformer.dot_product_attention.DotProductAttention.forward": (
        _read_megatron
    ),
    "torchtitan.models.common.attention.FlexAttention.forward": _read_torchtitan_flex,
}
READERS[core_attention] = _read_core_attention


def show_attention(module: nn.Module, always: bool = False) -> None:
    """Have all attention calls of `module` be seen by a mode around its forward.

    Args:
        module: Any module; changed in place.
        always: Transformers' models attend by our `attention` in each forward.

    """
    use_seen_attention(module, always)
    rebind(module)
    show_library_attention(module)
