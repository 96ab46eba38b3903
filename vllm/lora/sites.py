# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The modules that an adapter can change, whichever library's layers they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vllm.model_executor.models.callable_model.logits import OUTPUT_HEADS
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.layout import Layout, layout_of
from vllm.model_executor.parameters.names import full_names, without_wrappers

from .adapter_config import AdapterConfig, ends_with

# What PyTorch's and Megatron's or vLLM's layers call their widths.
LINEAR_WIDTHS = (("in_features", "out_features"), ("input_size", "output_size"))
# What a mixture's experts are called: each gets only some of the tokens, in another
# order than the batch has.
EXPERTS = {"experts", "local_experts"}
EMBEDDING_WIDTHS = ("num_embeddings", "embedding_dim")


@dataclass(frozen=True)
class Site:
    """A linear layer, an embedding or a stack of experts that an adapter can change.

    Args:
        name: of the module, as in the names of its parameters; of a stack, that of the
            parameter.
        module: the layer itself; of a stack, the module that has the parameter.
        is_embedding: its input is token ids, and its weight `[inputs, outputs]`.
        is_head: it gives the logits.
        layout: of its weight, `[outputs, inputs]` if it is linear.
        mixture: the name of the block whose expert it is a part of, or None.
        experts: the number of experts of a stack, whose parameter is
            `[experts, outputs, inputs]`; 0 is a layer of its own.
        is_transposed: the stack is `[experts, inputs, outputs]`, as gpt-oss has it.

    """

    name: str
    module: nn.Module
    is_embedding: bool
    is_head: bool
    layout: Layout
    mixture: str | None = None
    experts: int = 0
    is_transposed: bool = False

    @property
    def _axes(self) -> tuple[int, int]:
        """Of the inputs and of the outputs, in the layout."""
        if self.experts:
            return (1, 2) if self.is_transposed else (2, 1)
        return (0, 1) if self.is_embedding else (1, 0)

    @property
    def is_divided(self) -> bool:
        return self.layout.local_shape != self.layout.shape

    @property
    def own_name(self) -> str:
        """The last part of the name; of a stack, what its module calls it."""
        return self.name.rpartition(".")[2]

    def factor_rows(self, rank: int) -> int:
        """The rows of each factor: `rank` for every expert of a stack."""
        return rank * (self.experts or 1)

    @property
    def inputs(self) -> int:
        """Of the whole layer, all ranks together."""
        return self.layout.shape[self._axes[0]]

    @property
    def outputs(self) -> int:
        return self.layout.shape[self._axes[1]]

    @property
    def local_inputs(self) -> int:
        return self.layout.local_shape[self._axes[0]]

    @property
    def local_outputs(self) -> int:
        return self.layout.local_shape[self._axes[1]]

    def local_a(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's columns of A: `[rows, inputs]` -> `[rows, local inputs]`."""
        return self._local(whole, self._axes[0])

    def local_b(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's columns of B: `[rows, outputs]` -> `[rows, local outputs]`."""
        return self._local(whole, self._axes[1])

    def _local(self, whole: torch.Tensor, axis: int) -> torch.Tensor:
        if self.layout.local_shape[axis] == self.layout.shape[axis]:
            return whole
        local = whole.new_zeros(whole.shape[0], self.layout.local_shape[axis])
        for box in self.layout.boxes:
            start, from_, size = box.local[axis], box.whole[axis], box.sizes[axis]
            local[:, start : start + size] = whole[:, from_ : from_ + size]
        return local


def find_sites(module: nn.Module, context: ParallelContext) -> dict[str, Site]:
    """All sites of this rank's part of `module`, by name.

    Of experts those that a block holds in a ModuleList or ModuleDict, and those whose
    weights are one parameter, as Transformers has them.
    """
    sites = {}
    full_name = full_names(module)
    for name, part in module.named_modules():
        for stack in _stacks(name, part, context):
            sites[stack.name] = stack
        weight = getattr(part, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            continue
        is_embedding = all(hasattr(part, width) for width in EMBEDDING_WIDTHS)
        is_linear = any(
            all(hasattr(part, width) for width in pair) for pair in LINEAR_WIDTHS
        )
        if not (is_embedding or is_linear):
            continue
        block = _block_of_expert(name)
        if block is not None and not _holds_experts(module, block):
            continue
        name = full_name(f"{without_wrappers(name)}.weight", None)
        name = name.removesuffix(".weight")
        is_head = name in OUTPUT_HEADS
        if type(part).__name__ == "ParallelLMHead":  # an embedding in vLLM's classes
            is_embedding, is_head = False, True
        layout = layout_of(weight, part, context)
        sites[name] = Site(name, part, is_embedding, is_head, layout, block)
    return sites


def _stacks(name: str, part: nn.Module, context: ParallelContext) -> Iterator[Site]:
    """The parameters of `part` that stack the weights of a block's experts.

    vLLM's and Megatron's experts are left out, because their kernels read other
    tensors; and so are DTensors, and parameters of which a rank has some experts only.
    """
    block = _block_of_expert(name)
    of_a_library = hasattr(part, "quant_method") or hasattr(part, "ep_group")
    if not block or name.rpartition(".")[2] not in EXPERTS or of_a_library:
        return
    for own, parameter in part.named_parameters(recurse=False):
        if parameter.dim() != 3 or isinstance(parameter, DTensor):
            continue
        layout = layout_of(parameter, part, context)
        if layout.local_shape[0] != layout.shape[0]:
            continue
        yield Site(
            f"{without_wrappers(name)}.{own}",
            part,
            is_embedding=False,
            is_head=False,
            layout=layout,
            mixture=block,
            experts=parameter.shape[0],
            # What Transformers calls it, and PEFT asks for.
            is_transposed=getattr(part, "is_transposed", False),
        )


def experts_without_adapters(module: nn.Module, sites: Iterable[str]) -> list[str]:
    """Names of the experts' weights in `module` that are no part of `sites`."""
    return [
        name
        for name, parameter in module.named_parameters()
        if parameter.dim() >= 2
        and not name.endswith("bias")
        and _block_of_expert(name) is not None
        and without_wrappers(name) not in sites
        and without_wrappers(name).rpartition(".")[0] not in sites
    ]


def _block_of_expert(name: str) -> str | None:
    """The name of the block of experts that has the layer `name`."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part in EXPERTS), None)
    return None if index is None else ".".join(parts[:index])


def _holds_experts(module: nn.Module, block: str) -> bool:
    if not block:
        return False  # the whole model, which is not called with hidden states
    held = [getattr(module.get_submodule(block), name, None) for name in EXPERTS]
    return any(isinstance(which, nn.ModuleList | nn.ModuleDict) for which in held)


def targets_of(config: AdapterConfig, sites: dict[str, Site]) -> list[Site]:
    """The sites that an adapter of `config` changes.

    Raises:
        ValueError: a name of `target_modules` or of `target_parameters` matches none of
            them, or nothing does.

    """
    layers = [site for site in sites.values() if not site.experts]
    stacks = [site for site in sites.values() if site.experts]
    for end in config.target_parameters:
        if not any(ends_with(site.name, end) for site in stacks):
            raise ValueError(
                f"target_parameters has {end!r}, which is no parameter of a block's "
                f"experts; the model has {', '.join(s.name for s in stacks) or 'none'}."
            )
    chosen = [
        site
        for site in sites.values()
        if (
            config.targets_parameter(site.name)
            if site.experts
            else config.targets(site.name, not site.is_embedding, site.is_head)
        )
    ]
    ends: Any = config.target_modules
    unknown = []
    if not isinstance(ends, str):
        unknown = [
            end for end in ends if not any(ends_with(site.name, end) for site in layers)
        ]
    if unknown or not chosen:
        raise ValueError(
            f"target_modules={config.target_modules!r} names "
            f"{', '.join(unknown) or 'nothing'} that is no linear layer or embedding "
            f"of the model; it has {', '.join(s.name for s in layers) or 'none'}."
            f"{_about_experts(unknown)}"
        )
    return chosen


def _about_experts(names: Iterable[str]) -> str:
    if all(EXPERTS.isdisjoint(name.split(".")) for name in names):
        return ""
    return (
        " Of experts those that a block holds in a ModuleList or ModuleDict take an "
        "adapter, and one parameter of all by target_parameters; no layers of vLLM's "
        "or Megatron's, and in an engine on a GPU none at all."
    )


def unknown_module(name: str, known: Iterable[str]) -> ValueError:
    """The error for an adapter that names a module which is no site."""
    ends = sorted({other.rpartition(".")[2] for other in known if other})
    return ValueError(
        f"The adapter changes {name}, which is no linear layer or embedding of the "
        f"model that gets every token; it has {', '.join(ends) or 'none'}."
        f"{_about_experts([name])}"
    )
