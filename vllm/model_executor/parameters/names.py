# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The tensors that a checkpoint of a module holds, with all names of each.

A tensor may have several names: tied weights have one for each place, and wrappers, as
for activation checkpointing, give it one in `state_dict()` and another in
`named_parameters()`.
"""

from __future__ import annotations

import itertools
import json
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vllm.distributed import get_ep_group, get_pp_group
from vllm.distributed.text_collectives import all_gather_text
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.experts import FusedExperts, Part, Stack, is_stacked
from vllm.model_executor.parameters.hooked import (
    EXTRA_STATE,
    Hooked,
    find_hooked,
    library_of,
    tensors_of,
)
from vllm.model_executor.parameters.layout import Layout, layout_of
from vllm.model_executor.parameters.reload import is_loaded_in_place

# Parts of names that torch.compile, FSDP, activation checkpointing and DDP put in.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}
# Their extra state belongs to FP8 training, and is unpickled by `set_extra_state`.
FP8_LIBRARIES = {"megatron", "transformer_engine"}


Shapes = dict[str, torch.Size | None]  # by name; None of what is no tensor


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: an attribute of a module, which may be replaced by another.

    vLLM replaces a layer's parameters when it packs or quantizes them. With `part` the
    tensor is that part of one of vLLM's parameters that stack experts.
    """

    _owner: weakref.ref[nn.Module]
    leaf: str
    part: Part | None = None

    @property
    def owner(self) -> nn.Module:
        owner = self._owner()
        assert owner is not None, "a layer was removed from its model"
        return owner

    @property
    def tensor(self) -> torch.Tensor | None:
        """What lies there now."""
        owner = self.owner
        tensor = owner._parameters.get(self.leaf)
        return owner._buffers.get(self.leaf) if tensor is None else tensor

    @property
    def local_tensor(self) -> torch.Tensor | None:
        """This rank's part of it."""
        tensor = self.tensor
        if self.part is not None and tensor is not None:
            return self.part.of(tensor) if tensor.numel() else None
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    @property
    def at(self) -> tuple[nn.Module, str]:
        return self.owner, self.leaf


@dataclass
class Entry:
    """One tensor of a module, as a checkpoint holds it.

    Args:
        layout: The whole, and this rank's part of it.
        places: More than one if it is tied.
        names: All names a checkpoint may use.
        state_names: Those that the whole model's state dict has.
        local_names: The module's own names for it.
        optional: Whether a checkpoint may lack it.
        hooked: Whether it lies in a submodule that only its own hooks can fill.
        refusal: Why nothing but the module's own code can load it.

    """

    layout: Layout
    places: list[Place] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    state_names: list[str] = field(default_factory=list)
    local_names: set[str] = field(default_factory=set)
    optional: bool = True
    hooked: bool = False
    refusal: str | None = None

    @property
    def local_tensor(self) -> torch.Tensor:
        """This rank's part of it as it is now, without gradients."""
        tensor = self.places[0].local_tensor
        assert tensor is not None, "a tensor was removed from its module"
        return tensor.detach()

    @property
    def name(self) -> str:
        return min(self.state_names or self.names)


class ModuleNames:
    """What a checkpoint of `module` has to hold, by name.

    `entries` are tensors, by every name; `hooked` are submodules; `extra_states` are
    modules with a `set_extra_state` of their own, by the name of that. `held` are all
    tensors in the module's order, those of hooked submodules included.
    """

    def __init__(self, module: nn.Module, context: ParallelContext) -> None:
        self.entries: dict[str, Entry] = {}
        self.extra_states: dict[str, weakref.ref[nn.Module]] = {}
        self.skips_extra_states = False
        self._stacks: dict[str, Stack] = {}  # by the name that a checkpoint may have
        self._stacked: dict[str, set[str]] = {}  # by parameter, what it holds here
        full_name = full_names(module)
        state = module.state_dict(keep_vars=True)
        self.hooked = list(find_hooked(module, state, full_name, context))

        inside = tuple(f"{h.path}." if h.path else "" for h in self.hooked)
        by_tensor: dict[object, Entry] = {}
        by_id: dict[int, Entry] = {}
        refusals: dict[str, str | None] = {}  # by path of a fused layer
        for path, owner, leaf, tensor in tensors_of(module):
            local_name = f"{path}.{leaf}" if path else leaf
            if is_stacked(owner, leaf):
                experts = FusedExperts(path, cast(RoutedExperts, owner))
                refusals[path] = experts.refusal
                if experts.refusal is None:
                    for each in self._entries_of(experts, owner, leaf, local_name):
                        each.hooked = local_name.startswith(inside)
                        by_tensor[each.places[0]] = each
                    continue
            entry = by_tensor.get(_identity(tensor))
            if entry is None:
                layout = layout_of(tensor, owner, context)
                entry = Entry(layout, refusal=refusals.get(path))
                by_tensor[_identity(tensor)] = entry
            by_id[id(tensor)] = entry
            place = Place(weakref.ref(owner), leaf)
            if place not in entry.places:
                entry.places.append(place)
            entry.optional &= _is_made_by_vllm(owner, leaf)
            entry.local_names.add(local_name)
            entry.names.add(full_name(local_name, tensor))
            entry.hooked |= local_name.startswith(inside)
        self.held = list(by_tensor.values())
        unhooked = [entry for entry in self.held if not entry.hooked]
        for name, tensor in state.items():
            entry = by_id.get(id(tensor))
            if entry is None or entry.hooked:
                continue
            entry.local_names.add(name)
            entry.state_names.append(full_name(name, tensor))
        for entry in unhooked:
            entry.names.update(entry.state_names)
            entry.optional |= not entry.state_names
            for name in sorted(entry.names):
                self.entries[name] = entry
        self._by_plain_name: dict[str, list[Entry]] = {}
        for entry in unhooked:
            for name in {without_wrappers(name) for name in entry.names}:
                self._by_plain_name.setdefault(name, []).append(entry)

        self._placed: WeakKeyDictionary[nn.Module, dict[Place, Entry]]
        self._placed = WeakKeyDictionary()
        for entry in unhooked:
            for place in () if entry.optional else entry.places:
                self._placed.setdefault(place.owner, {})[place] = entry

        for path, part in module.named_modules():
            if type(part).get_extra_state is nn.Module.get_extra_state:
                continue
            local_name = f"{path}.{EXTRA_STATE}" if path else EXTRA_STATE
            if library_of(type(part).get_extra_state) in FP8_LIBRARIES:
                self.skips_extra_states = True
            elif not local_name.startswith(inside):
                name = full_name(local_name, None)
                self.extra_states[name] = weakref.ref(part)

    def find(self, name: str) -> Entry | None:
        """The tensor that a checkpoint calls `name`, with or without wrappers' parts.

        Raises:
            ValueError: without them, several tensors have that name.

        """
        if name in self.entries:
            return self.entries[name]
        found = self._by_plain_name.get(without_wrappers(name), [])
        if len(found) > 1:
            raise ValueError(
                f"{name} may be {' or '.join(sorted(e.name for e in found))}. Save the "
                "checkpoint under the module's own names."
            )
        return found[0] if found else None

    def find_hooked(self, name: str) -> Hooked | None:
        return next((h for h in self.hooked if name.startswith(h.prefix)), None)

    def packed_together(self, layer: nn.Module) -> dict[Place, Entry]:
        """By place, the tensors that a packing layer has to get in one load."""
        return {
            place: entry
            for place, entry in self._placed.get(layer, {}).items()
            if not is_loaded_in_place(layer, place.leaf)
        }

    def unstacked(
        self, weights: Iterable[tuple[str, Any]], source: str
    ) -> Iterator[tuple[str, Any]]:
        """`weights`, with the experts' own tensors for those that stack experts.

        Raises:
            ValueError: such a tensor has another shape.

        """
        for name, whole in weights:
            stack = self._stacks.get(name)
            if stack is None:
                yield name, whole
                continue
            if tuple(whole.shape) != stack.shape:
                raise ValueError(
                    f"{source} does not fit: 1 mis-shaped: {name} {list(whole.shape)}, "
                    f"expected {list(stack.shape)}."
                )
            yield from stack.split(whole)

    def with_stacked(self, names: set[str]) -> set[str]:
        """With those of parameters that stack experts, if all of theirs are there."""
        whole = {name for name, held in self._stacked.items() if held <= names}
        return names | whole

    def without_stacked(self, names: set[str]) -> set[str]:
        """With those of the experts that the parameters among `names` stack."""
        held = [self._stacked[name] for name in names & self._stacked.keys()]
        return names.union(*held)

    def _entries_of(
        self, experts: FusedExperts, layer: nn.Module, leaf: str, local_name: str
    ) -> Iterator[Entry]:
        """Of a parameter that stacks experts, an entry for each tensor of an expert."""
        self._stacks.update(experts.stacks(leaf))
        held = self._stacked[local_name] = set()
        for name, layout, part in experts.tensors(leaf):
            held.add(name)
            place = Place(weakref.ref(layer), leaf, part)
            yield Entry(layout, [place], {name}, [name], {name}, optional=False)

    def numel_of(self, layer: nn.Module) -> int:
        """How many elements of checkpoints that is, without padding."""
        entries = self.packed_together(layer).values()
        return sum(box.numel() for entry in entries for box in entry.layout.boxes)

    def local_names(self) -> set[str]:
        """The module's own names for everything a checkpoint holds."""
        parts: list[Entry | Hooked] = [*self.unique(), *self.hooked]
        return {name for part in parts for name in part.local_names}

    def shapes(self) -> Shapes:
        """Of all that a checkpoint of this module holds."""
        return {
            **{name: entry.layout.shape for name, entry in self.entries.items()},
            **dict.fromkeys(self.extra_states),
            **{name: None for h in self.hooked for name in h.state_names()},
        }

    def shapes_on_all_ranks(self, context: ParallelContext) -> Shapes:
        """With those of the other pipeline stages and expert-parallel ranks."""
        groups = []
        if context.pipeline_parallel_size > 1:
            groups.append(get_pp_group())
        if context.expert_parallel_size > 1:
            groups.append(get_ep_group())
        found = self.shapes()
        for group in groups:
            for text in all_gather_text(json.dumps(found), group.cpu_group):
                for name, shape in json.loads(text).items():
                    found[name] = None if shape is None else torch.Size(shape)
        return found

    def unique(self) -> list[Entry]:
        """The entries, each once."""
        return list({id(entry): entry for entry in self.entries.values()}.values())


def is_vllm_layer(part: nn.Module) -> bool:
    return any(
        library_of(cls) == "vllm" and issubclass(cls, nn.Module)
        for cls in type(part).__mro__
    )


def _is_made_by_vllm(owner: nn.Module, leaf: str) -> bool:
    """Whether vLLM's layer made `tensor` for itself: a buffer, or a KV-cache scale."""
    if not is_vllm_layer(owner):
        return False
    if isinstance(getattr(owner, "quant_method", None), BaseKVCacheMethod):
        return True
    return leaf in owner._buffers


def _identity(tensor: torch.Tensor) -> object:
    """The same for tensors that are one: tied, or with one storage."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if local.is_meta or local.numel() == 0:
        return id(tensor)
    return local.data_ptr(), local.dtype, local.shape, local.stride(), tensor.shape


def without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


# ---- Names in the whole model --------------------------------------------------------


def full_names(
    module: nn.Module,
) -> Callable[[str, torch.Tensor | None], str]:
    """What turns the name of a tensor in `module` into that in the whole model.

    Only megatron-core's modules have others. It numbers from 0 the layers of a
    pipeline stage, though each knows its place, and the experts of a rank; and the
    last stage's output layer may be a copy of the first stage's embedding. Renamed as
    in megatron-core's own `sharded_state_dict`.
    """
    megatron: Any = sys.modules.get("megatron.core.transformer.module")
    places: dict[str, int] = {}  # by path, of a module in its list
    for path, part in module.named_modules() if megatron is not None else ():
        if not isinstance(part, megatron.MegatronModule):
            continue
        number = getattr(part, "layer_number", None)  # counts from 1
        if path.rpartition(".")[2].isdecimal() and isinstance(number, int):
            places[path] = number - 1
        experts = getattr(part, "local_experts", ())
        for index in range(len(experts)):
            place = part.ep_group.rank() * len(experts) + index
            places[f"{path}.local_experts.{index}"] = place

    def full_name(name: str, tensor: torch.Tensor | None) -> str:
        if getattr(tensor, "shared", False):  # Megatron's mark of such a copy
            stem = name.removesuffix("output_layer.weight")
            return f"{stem}embedding.word_embeddings.weight"
        if not places:
            return name
        paths = itertools.accumulate(name.split("."), "{}.{}".format)
        return ".".join(str(places.get(p, p.rpartition(".")[2])) for p in paths)

    return full_name
