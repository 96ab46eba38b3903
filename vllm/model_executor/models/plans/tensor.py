# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensor parallelism: this rank's part of a module, as its `tp_plan` divides it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from vllm.model_executor.layers.trainable_attention import TrainableAttention
from vllm.model_executor.models.plans.layers import (
    RowwiseLinear,
    WholeLinear,
    follow_style,
)
from vllm.model_executor.models.plans.patterns import kind_of, owners
from vllm.model_executor.models.plans.styles import Entry, Style
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.layout import MARK, megatron_layout

# Of a linear layer and an embedding; the two in between are what `sum_as_divided` left.
PLAIN = (
    nn.Linear.forward,
    WholeLinear.forward,
    RowwiseLinear.forward,
    nn.Embedding.forward,
)


def calls_embedding(part: nn.Module) -> bool:
    """Whether the forward of an embedding's subclass only adds to `nn.Embedding`'s.

    It calls `super().forward`, and does nothing else with the weight than to ask for
    its dtype, as Gemma's does, which scales the result.
    """
    if not isinstance(part, nn.Embedding):
        return False
    names = getattr(getattr(type(part).forward, "__code__", None), "co_names", ())
    if not {"super", "forward"} <= set(names):
        return False
    weight = part.weight.detach()
    if weight.is_meta and not any(buffer.is_meta for buffer in part.buffers()):
        # One call has one device.
        weight = torch.empty_like(weight, device=torch.get_default_device())
    uses = _Uses(weight)
    token = torch.zeros(1, dtype=torch.long, device=weight.device)
    with torch.no_grad(), uses:
        torch.func.functional_call(part, {"weight": weight}, (token,))
    return uses.found == [F.embedding]


class _Uses(TorchFunctionMode):
    """Which functions a tensor is given to."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.found: list[Any] = []
        self._tensor = tensor

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = (*args, *(kwargs or {}).values())
        # What a getter gives, such as a dtype, is the same on every rank.
        is_getter = getattr(func, "__name__", "") == "__get__"
        if not is_getter and any(value is self._tensor for value in given):
            self.found.append(func)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Split:
    """How one parameter is split: by which entry, and on which axis."""

    entry: Entry
    axis: int
    blocks: int  # matrices that are fused along the axis


def match_splits(module: nn.Module, styles: Mapping[str, Entry]) -> dict[str, Split]:
    """How each parameter is split that `styles` split, by its name.

    Raises:
        ValueError: A module is none that can be split, or a parameter is named twice.

    """
    splits: dict[str, Split] = {}
    for name, entry in styles.items():
        if entry.style.split is None:
            continue
        owner, _, leaf = name.rpartition(".")
        part = module.get_submodule(owner)
        if leaf in part._parameters:
            parameters = {name: part.get_parameter(leaf)}
        else:
            part = part.get_submodule(leaf)
            # Another forward may do more with the weight than F.linear does. The
            # instance's own is kept, unless it would have to sum the outputs.
            plain = type(part).forward in PLAIN or calls_embedding(part)
            plain &= entry.style.split != "inputs" or "forward" not in vars(part)
            if not plain or entry.style.split == "experts":
                raise ValueError(
                    f"{kind_of(module)}: tp_plan has {entry.pattern!r}: "
                    f"{entry.word!r}, but {name} is a {kind_of(part)}. Of modules, "
                    "nn.Linear and nn.Embedding are split; of others, name the "
                    "parameters."
                )
            parameters = dict(part.named_parameters(name, recurse=False))
        for full_name, parameter in parameters.items():
            axis = _axis(entry.style, parameter, isinstance(part, nn.Embedding))
            if axis is None:
                continue
            if full_name in splits:
                raise ValueError(
                    f"{kind_of(module)}: tp_plan names {full_name} twice, by "
                    f"{splits[full_name].entry.pattern!r} and by {entry.pattern!r}. "
                    "Leave one out."
                )
            splits[full_name] = Split(entry, axis, entry.style.blocks)
    return splits


def divide(
    module: nn.Module,
    styles: Mapping[str, Entry],
    splits: Mapping[str, Split],
    context: ParallelContext,
) -> None:
    """Leave this rank's part of `module`: of parameters, attention heads and forwards.

    Args:
        module: The whole module.
        styles: From `match_styles`.
        splits: From `match_splits`.
        context: The place of this rank.

    Raises:
        ValueError: The ranks cannot divide a parameter or the attention heads.

    """
    _split(module, splits, context)
    _divide_attention(module, styles, context)
    _follow_styles(module, styles, context)


def _split(
    module: nn.Module, splits: Mapping[str, Split], context: ParallelContext
) -> None:
    """Keep this rank's part of every parameter that is split."""
    # By id, because a reference would keep a whole tensor after it was split.
    names_by_id: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names_by_id.setdefault(id(parameter), []).append(name)
    for names in names_by_id.values():
        split = splits.get(names[0])
        for name in names[1:]:  # tied weights
            other = splits.get(name)
            if (split and (split.axis, split.blocks)) != (
                other and (other.axis, other.blocks)
            ):
                raise ValueError(
                    f"{kind_of(module)}: {names[0]} and {name} are one parameter, but "
                    "tp_plan does not split both in the same way. Name both, as "
                    "rowwise for an embedding and colwise_rep for an output head, or "
                    "neither."
                )
        if split is None:
            continue
        shard = _shard(module, names[0], split, context)
        for name in names:
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner).register_parameter(leaf, shard)


def _axis(style: Style, parameter: nn.Parameter, embedding: bool) -> int | None:
    """The axis of `parameter` that `style` splits."""
    if style.split == "experts":
        return 0
    if parameter.dim() == 1:  # a bias
        return 0 if style.split == "outputs" else None
    # [..., outputs, inputs] of a linear layer, [inputs, outputs] of an embedding
    last = (style.split == "inputs") != embedding
    return parameter.dim() - (1 if last else 2)


@torch.no_grad()
def _shard(
    module: nn.Module,
    name: str,
    split: Split,
    context: ParallelContext,
) -> nn.Parameter:
    """This rank's part of a parameter, with megatron-core's marks."""
    full = module.get_parameter(name)
    ranks = context.get_tensor_parallel_world_size()
    size = full.shape[split.axis]
    if size % (ranks * split.blocks):
        blocks = f"{split.blocks} blocks of " if split.blocks > 1 else ""
        raise ValueError(
            f"{kind_of(module)}: tp_plan has {split.entry.pattern!r}: "
            f"{split.entry.word!r}, but {name} {list(full.shape)} has {blocks}"
            f"{size // split.blocks} features on axis {split.axis}, which {ranks} "
            "tensor-parallel ranks do not divide. Use a number of ranks that does, or "
            "leave the entry out."
        )
    shape = list(full.shape)
    shape[split.axis] //= ranks
    shard = nn.Parameter(full.new_empty(shape), full.requires_grad)
    setattr(shard, MARK, True)
    shard.partition_dim = split.axis  # type: ignore[attr-defined]
    shard.partition_stride = split.blocks  # type: ignore[attr-defined]
    megatron_layout(shard, context).load(shard, full)
    return shard


def _divide_attention(
    module: nn.Module, styles: Mapping[str, Entry], context: ParallelContext
) -> None:
    """Give attention layers this rank's heads, where the projections are split."""
    ranks = context.get_tensor_parallel_world_size()
    for name, layer in list(module.named_modules()):
        if not isinstance(layer, TrainableAttention):
            continue
        query = layer.num_heads * layer.head_dim
        key = layer.num_kv_heads * layer.head_dim
        for owner in owners(name):
            # Look in the nearest module that also contains the query's projection.
            widths = {
                full_name: part.out_features
                for full_name, part in module.get_submodule(owner).named_modules(
                    prefix=owner
                )
                if isinstance(part, nn.Linear)
            }
            if {query, query + 2 * key} & set(widths.values()):
                break
        split = {
            linear: (width, styles[linear])
            for linear, width in widths.items()
            if linear in styles
            and styles[linear].style.split == "outputs"
            and styles[linear].style.gives is None
        }
        for linear, (width, entry) in split.items():
            if width == query + 2 * key:
                raise ValueError(
                    f"{kind_of(module)}: tp_plan has {entry.pattern!r}: "
                    f"{entry.word!r}, but {linear} gives query, key and value in one, "
                    "and its ranks would get other parts of them. Make it three "
                    "linear layers."
                )
        if not {query, key} & {width for width, _ in split.values()}:
            continue
        if layer.sinks is not None and not hasattr(layer.sinks, MARK):
            _, entry = next(iter(split.values()))
            split_sinks = Split(entry, axis=0, blocks=1)
            layer.sinks = _shard(module, f"{name}.sinks", split_sinks, context)
        try:
            layer.divide_heads(ranks)
        except ValueError as error:
            patterns = {entry.pattern for width, entry in split.values()}
            raise ValueError(
                f"{kind_of(module)}: tp_plan splits the projections of {name} by "
                f"{', '.join(map(repr, sorted(patterns)))}, but {error}"
            ) from None


def _follow_styles(
    module: nn.Module, styles: Mapping[str, Entry], context: ParallelContext
) -> None:
    """Have all modules take and give what their styles say."""
    for name, entry in styles.items():
        owner, _, leaf = name.rpartition(".")
        part = module.get_submodule(owner)
        if leaf not in part._parameters:
            follow_style(part.get_submodule(leaf), entry.style, context)
        elif entry.style.split == "experts" and hasattr(part, "num_experts"):
            part.num_experts = part.get_parameter(leaf).shape[0]  # type: ignore
