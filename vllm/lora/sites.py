# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The modules that an adapter can change, whichever library's layers they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm.model_executor.models.callable_model.logits import OUTPUT_HEADS
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.layout import Layout, layout_of
from vllm.model_executor.parameters.names import full_names, without_wrappers

from .adapter_config import AdapterConfig

# What PyTorch's and Megatron's or vLLM's layers call their widths.
LINEAR_WIDTHS = (("in_features", "out_features"), ("input_size", "output_size"))
# What a mixture's experts are called: each gets only some of the tokens, in another
# order than the batch has.
EXPERTS = {"experts", "local_experts"}
EMBEDDING_WIDTHS = ("num_embeddings", "embedding_dim")


@dataclass(frozen=True)
class Site:
    """A linear layer or an embedding that an adapter can change.

    Args:
        name: of the module, as in the names of its parameters.
        module: the layer itself.
        is_embedding: its input is token ids, and its weight `[inputs, outputs]`.
        is_head: it gives the logits.
        layout: of its weight, `[outputs, inputs]` if it is linear.
        mixture: the name of the block whose expert it is a part of, or None.

    """

    name: str
    module: nn.Module
    is_embedding: bool
    is_head: bool
    layout: Layout
    mixture: str | None = None

    @property
    def _input_axis(self) -> int:
        return 0 if self.is_embedding else 1

    @property
    def inputs(self) -> int:
        """Of the whole layer, all ranks together."""
        return self.layout.shape[self._input_axis]

    @property
    def outputs(self) -> int:
        return self.layout.shape[1 - self._input_axis]

    @property
    def local_inputs(self) -> int:
        return self.layout.local_shape[self._input_axis]

    @property
    def local_outputs(self) -> int:
        return self.layout.local_shape[1 - self._input_axis]

    def local_a(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's columns of A: `[rank, inputs]` -> `[rank, local inputs]`."""
        return self._local(whole, self._input_axis)

    def local_b(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's columns of B: `[rank, outputs]` -> `[rank, local outputs]`."""
        return self._local(whole, 1 - self._input_axis)

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

    Of experts only those that a block holds in a ModuleList or ModuleDict.
    """
    sites = {}
    full_name = full_names(module)
    for name, part in module.named_modules():
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
        ValueError: a name of `target_modules` matches none of them, or nothing does.

    """
    chosen = [
        site
        for site in sites.values()
        if config.targets(site.name, not site.is_embedding, site.is_head)
    ]
    ends: Any = config.target_modules
    unknown = []
    if not isinstance(ends, str):
        unknown = [
            end
            for end in ends
            if not any(n == end or n.endswith(f".{end}") for n in sites)
        ]
    if unknown or not chosen:
        raise ValueError(
            f"target_modules={config.target_modules!r} names "
            f"{', '.join(unknown) or 'nothing'} that is no linear layer or embedding "
            f"of the model; it has {', '.join(sites) or 'none'}."
        )
    return chosen


def unknown_module(name: str, known: Iterable[str]) -> ValueError:
    """The error for an adapter that names a module which is no site."""
    ends = sorted({other.rpartition(".")[2] for other in known if other})
    return ValueError(
        f"The adapter changes {name}, which is no linear layer or embedding of the "
        f"model that gets every token; it has {', '.join(ends) or 'none'}."
    )
