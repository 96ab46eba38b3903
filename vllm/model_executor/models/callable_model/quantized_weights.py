# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a quantized checkpoint has beside the parameters of a module."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

if TYPE_CHECKING:
    from .wrapper import CallableModelWrapper

# GPTQ's index of groups. Where they are in order, only the files have it.
UNUSED = ".g_idx"
# Calibrated scales of a layer's KV cache, under the layer or its projections; one for
# both keys and values in older files.
SCALE = re.compile(r"(?P<owner>.+)\.(?P<name>[qkv]_scale|kv_scale)")


def attention_of(model: CallableModelWrapper) -> dict[str, Attention]:
    """Attention layers whose KV cache has scales, by the submodule that calls one."""
    layers: dict[str, Any]
    if model.adapted is not None:
        layers = {path: one.paged for path, one in model.adapted.attention.items()}
    else:
        layers = dict(model.module.named_modules())
    return {
        path: layer
        for path, layer in layers.items()
        if isinstance(layer, Attention)
        and isinstance(getattr(layer, "quant_method", None), BaseKVCacheMethod)
    }


def of_module(
    module: nn.Module,
    attention: Mapping[str, Attention],
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterable[tuple[str, torch.Tensor]]:
    """`weights` without what is not the module's; scales go to attention layers.

    Args:
        module: What the factory built.
        attention: From `attention_of`.
        weights: Pairs of name and tensor.

    Raises:
        ValueError: An update brings scales other than those that a cache has.

    """
    known = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    rest = _without_scales(known, attention, weights)
    # A collection is checked before anything of it is written.
    return list(rest) if isinstance(weights, Collection) else rest


def _without_scales(
    known: set[str],
    attention: Mapping[str, Attention],
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        if name not in known:
            if name.endswith(UNUSED):
                continue
            scale = SCALE.fullmatch(name)
            layer = scale and _layer_of(scale["owner"], attention)
            if layer is not None and scale is not None:
                _load_scale(layer, scale["name"], tensor, name)
                continue
        yield name, tensor


def _layer_of(owner: str, attention: Mapping[str, Attention]) -> Attention | None:
    """The one layer that is `owner`, has it as a projection, or is a part of it."""
    parts = owner.split(".")
    around = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    for path in around[:2]:
        if path in attention:
            return attention[path]
    inside = [path for path in attention if path.startswith(f"{owner}.")]
    return attention[inside[0]] if len(inside) == 1 else None


def _load_scale(layer: Any, name: str, scale: torch.Tensor, source: str) -> None:
    leaf = "k_scale" if name == "kv_scale" else name  # vLLM takes it for values, too
    parameter = getattr(layer, leaf, None)
    if parameter is not None:
        load = getattr(parameter, "weight_loader", default_weight_loader)
        load(parameter, scale.reshape(parameter.shape))
        return
    # vLLM has taken the parameters of the first load away.
    if layer.kv_cache_torch_dtype.itemsize > 1:
        return  # the cache is not quantized, and has no use for scales
    if (now := getattr(layer, f"_{leaf}_float")) != float(scale):
        raise ValueError(
            f"{source} is {float(scale)}, but the KV cache has {now}. The scales of a "
            "cache cannot change while it is used: start another engine."
        )
