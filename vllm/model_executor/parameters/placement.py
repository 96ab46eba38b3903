# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a factory returned, made ready to be served: unwrapped, and on its device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parameter import is_lazy

from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

logger = init_logger(__name__)


def unwrap(module: nn.Module) -> nn.Module:
    """The module itself, of what `torch.compile(module)` returned.

    Raises:
        ValueError: it has lazy parameters, whose shapes nobody knows yet.

    """
    if isinstance(module, OptimizedModule):
        logger.info_once(
            "The module inside torch.compile is served: vLLM compiles it itself."
        )
        module = module._orig_mod
    lazy = [
        name
        for tensors in (module.named_parameters(), module.named_buffers())
        for name, tensor in tensors
        if is_lazy(tensor)
    ]
    if lazy:
        raise ValueError(
            f"{type(module).__name__} has lazy parameters without shapes: "
            f"{', '.join(lazy)}. Give their layers the number of input features, or "
            "run the module once before it is returned."
        )
    return module


def place(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` on `device`, with room for what lies on the meta device.

    vLLM's layers that are quantized while they load keep their meta tensors until then.

    Raises:
        ValueError: a tensor on the meta device would never get its values, as it is in
            no checkpoint.

    """
    if lost := list(_lost(module)):
        raise ValueError(
            f"{type(module).__name__} has tensors on the meta device that are in no "
            f"checkpoint: {', '.join(lost)}. Compute them on a real device, as under "
            "torch.device('cpu')."
        )
    for part in module.modules():
        if get_layerwise_info(part).can_load():
            continue
        for tensor in [*part._parameters.values(), *part._buffers.values()]:
            if tensor is not None and tensor.is_meta:
                # In place: tied tensors stay tied, and who refers to one keeps it.
                torch.utils.swap_tensors(tensor, _allocate(tensor, device))
    # Not `to`, which refuses the meta tensors that are left.
    return module._apply(lambda t: t if t.is_meta else t.to(device))


def unregistered_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that are plain attributes, and no views of parameters or buffers.

    Without those of attention layers, which are KV caches.
    """
    registered = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*module.parameters(), *module.buffers())
        if type(tensor) in (nn.Parameter, torch.Tensor)
    }
    for path, part in module.named_modules():
        if isinstance(part, AttentionLayerBase):
            continue
        for name, value in vars(part).items():
            if type(value) not in (nn.Parameter, torch.Tensor) or value.is_meta:
                continue
            if value.untyped_storage().data_ptr() not in registered:
                yield (f"{path}.{name}" if path else name), value


def _allocate(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """As `tensor`, with its attributes; of NaN, to be noticed if nothing is loaded."""
    room = torch.empty_like(tensor, device=device, requires_grad=False)
    if room.is_floating_point():
        room.fill_(float("nan"))
    if isinstance(tensor, nn.Parameter):
        room = nn.Parameter(room, tensor.requires_grad)
        room.__class__ = tensor.__class__
    room.__dict__.update(tensor.__dict__)
    return room


def _lost(module: nn.Module) -> Iterator[str]:
    """The meta tensors that no checkpoint has."""
    for path, part in module.named_modules():
        vllm_layer = type(part).__module__.startswith("vllm.")
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                yield f"{path}.{name}" if path else name
        for name, buffer in part._buffers.items():
            if buffer is None or not buffer.is_meta:
                continue
            if vllm_layer or name in part._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name
