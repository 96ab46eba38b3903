# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""New weights for vLLM's layers that have packed or quantized theirs.

vLLM's layerwise reload (`vllm.model_executor.model_loader.reload`) makes a layer's
tensors again as they were before they were packed, loads and packs them, copies the
result to where a CUDA graph expects it. It takes all layers of a model at once, and
leaves a layer as it was if nothing of it came through a `weight_loader`. Here it is
used for single layers, once all tensors of the layer have come.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any, cast

import torch
from torch import nn

from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.parameters.experts import STACKED, is_plain

try:
    from vllm.model_executor.model_loader.mtp_validation import (
        is_mtp_completeness_check_enabled,
    )
except ImportError:  # before 0.32.0, where weight transfer loads only lists

    def is_mtp_completeness_check_enabled() -> bool:
        return True


# The name of the function that a layerwise reload wraps around weight loaders.
RELOADING = "online_process_loader"


def leave_layerwise_reload(model: nn.Module, keep_packed: bool = False) -> bool:
    """Put every layer's own tensors back, which a layerwise reload took away.

    Args:
        model: What vLLM reloads.
        keep_packed: Leave the layers to the reload that vLLM has to pack again.

    Returns:
        Whether a reload was under way.

    """
    under_way = False
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.kernel_tensors is not None:
            under_way = True
            packs = isinstance(getattr(layer, "quant_method", None), QuantizeMethodBase)
            if keep_packed and (packs or isinstance(layer, AttentionLayerBase)):
                continue
            _put_back(layer)
        if not info.can_load():
            _unwrap_loaders(layer)
    return under_way


def brings_all_weights(weights: Iterable[Any]) -> bool:
    """Whether a reload with `weights` has to be complete.

    It does if they are read one by one, as by `reload_weights`. Weight transfer loads
    lists, or turns vLLM's own check of completeness off.
    """
    return not isinstance(weights, Collection) and is_mtp_completeness_check_enabled()


def _put_back(layer: nn.Module) -> None:
    info = get_layerwise_info(layer)
    assert info.kernel_tensors is not None
    for name, tensor in [*layer._parameters.items(), *layer._buffers.items()]:
        if tensor is not None:
            delattr(layer, name)
    parameters, buffers = info.kernel_tensors
    for name, parameter in parameters.items():
        layer.register_parameter(name, cast(nn.Parameter, parameter))
    for name, buffer in buffers.items():
        persistent = name not in info.kernel_non_persistent_buffers
        layer.register_buffer(name, buffer, persistent=persistent)
    info.reset()


def _unwrap_loaders(layer: nn.Module) -> None:
    """Take off what a reload puts on the tensors it leaves in place, such as biases.

    Outside a reload it ignores what it is called with.
    """
    tensors: list[Any] = [*layer._parameters.values(), *layer._buffers.values()]
    for tensor in tensors:
        loader: Any = getattr(tensor, "weight_loader", None)
        if getattr(loader, "__name__", None) != RELOADING:
            continue
        while loader.__name__ == RELOADING:
            loader = loader.__wrapped__
        if loader is default_weight_loader:
            del tensor.weight_loader
        else:
            tensor.weight_loader = loader


def is_packed(layer: nn.Module) -> bool:
    """Whether vLLM computes with something else than the weights that were loaded.

    To be asked of layers that were loaded. On a CPU, `cpu_linear` comes with packing.
    """
    method = getattr(layer, "quant_method", None)
    if not isinstance(method, QuantizeMethodBase):
        return False
    return hasattr(layer, "cpu_linear") or not _is_unquantized(layer)


def packed_layers(model: nn.Module) -> Iterator[nn.Module]:
    return (layer for layer in model.modules() if is_packed(layer))


def is_loaded_in_place(layer: nn.Module, leaf: str) -> bool:
    """Whether `leaf` of a packed layer is used as it was loaded."""
    if is_plain(layer):
        return leaf not in STACKED
    return leaf == "bias" and _is_unquantized(layer)


def _is_unquantized(layer: nn.Module) -> bool:
    methods = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    return isinstance(getattr(layer, "quant_method", None), methods)


def refuse_patches(layer: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError if what comes for a packed layer is only a patch of its weights.

    vLLM's sparse patches have NaN for the elements that are to stay. While vLLM loads
    them, it replaces `torch.Tensor.copy_` by a function that skips these elements. A
    packed layer no longer has its old weights, so there is nothing that could stay.
    """
    if isinstance(torch.Tensor.copy_, FunctionType):
        raise ValueError(
            f"A sparse patch came for {', '.join(names)}, but vLLM has packed the "
            f"{type(layer).__name__} and keeps no old values to patch. Send whole "
            "tensors, as by vLLM's nccl backend or by WeightSync."
        )


def repack(layer: nn.Module, whole: Mapping[str, torch.Tensor]) -> None:
    """Load whole tensors by their attributes' names into a packed layer.

    They are all of the layer's but for those that are loaded in place, which stay.
    """
    initialize_layerwise_reload(layer)
    parameters, _ = get_layerwise_info(layer).kernel_tensors or ({}, {})
    for leaf, parameter in parameters.items():
        if leaf not in whole and is_loaded_in_place(layer, leaf):
            layer._parameters[leaf] = cast(nn.Parameter, parameter)
    try:
        for leaf, tensor in whole.items():
            parameter = getattr(layer, leaf)
            parameter.weight_loader(parameter, tensor)
        finalize_layerwise_reload(layer, None)
    finally:
        leave_layerwise_reload(layer)


def pack_shard(layer: nn.Module, local: torch.Tensor) -> bool:
    """Pack this rank's part of the weight of an unquantized layer that packs it.

    Args:
        layer: For which `is_packed`.
        local: The part, in the layer's dtype, whose memory the layer may keep.

    Returns:
        Whether it was taken; other layers need `repack`.

    """
    kernel = layer._parameters["weight"]
    if not _is_unquantized(layer) or kernel is None or kernel.shape == local.shape:
        return False
    layer._parameters["weight"] = nn.Parameter(local, requires_grad=False)
    try:
        cast(Any, layer).quant_method.process_weights_after_loading(layer)
    finally:
        layer._parameters["weight"] = kernel
    return True


def finish_repacking(layer: nn.Module, numel: int) -> None:
    """End the reload of a packed layer, of which everything has come, or nothing.

    Args:
        layer: `initialize_layerwise_reload` was called of it.
        numel: elements that make it whole, without those that are loaded in place.

    Raises:
        ValueError: only a part has come; the layer is as it was.

    """
    info = get_layerwise_info(layer)
    if not info.can_load():  # packed when its last tensor came
        return
    parameters, _ = info.kernel_tensors or ({}, {})
    came = info.loaded_weights
    aside = {
        leaf: parameter
        for leaf, parameter in parameters.items()
        if is_loaded_in_place(layer, leaf)
    }
    packed = info.load_numel - sum(aside[n].numel() for n, _ in came if n in aside)
    if packed >= numel > 0:
        for leaf in aside.keys() - {name for name, _ in came}:
            layer._parameters[leaf] = cast(nn.Parameter, parameters[leaf])
        finalize_layerwise_reload(layer, None)
        return
    _put_back(layer)
    if packed > 0:
        raise ValueError(
            f"{packed} of {numel} elements came for a {type(layer).__name__} that vLLM "
            "has packed. Load all of a layer's tensors in one call."
        )
    for name, arguments in came:
        parameter = arguments.arguments["param"] = getattr(layer, name)
        loader = getattr(parameter, "weight_loader", default_weight_loader)
        loader(*arguments.args, **arguments.kwargs)


def keeps_weight(layer: nn.Module) -> bool:
    """Whether a packed layer has its weight beside what it has packed.

    On a CPU whose matrix products oneDNN does not know, a linear layer computes with
    its weight as it was loaded.
    """
    if not _is_unquantized(layer):
        return False
    weight = layer._parameters["weight"]
    embeds = isinstance(cast(Any, layer).quant_method, UnquantizedEmbeddingMethod)
    return embeds or (weight is not None and weight.dim() == 2 and weight.numel() > 0)


def pack_kept(layer: nn.Module) -> None:
    """Pack the weight that a layer keeps again, after a change of it in place."""
    if keeps_weight(layer):
        cast(Any, layer).quant_method.process_weights_after_loading(layer)
