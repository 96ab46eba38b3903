# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checkpoints under the names that Transformers' `save_pretrained` publishes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

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
    renamed = _renamed(module, weights, names, source)
    return list(renamed) if isinstance(weights, Collection) else renamed


def _renamed(
    module: PreTrainedModel, weights: Weights, names: Collection[str], source: str
) -> Iterator[tuple[str, torch.Tensor]]:
    rename: Callable[[str], tuple[str, str | None]] | None = None
    for name, tensor in weights:
        if name in names:
            yield name, tensor
            continue
        # Only now, because a trainer may bring its tensors in a call each.
        rename = rename or _renaming(module)
        own, merged = rename(name)
        if merged is not None and own in names:
            raise ValueError(
                f"{source} has {name}, of which Transformers makes a part of {own} of "
                f"{type(module).__name__}; such tensors are not merged here. Save the "
                "module's state_dict() instead of calling save_pretrained."
            )
        yield (own if own in names else name), tensor


def _renaming(module: PreTrainedModel) -> Callable[[str], tuple[str, str | None]]:
    """What gives a published name's own one, and the merge that takes it, if any."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError:  # older releases of Transformers have no such table
        return lambda name: (name, None)
    # Transforms note what they did, and may be shared by all models of a type.
    table = copy.deepcopy(get_model_conversion_mapping(module))
    renamings = [one for one in table if isinstance(one, WeightRenaming)]
    converters = [one for one in table if isinstance(one, WeightConverter)]
    return lambda name: rename_source_key(name, renamings, converters)
