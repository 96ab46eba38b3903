# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's paged attention, as `TrainableAttention` builds it in an engine."""

import copy
import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

import vllm.envs as envs
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.model_executor.parallel_context import ParallelContext

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.trainable_attention.attention import (
        TrainableAttention,
    )


class _PagedAttentionMixin:
    """What `TrainableAttention` changes of vLLM's attention layers."""

    # A window that is longer than any sequence. It masks nothing, and selects FA3's
    # windowed kernel; see flash_attn_invariant.py.
    window_without_effect: int | None = None

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the buffers of an engine are not the model's."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, for the same reason."""

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> Any:
        spec = super().get_kv_cache_spec(vllm_config)  # type: ignore[misc]
        if self.window_without_effect is not None:
            # The KV cache stays full attention; only the kernel gets the window.
            spec = replace(spec, sliding_window=self.window_without_effect)
        return spec


@functools.cache
def _paged_attention_cls(causal: bool) -> type["Attention"]:
    # imported late: `vllm.model_executor.layers` exports this module
    from vllm.model_executor.layers.attention import Attention, EncoderOnlyAttention

    base = Attention if causal else EncoderOnlyAttention
    return type(f"Paged{base.__name__}", (_PagedAttentionMixin, base), {})


def free_name(vllm_config: VllmConfig, kind: str, built: int) -> str:
    """A name for the layer of its `kind` that this pipeline stage builds next.

    Args:
        kind: The name without an index.
        built: Layers of the kind that it has built before.
    """
    layers = vllm_config.compilation_config.static_forward_context
    while True:
        name = f"{kind}.{_layer_index(vllm_config, built)}"
        if name not in layers:
            return name
        built += 1  # a plan removed layers of other stages that were built before


def _attention_layers(vllm_config: VllmConfig) -> int:
    """How many attention layers, vLLM's own included, this stage has built."""
    # late, as in _paged_attention_cls
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.layers.mamba.abstract import MambaBase

    layers = vllm_config.compilation_config.static_forward_context.values()
    return sum(
        isinstance(layer, AttentionLayerBase) and not isinstance(layer, MambaBase)
        for layer in layers
    )


def _layer_index(vllm_config: VllmConfig, built: int) -> int:
    """Index in the whole model of the layer after `built` others of its kind.

    With one attention for each layer it is the layer's own in every layout. Extra
    layers get indices after `num_layers`, interleaved by stage, so that no two stages
    use one name.
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


def build_paged_attention(
    layer: "TrainableAttention", prefix: str
) -> "Attention | None":
    """vLLM's attention for `layer`; None where no engine is building a model.

    Raises:
        ValueError: `prefix` has not exactly one integer, or the engine's attention
            backend does not take the head size.
    """
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None or vllm_config.model_config is None:
        return None
    if not layer.causal and vllm_config.model_config.runner_type != "pooling":
        # In a step it would see only the new tokens. It is still useful outside of
        # steps, as in a vision encoder.
        return None
    if not prefix:
        built = _attention_layers(vllm_config)
        prefix = free_name(vllm_config, "trainable_attention", built)
    if sum(part.isdecimal() for part in prefix.split(".")) != 1:
        raise ValueError(
            f"prefix {prefix!r} must contain exactly one integer, the layer's index, "
            "as in 'model.layers.3.attn'. Leave prefix out to have one made."
        )
    cache_config = vllm_config.cache_config
    if cache_config.sliding_window != layer.sliding_window:
        # The layer's own window counts, as it does in training. For None, vLLM would
        # take the window of config.json.
        cache_config = copy.copy(cache_config)
        cache_config.sliding_window = layer.sliding_window
    # Backends without sinks do not take the argument.
    extra: dict[str, Any] = {} if layer.sinks is None else {"sinks": layer.sinks}
    # Its own tensors are in no checkpoint, so they are made on the engine's device even
    # if the factory builds on the meta device.
    with cast(torch.device, vllm_config.device_config.device):
        paged = _paged_attention_cls(layer.causal)(
            num_heads=layer.num_heads,
            head_size=layer.head_dim,
            scale=layer.scale,
            num_kv_heads=layer.num_kv_heads,
            cache_config=cache_config,
            logits_soft_cap=layer.logits_soft_cap,
            per_layer_sliding_window=layer.sliding_window,
            quant_config=vllm_config.quant_config,  # of the KV cache
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
    if layer.causal and envs.VLLM_BATCH_INVARIANT:
        _keep_bits(paged, vllm_config.model_config.max_model_len)
    return paged


def _keep_bits(paged: "Attention", max_model_len: int) -> None:
    """Have a layer round as training does, where the backend can."""
    # late: the modules of other devices' backends cannot be imported everywhere
    name = paged.attn_backend.get_name()
    if name == "FLASH_ATTN":
        from vllm.v1.attention.backends import flash_attn_invariant

        flash_attn_invariant.keep_bits_at_decode(paged, max_model_len)
    elif name == "CPU_ATTN":
        from vllm.v1.attention.backends import cpu_attn_invariant

        cpu_attn_invariant.attend_as_in_training(paged)
