# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Layers whose forward a plan changes, and hooks around other modules.

A layer whose forward changes gets another class, which is a subclass of its own. So it
is still an `nn.Linear` for code that looks for one, and code that puts another module
in its place sees by its class what that module has to do.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from vllm.distributed import (
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.tree_linear import (
    divided_linear,
    layout_invariant,
    number_of_leaves,
    whole_linear,
)
from vllm.model_executor.models.plans.styles import Style
from vllm.model_executor.parallel_context import ParallelContext


def become(
    part: nn.Module, layer: type[nn.Module], inside: bool = False, **attributes: Any
) -> None:
    """Have `part` run the forward of `layer`, as a subclass of its own class.

    Only the class changes, as with `fully_shard`: `part` stays the same object, with
    its parameters, hooks and attributes. A class that is made for it keeps the name of
    its own, by which `_no_split_modules` and others know it.

    Args:
        part: A module.
        layer: A class with a forward, which may call that of `part` by `super()`.
        inside: The forward of `part` is kept, and calls that of `layer` by `super()`.
        attributes: What `part` gets for the forward of `layer`.

    """
    own = type(part)
    if "forward" in vars(part):  # an instance's forward comes before that of any class
        own = _subclass(own, forward=staticmethod(vars(part).pop("forward")))
    if inside:
        part.__class__ = _subclass(own, own, layer)
    else:
        part.__class__ = layer if issubclass(layer, own) else _subclass(own, layer)
    for name, value in attributes.items():
        setattr(part, name, value)


def _subclass(own: type[nn.Module], *first: type[nn.Module], **members: Any) -> type:
    """A subclass of `first`, and then of `own`, that has the name of `own`."""
    members |= {"__module__": own.__module__, "__qualname__": own.__qualname__}
    return types.new_class(
        own.__name__,
        tuple(dict.fromkeys((*first, own))),
        exec_body=lambda body: body.update(members),
    )


def gather_outputs(part: torch.Tensor) -> torch.Tensor:
    """`[..., outputs of this rank]` -> `[..., outputs]`.

    One call for a mode that watches a module's functions, which need not see how.
    """
    if has_torch_function_unary(part):
        return handle_torch_function(gather_outputs, (part,), part)
    return tensor_model_parallel_all_gather(part)


def sum_outputs(part: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks, in the shape of `part`; one call as `gather_outputs`."""
    if has_torch_function_unary(part):
        return handle_torch_function(sum_outputs, (part,), part)
    return tensor_model_parallel_all_reduce(part)


class _Colwise(nn.Module):
    """Gives the outputs of this rank, or of all ranks if `gather_output`."""

    gather_output: bool

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out = super().forward(input)  # [..., outputs of this rank]
        return gather_outputs(out) if self.gather_output else out


class WholeLinear(nn.Linear):
    """A linear layer whose outputs have the same bits if they are divided."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if layout_invariant():
            return whole_linear(input, self.weight, self.bias)
        return super().forward(input)


class ColwiseLinear(_Colwise, WholeLinear):
    """A linear layer with its outputs divided: `[..., inputs]` -> `[..., outputs]`."""


class ColwiseEmbedding(_Colwise, nn.Embedding):
    """An embedding with its features divided: `[...]` -> `[..., features]`."""


class RowwiseLinear(nn.Linear):
    """A linear layer with its inputs divided: `[..., inputs]` -> `[..., outputs]`.

    It takes this rank's inputs, or those of all ranks unless `input_is_parallel`. The
    outputs are summed over the ranks, and then the bias is added, once.
    """

    input_is_parallel: bool
    tp_rank: int
    tp_size: int
    blocks: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.input_is_parallel:
            input = input.chunk(self.tp_size, dim=-1)[self.tp_rank]
        # Ranks have no whole subtrees of fused matrices: some features of each.
        whole_size = self.in_features * self.tp_size if self.blocks == 1 else 1
        leaves = number_of_leaves(whole_size, self.tp_size)
        group = get_tp_group() if self.tp_size > 1 else None
        if leaves > 1:
            return divided_linear(input, self.weight, self.bias, leaves, group)
        if group is None:
            return super().forward(input)
        out = sum_outputs(F.linear(input, self.weight))
        return out if self.bias is None else out + self.bias


class RowwiseEmbedding(nn.Embedding):
    """An embedding with its tokens divided: `[...]` -> `[..., features]`."""

    tp_rank: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        local = input - self.tp_rank * self.num_embeddings
        # Each token is known to one rank.
        known = (local >= 0) & (local < self.num_embeddings)
        out = F.embedding(local.where(known, 0), self.weight)
        return sum_outputs(out * known.unsqueeze(-1))


def follow_style(part: nn.Module, style: Style, context: ParallelContext) -> None:
    """Have a module take and give what its style says.

    Args:
        part: Its parameters are this rank's. It is an `nn.Linear` or an `nn.Embedding`
            if the style splits them, and else any module.
        style: The meaning of its entry in a `tp_plan`.
        context: The place of this rank.

    """
    rank, size = context.tensor_parallel_rank, context.tensor_parallel_size
    by_outputs, gathers = style.split == "outputs", style.gives == "gathered"
    if style.split is None:
        _add_hooks(part, style, rank, size)
    elif isinstance(part, nn.Linear):
        part.out_features, part.in_features = part.weight.shape
        if by_outputs:
            become(part, ColwiseLinear, gather_output=gathers)
        else:
            parallel = style.takes != "part"
            become(
                part,
                RowwiseLinear,
                input_is_parallel=parallel,
                tp_rank=rank,
                tp_size=size,
                blocks=style.blocks,
            )
    elif isinstance(part, nn.Embedding):
        part.num_embeddings, part.embedding_dim = part.weight.shape
        # One that scales what `nn.Embedding` gives still does (Gemma).
        inside = type(part).forward is not nn.Embedding.forward
        if by_outputs:
            become(part, ColwiseEmbedding, inside, gather_output=gathers)
        else:
            become(part, RowwiseEmbedding, inside, tp_rank=rank)


def _add_hooks(part: nn.Module, style: Style, rank: int, size: int) -> None:
    """Put collectives around a module of any class, whose forward is not changed."""
    if style.takes == "share":
        part.register_forward_pre_hook(lambda _, args: (args[0] / size, *args[1:]))
    if style.gives == "summed":
        part.register_forward_hook(_sum_output)
    elif style.gives == "routed":
        part.register_forward_hook(functools.partial(_route, rank=rank, size=size))


def _sum_output(part: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
    return sum_outputs(out)


def _route(
    part: Any, args: Any, out: tuple[torch.Tensor, ...], rank: int, size: int
) -> tuple[torch.Tensor, ...]:
    """Keep this rank's experts, by their local index, of what a router returned.

    A router returns logits, scores and expert indices, of which the last two are
    `[tokens, top k]`. What goes to other ranks gets the score 0 and the index after the
    last local expert.
    """
    logits, scores, indices, *others = out
    experts = part.num_experts // size
    here = indices // experts == rank
    return (
        logits,
        scores.masked_fill(~here, 0),
        (indices - rank * experts).where(here, experts),
        *others,
    )
