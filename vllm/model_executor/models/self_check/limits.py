# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Long windows and high caps of attention, made small for a short prompt.

Both halves of a `TrainableAttention` get the small ones for the time of the check: the
engine's, which is built again over the same KV cache, and the trainer's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from vllm.config import VllmConfig
from vllm.model_executor.layers.trainable_attention import TrainableAttention
from vllm.model_executor.layers.trainable_attention.paged import build_paged_attention
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.worker.utils import AttentionGroup

SMALL_WINDOW = 16
# Not lower: vLLM's kernel for CPUs gives NaN where a score is 44 times the cap, as it
# computes tanh by an exponential that overflows.
LOW_CAP = 8.0


@contextmanager
def small_limits(
    layers: list[TrainableAttention],
    groups: list[list[AttentionGroup]],
    vllm_config: VllmConfig,
    longest: int,
) -> Iterator[list[list[AttentionGroup]]]:
    """Give `layers` windows and caps that a prompt of `longest` tokens meets.

    Yields:
        `groups`, with builders of metadata for the layers as they are inside.

    """
    changed: set[str] = set()
    with ExitStack() as stack:
        for layer in layers:
            window, cap = layer.sliding_window, layer.logits_soft_cap
            if window is not None and window >= longest:
                window = min(SMALL_WINDOW, longest // 2)
            if cap is not None:
                cap = min(cap, LOW_CAP)
            if (window, cap) != (layer.sliding_window, layer.logits_soft_cap):
                names = stack.enter_context(
                    _with_limits(layer, window, cap, vllm_config)
                )
                changed.update(names)
        if changed:
            groups = [
                [
                    built
                    for part in group
                    for built in _split(part, changed, vllm_config)
                ]
                for group in groups
            ]
        yield groups


@contextmanager
def _with_limits(
    layer: TrainableAttention,
    window: int | None,
    cap: float | None,
    vllm_config: VllmConfig,
) -> Iterator[list[str]]:
    """Yields the names of the layer's KV caches."""
    engine = vllm_config.compilation_config.static_forward_context
    before = layer.paged, layer.paged_later, layer.sliding_window, layer.logits_soft_cap
    assert layer.paged is not None
    old: list[Any] = [layer.paged, *(layer.paged_later or ())]
    layer.sliding_window, layer.logits_soft_cap = window, cap
    try:
        layer.paged, *later = (_rebuilt(layer, paged, vllm_config) for paged in old)
        layer.paged_later = nn.ModuleList(later) if later else None
        yield [paged.layer_name for paged in old]
    finally:
        layer.paged, layer.paged_later = before[:2]
        layer.sliding_window, layer.logits_soft_cap = before[2:]
        engine.update((paged.layer_name, paged) for paged in old)


def _rebuilt(layer: TrainableAttention, old: Any, vllm_config: VllmConfig) -> Any:
    """vLLM's attention of `layer` as it is now, over the KV cache of `old`."""
    del vllm_config.compilation_config.static_forward_context[old.layer_name]
    with set_default_torch_dtype(old.dtype):
        new: Any = build_paged_attention(layer, old.layer_name)
    new.process_weights_after_loading(old.dtype)
    new.kv_cache = old.kv_cache
    return new


def _split(
    group: AttentionGroup, changed: set[str], vllm_config: VllmConfig
) -> Iterator[AttentionGroup]:
    """The layers of `group` by window, as metadata may depend on it."""
    if changed.isdisjoint(group.layer_names):
        yield group
        return
    layers: Any = vllm_config.compilation_config.static_forward_context
    old = group.get_metadata_builder(0)
    by_window: dict[int | None, list[str]] = {}
    for name in group.layer_names:
        by_window.setdefault(layers[name].sliding_window, []).append(name)
    for window, names in by_window.items():
        part = copy.copy(group)
        part.layer_names = names
        spec: Any = group.kv_cache_spec
        if getattr(spec, "sliding_window", None) is not None:
            part.kv_cache_spec = replace(spec, sliding_window=window)
        # The blocks stay as large as the model runner has made them.
        block_size = old.kv_cache_spec.block_size
        part.create_metadata_builders(vllm_config, old.device, block_size)
        yield part
