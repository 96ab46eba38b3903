# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A KV cache for each call that a model's forward makes of an attention layer."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.trainable_attention.attention import (
    TrainableAttention,
)
from vllm.model_executor.layers.trainable_attention.engine_step import (
    AttentionCalls,
    EngineLayer,
)


def trainable_layers(model: nn.Module) -> dict[str, TrainableAttention]:
    """The layers of `model` that an engine built, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, TrainableAttention) and layer.paged is not None
    }


@contextmanager
def a_kv_cache_for_each_call(model: nn.Module, calls: AttentionCalls) -> Iterator[None]:
    """Counts the attention layers' calls in the forward inside; then adds KV caches.

    The forward is an `EngineStep` of `calls` without attention metadata, in which
    nothing is cached, within `set_current_vllm_config`.

    Raises:
        RuntimeError: A layer was built for another engine.
        ValueError: A layer with one cache is called more than once.
    """
    layers = trainable_layers(model)
    engine = get_current_vllm_config().compilation_config.static_forward_context
    for name, layer in layers.items():
        assert layer.paged is not None
        engine_name = layer.paged.layer_name
        if engine.get(engine_name) is not layer.paged:
            raise RuntimeError(
                f"The attention layer {name!r} was built for another engine, which has "
                "its KV cache. Build a new module each time the factory is called."
            )
        calls.paths[engine_name] = name
    for part in model.modules():
        if isinstance(part, EngineLayer):
            part.steps_are_marked = True
    ours = {part for layer in layers.values() for part in layer.modules()}
    others = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, AttentionLayerBase) and layer not in ours
    }
    with _count_calls(others) as counts:
        yield
    for name, count in counts.items():
        if count > 1:
            raise ValueError(
                f"The layer {name!r} is called {count} times in one forward, but "
                f"vLLM's {type(others[name]).__name__} has one KV cache, which the "
                "calls would overwrite. Build a layer for each call; of attention, "
                "TrainableAttention has a cache for each call."
            )
    if calls.counts is None:
        calls.counts = {}
    for layer in layers.values():
        assert layer.paged is not None
        layer._add_kv_caches(calls.counts.get(layer.paged.layer_name, 1))


@contextmanager
def _count_calls(modules: dict[str, Any]) -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(
                lambda module, args, name=name: counts.update([name])
            )
            stack.callback(handle.remove)
        yield counts
