# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Load a full, unsharded checkpoint by name into a module, whatever shards it.

One class per way to shard a parameter says which full shape the checkpoint has to
have and how this rank takes its part.
"""

from __future__ import annotations

import itertools
import pickle
import sys
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vllm.distributed import get_ep_group, get_pp_group
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.parallel_context import ParallelContext, all_gather_text

# Names that libraries add to a state dict for data that is not a weight.
EXTRA_STATE = "_extra_state"
LISTED = 8


class ShardedTensor(Protocol):
    """One parameter or buffer of this rank, and what fills it."""

    full_shape: torch.Size

    def load(self, full: torch.Tensor) -> None:
        """Take this rank's part of `full`, whose shape is `full_shape`."""


class PlainTensor:
    """Every rank holds the whole tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.full_shape = tensor.shape

    def load(self, full: torch.Tensor) -> None:
        self.tensor.copy_(full)


class DistributedTensor:
    """A DTensor; its mesh and placements say what is whose."""

    def __init__(self, tensor: DTensor) -> None:
        self.tensor = tensor
        self.full_shape = tensor.shape

    def load(self, full: torch.Tensor) -> None:
        local = self.tensor.to_local()
        # Every rank has read the checkpoint: no source rank, no communication.
        sharded = distribute_tensor(
            full.to(local.device),
            self.tensor.device_mesh,
            self.tensor.placements,
            src_data_rank=None,
        )
        local.copy_(sharded.to_local())


class MegatronTensor:
    """A parameter that megatron-core marked as tensor-parallel.

    `partition_stride` chunks of each rank are spread over the axis, as for the gate
    and up halves of a fused SwiGLU.
    """

    def __init__(self, tensor: torch.Tensor, context: ParallelContext) -> None:
        self.tensor = tensor
        self.axis: int = tensor.partition_dim  # type: ignore[attr-defined]
        self.stride: int = tensor.partition_stride  # type: ignore[attr-defined]
        self.size = context.get_tensor_parallel_world_size()
        self.rank = context.get_tensor_parallel_rank()
        shape = list(tensor.shape)
        shape[self.axis] *= self.size
        self.full_shape = torch.Size(shape)

    def load(self, full: torch.Tensor) -> None:
        chunks = full.chunk(self.size * self.stride, dim=self.axis)
        self.tensor.copy_(torch.cat(chunks[self.rank :: self.size], dim=self.axis))


class VllmTensor:
    """A parameter of one of vLLM's parallel layers, which loads its part itself."""

    def __init__(self, tensor: torch.Tensor, layer: nn.Module) -> None:
        self.tensor = tensor
        shape = list(tensor.shape)
        axis = getattr(tensor, "output_dim", None)
        if axis is not None:
            if isinstance(layer, QKVParallelLinear):
                heads = layer.total_num_heads + 2 * layer.total_num_kv_heads
                shape[axis] = heads * layer.head_size
            elif isinstance(layer, ColumnParallelLinear):
                shape[axis] = layer.output_size
            elif isinstance(layer, VocabParallelEmbedding):
                shape[axis] = layer.org_vocab_size
        if isinstance(layer, RowParallelLinear):
            axis = getattr(tensor, "input_dim", None)
            if axis is not None:
                shape[axis] = layer.input_size
        self.full_shape = torch.Size(shape)

    def load(self, full: torch.Tensor) -> None:
        self.tensor.weight_loader(self.tensor, full)  # type: ignore[attr-defined]


@torch.no_grad()
def load_full_checkpoint(
    module: nn.Module,
    weights: Iterable[tuple[str, torch.Tensor]],
    context: ParallelContext,
    source: str = "the checkpoint",
) -> set[str]:
    """Fill every tensor of `module`'s state dict from `weights`, by name.

    A pipeline stage fills its own part, as does an expert-parallel rank: a tensor is
    surplus only if no rank takes it, and all these ranks have to load together.
    megatron-core numbers the layers of a stage, and the experts of a rank, from 0; here
    they have the names that they have in the whole model.

    Args:
        module: its parameters and buffers may be plain, DTensors, megatron-core's
            tensor-parallel parameters, or those of vLLM's parallel layers.
        weights: pairs of name and full tensor. Of names that share one parameter
            (tied weights) one is enough.
        context: the place of this rank.
        source: where the weights come from, for messages.

    Returns:
        The names that were filled.

    Raises:
        ValueError: a tensor is missing, surplus or mis-shaped, or the checkpoint
            cannot be read. The message names every such tensor.

    """
    full_name = _full_names(module)
    wanted = {full_name[n]: t for n, t in _sharded_tensors(module, context)}
    elsewhere = _names_of_all_ranks(set(wanted), context) - wanted.keys()
    loaded: set[str] = set()
    surplus: list[str] = []
    misshaped: list[str] = []
    for name, full in _read(weights, source):
        if name.endswith(EXTRA_STATE) or name in elsewhere:
            continue
        if not isinstance(full, torch.Tensor):
            surplus.append(f"{name} (a {type(full).__name__}, not a tensor)")
        elif name not in wanted:
            surplus.append(name)
        elif full.shape != wanted[name].full_shape:
            expected = list(wanted[name].full_shape)
            misshaped.append(f"{name} {list(full.shape)}, expected {expected}")
            loaded.add(name)
        else:
            wanted[name].load(full)
            loaded.add(name)
    for names in _tied_names(module):
        tied = {full_name[name] for name in names & full_name.keys()}
        if tied & loaded:
            loaded |= tied
    missing = sorted(wanted.keys() - loaded)

    problems = {"missing": missing, "surplus": surplus, "mis-shaped": misshaped}
    if any(problems.values()):
        found = "; ".join(
            f"{len(names)} {problem}: {_listed(names)}"
            for problem, names in problems.items()
            if names
        )
        raise ValueError(
            f"{source} does not fit {type(module).__name__}: {found}. Save the full, "
            "unsharded state dict of the same module, or give the module a "
            "load_weights(weights) method that maps the names."
        )
    return {name for name, full in full_name.items() if full in loaded}


def _names_of_all_ranks(names: set[str], context: ParallelContext) -> set[str]:
    """`names` and those of the other pipeline stages and expert-parallel ranks."""
    groups = []
    if context.pipeline_parallel_size > 1:
        groups.append(get_pp_group())
    if context.expert_parallel_size > 1:
        groups.append(get_ep_group())
    for group in groups:
        texts = all_gather_text("\n".join(sorted(names)), group.cpu_group)
        names = {name for text in texts for name in text.split("\n")}
    return names


def _full_names(module: nn.Module) -> dict[str, str]:
    """The name in the whole model of each entry of `module`'s state dict.

    Only megatron-core's modules have others. It numbers from 0 the layers of a
    pipeline stage, though each knows its place, and the experts of a rank; and the
    last stage's output layer may be a copy of the first stage's embedding. Renamed as
    in megatron-core's own `sharded_state_dict`.
    """
    tensors = module.state_dict(keep_vars=True)
    names = {name: name for name in tensors}
    megatron = sys.modules.get("megatron.core.transformer.module")
    if megatron is None:
        return names
    places: dict[str, int] = {}  # by path, of a module in its list
    for path, part in module.named_modules():
        if not isinstance(part, megatron.MegatronModule):
            continue
        number = getattr(part, "layer_number", None)  # counts from 1
        if path.rpartition(".")[2].isdecimal() and isinstance(number, int):
            places[path] = number - 1
        experts = getattr(part, "local_experts", ())
        for index in range(len(experts)):
            place = part.ep_group.rank() * len(experts) + index
            places[f"{path}.local_experts.{index}"] = place
    for name, tensor in tensors.items():
        paths = itertools.accumulate(name.split("."), "{}.{}".format)
        parts = [str(places.get(p, p.rpartition(".")[2])) for p in paths]
        names[name] = ".".join(parts)
        if getattr(tensor, "shared", False):  # Megatron's mark of such a copy
            stem = name.removesuffix("output_layer.weight")
            names[name] = f"{stem}embedding.word_embeddings.weight"
    return names


def _sharded_tensors(
    module: nn.Module, context: ParallelContext
) -> Iterator[tuple[str, ShardedTensor]]:
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name.endswith(EXTRA_STATE):
            continue
        if isinstance(tensor, DTensor):
            yield name, DistributedTensor(tensor)
        elif getattr(tensor, "allreduce", True) is False:
            yield name, PlainTensor(tensor)  # Megatron's mark of a whole expert
        elif getattr(tensor, "tensor_model_parallel", False):
            yield name, MegatronTensor(tensor, context)
        elif hasattr(tensor, "weight_loader"):
            layer = module.get_submodule(name.rpartition(".")[0])
            yield name, VllmTensor(tensor, layer)
        else:
            yield name, PlainTensor(tensor)


def _tied_names(module: nn.Module) -> list[set[str]]:
    names: dict[int, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return list(names.values())


def _read(
    weights: Iterable[tuple[str, torch.Tensor]], source: str
) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        yield from weights
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{source} holds a pickle that is not plain tensors, and is not run. Save "
            f"the weights as safetensors, or as torch.save(state_dict). ({error})"
        ) from error
    except (SafetensorError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{source} cannot be read: {error}. Check that it holds whole "
            "*.safetensors or *.pt files; a truncated one has to be copied or saved "
            "again."
        ) from error


def _listed(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
