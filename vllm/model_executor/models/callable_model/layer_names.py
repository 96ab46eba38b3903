# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Names of a draft model's layers, in an engine that has its target's already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.config import VllmConfig

# Where vLLM's layers keep the name by which a step finds them.
ATTRIBUTES = ("layer_name", "prefix")
DRAFT = "draft_model"


@contextmanager
def names_of_its_own(vllm_config: VllmConfig, prefix: str) -> Iterator[dict[str, Any]]:
    """Rename layers that are built inside, where another model has their names.

    vLLM has one table of layers for all models of an engine. A draft model is often of
    the class of its target, so that both would give their layers the same names.

    Args:
        vllm_config: of the engine; its table gets the layers when the context ends.
        prefix: what vLLM puts before names of this model. Default: `draft_model`.

    Yields:
        The layers that were built inside, by the names that they have at the end.

    Raises:
        ValueError: vLLM has no way to rename a layer.

    """
    config = vllm_config.compilation_config
    known = config.static_forward_context
    experts = len(config.static_all_moe_layers)
    built: dict[str, Any] = {}
    config.static_forward_context = built
    renamed: dict[str, Any] = {}
    try:
        yield renamed
    finally:
        config.static_forward_context = known
    names = {
        name: f"{prefix or DRAFT}.{name}" if name in known else name for name in built
    }
    for name, layer in built.items():
        _rename(layer, name, names)
        renamed[names[name]] = layer
    # In place: parts of vLLM may hold the table itself.
    known |= renamed
    config.static_all_moe_layers[experts:] = [
        names[name] for name in config.static_all_moe_layers[experts:]
    ]


def _rename(layer: Any, name: str, names: dict[str, str]) -> None:
    """Give `layer`, and the one whose KV cache it shares, their new names."""
    shared = getattr(layer, "kv_sharing_target_layer_name", None)
    if shared is not None:
        layer.kv_sharing_target_layer_name = names[shared]
    if names[name] == name:
        return
    found = [a for a in ATTRIBUTES if getattr(layer, a, None) == name]
    if not found or names[name] in names:
        raise ValueError(
            f"Layer {name} ({type(layer).__name__}) of a draft model has the name of a "
            "layer of its target, and cannot be renamed. Take `prefix` as a third "
            "argument of the callable, and give it to the layer before its name."
        )
    for attribute in found:
        setattr(layer, attribute, names[name])
