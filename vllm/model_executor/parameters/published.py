# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checkpoints under the names that Transformers' `save_pretrained` publishes."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightTransform

Weights = Iterable[tuple[str, torch.Tensor]]


def own_names(
    module: nn.Module, weights: Weights, names: Collection[str], source: str
) -> Weights:
    """`weights` under the names that `module` has, if they have published ones.

    Transformers writes some models under other names than their own, and says in a
    table of conversions which are which. Here its renamings are followed, one tensor
    at a time, so that a part of a checkpoint may come. A name of `names` stays.

    Args:
        module: what is loaded; anything but Transformers' models is left as it is.
        weights: pairs of name and tensor. A collection stays one.
        names: those of the module.
        source: where the weights come from, for messages.

    Raises:
        ValueError: a tensor is one of several that Transformers would merge.

    """
    if not isinstance(module, PreTrainedModel):
        return weights
    # Older releases of Transformers have no such table.
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return weights
    # Transforms note what they did, and may be shared by all models of a type.
    table = copy.deepcopy(get_model_conversion_mapping(module))
    renamed = _renamed(type(module).__name__, table, weights, names, source)
    return list(renamed) if isinstance(weights, Collection) else renamed


def _renamed(
    kind: str,
    table: list[WeightTransform],
    weights: Weights,
    names: Collection[str],
    source: str,
) -> Iterator[tuple[str, torch.Tensor]]:
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    renamings = [one for one in table if isinstance(one, WeightRenaming)]
    converters = [one for one in table if isinstance(one, WeightConverter)]
    for name, tensor in weights:
        if name in names:
            yield name, tensor
            continue
        own, merged = rename_source_key(name, renamings, converters)
        if merged is not None and own in names:
            raise ValueError(
                f"{source} has {name}, of which Transformers makes a part of {own} of "
                f"{kind}; such tensors are not merged here. Save the module's "
                "state_dict() instead of calling save_pretrained."
            )
        yield (own if own in names else name), tensor
