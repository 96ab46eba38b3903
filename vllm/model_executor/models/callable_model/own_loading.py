# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A module that loads its weights itself, and whose linear layers are quantized."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase

from .quantized_linears import OutputOnly, QuantizedLinear


@contextmanager
def plain_while_loading(
    architecture: str, module: nn.Module, vllm_config: VllmConfig
) -> Iterator[None]:
    """Let a module's own `load_weights` write into plain linear layers.

    It knows nothing of quantized ones. When it is done, each quantized layer takes its
    place again, and gets the weights that the plain one was given.

    Args:
        architecture: The registered name.
        module: What the factory built, with quantized layers in the places of plain
            ones. Nothing is done if it has no `load_weights`.
        vllm_config: The engine's config.

    Raises:
        ValueError: A layer cannot be given a whole, unquantized matrix, or has been.

    """
    layers = [
        (path, part)
        for path, part in module.named_modules(remove_duplicate=False)
        if isinstance(part, OutputOnly)
    ]
    if not layers or not hasattr(module, "load_weights"):
        yield
        return
    for path, layer in layers:
        _check(architecture, type(module).__name__, path, layer)
    plain: dict[int, nn.Linear] = {}  # by the id of the quantized layer
    for path, layer in layers:
        if id(layer) not in plain:
            plain[id(layer)] = nn.Linear(
                layer.input_size,
                layer.output_size,
                bias=layer.bias is not None,
                device=vllm_config.device_config.device,
                dtype=layer.params_dtype,
            ).requires_grad_(False)
        _put(module, path, plain[id(layer)])
    try:
        yield
    finally:
        for path, layer in layers:
            _put(module, path, layer)
    for _, layer in layers:
        given = plain.pop(id(layer), None)
        if given is None:  # the layer has two names
            continue
        parameters: list[tuple[str, Any]] = list(layer.named_parameters())
        for name, parameter in parameters:
            # vLLM quantizes a layer when it has got all of its parameters.
            parameter.weight_loader(parameter, getattr(given, name).data)


def _put(module: nn.Module, path: str, layer: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    module.get_submodule(owner).register_module(leaf, layer)


def _check(architecture: str, name: str, path: str, layer: LinearBase) -> None:
    """Raise unless `layer` waits for the whole matrix in the module's dtype."""
    weight = cast("torch.Tensor | None", getattr(layer, "weight", None))
    if not isinstance(layer, QuantizedLinear):
        why = "is divided among ranks"
    elif weight is None or weight.dtype != layer.params_dtype:
        why = "has no unquantized weight to write into"
    elif not weight.is_meta:
        why = "was loaded before"
    else:
        return
    raise ValueError(
        f"{architecture}: {path} is quantized and {why}, but {name} loads its weights "
        "itself, expected unquantized ones on one rank, once. Take load_weights away, "
        "so that weights are loaded by their names."
    )
