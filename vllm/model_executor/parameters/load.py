# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Loads whole tensors by name into a module's shards: first all, later any part."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vllm.logger import init_logger
from vllm.model_executor.model_loader.reload.layerwise import (
    initialize_layerwise_reload,
)
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.experts import is_plain, pack_experts
from vllm.model_executor.parameters.hooked import EXTRA_STATE, is_empty, load_hooked
from vllm.model_executor.parameters.layout import layout_of
from vllm.model_executor.parameters.names import (
    Entry,
    ModuleNames,
    Place,
    without_wrappers,
)
from vllm.model_executor.parameters.published import PublishedNames, Weights
from vllm.model_executor.parameters.reload import (
    brings_all_weights,
    finish_repacking,
    is_loaded_in_place,
    is_packed,
    leave_layerwise_reload,
    pack_kept,
    packed_layers,
    refuse_patches,
    repack,
)
from vllm.model_executor.parameters.update import UpdateState, listed

logger = init_logger(__name__)

_WEIGHTS: WeakKeyDictionary[nn.Module, ModuleWeights] = WeakKeyDictionary()


def weights_of(module: nn.Module, context: ParallelContext) -> ModuleWeights:
    """The weights of `module`, with what is known of earlier loads.

    The first call is made before weights are loaded, and by all pipeline stages and
    expert-parallel ranks together.
    """
    if module not in _WEIGHTS:
        _WEIGHTS[module] = ModuleWeights(module, context)
    return _WEIGHTS[module]


def find_weights(module: nn.Module) -> ModuleWeights | None:
    """The weights of `module`, if a registered callable built it."""
    return _WEIGHTS.get(module)


class ModuleWeights:
    """What fills a module's tensors; `update` says whether they are of one checkpoint.

    The first load is complete, or an error. Later ones take any part, in any order, in
    place. What a later load refuses before anything was written changes nothing.
    """

    def __init__(self, module: nn.Module, context: ParallelContext) -> None:
        self._module = weakref.ref(module)
        self._context = context
        self.names = ModuleNames(module, context)
        own = self.names.shapes()
        known = self.names.shapes_on_all_ranks(context)
        self._elsewhere = {n: shape for n, shape in known.items() if n not in own}
        self._published = PublishedNames(module, own, known)
        self._loaded = False
        self.update = UpdateState(
            [
                *(
                    frozenset(entry.local_names)
                    for entry in self.names.unique()
                    if not entry.optional
                ),
                *(frozenset(hooked.local_names) for hooked in self.names.hooked),
            ]
        )

    def finish_first_load(self) -> None:
        """Allow partial loads from now on, also if the first one was not done here."""
        self._loaded = True

    def require_whole(self) -> None:
        """Raise RuntimeError if a failed update left weights of two checkpoints."""
        if (problem := self.update.problem()) is not None:
            raise RuntimeError(problem)

    @torch.no_grad()
    def load(self, weights: Weights, source: str, complete: bool = False) -> set[str]:
        """Fill tensors by name, all of them if it is the first load or `complete`.

        A collection is checked before anything is written. Of another iterable each
        tensor is checked before it is written, and those before it have been.

        Returns:
            The names of what was filled, as `state_dict()` and as
            `named_parameters()` have them.

        Raises:
            ValueError: a tensor is missing, surplus, mis-shaped, or given twice with
                different values; the message names every one of a collection.

        """
        complete |= not self._loaded
        leave_layerwise_reload(self._get_module())
        self.update.begin_load()
        load = _Load(self, complete, source)
        try:
            collected = isinstance(weights, Collection)
            merges = self.update.merges
            weights = self._published.own(weights, merges, complete, source)
            weights = self.names.unstacked(weights, source)
            if collected:
                weights = list(weights)
                checks = _Load(self, complete, source)
                for name, whole in weights:
                    checks.check(name, whole, keep=True)
                checks.finish_checks()
                load.take_hooked(checks)
            for name, whole in weights:
                load.take(name, whole)
            load.finish()
        except BaseException as error:
            if self._loaded:
                self.update.fail_load(error, load.written)
            raise
        self._loaded = True
        for merge in merges.values():
            merge.keep()
        self.update.finish_load(load.filled)
        return self.names.with_stacked(load.filled)

    def load_model(self, model: nn.Module, weights: Weights, source: str) -> Any:
        """Load into what vLLM serves, by name or by the module's own `load_weights`.

        While vLLM reloads, an iterable that is no collection has to bring everything,
        unless vLLM says that it is a part, as its weight transfer does.

        Args:
            model: this module, or what stands for it in vLLM.
            weights: pairs of name and whole tensor.
            source: where they come from, for messages.

        """
        own = getattr(self._get_module(), "load_weights", None)
        reloads = leave_layerwise_reload(model, keep_packed=own is not None)
        whole = reloads and brings_all_weights(weights)
        if own is None:
            return self.load(weights, source, complete=whole)
        self.update.begin_load()
        packed = list(packed_layers(model)) if self._loaded else []
        if packed:
            refuse_patches(packed[0], ["a model with a load_weights of its own"])
        packed = [] if reloads else packed
        try:
            for layer in packed:
                initialize_layerwise_reload(layer)
            loaded = own(weights)
            for layer in packed:
                finish_repacking(layer, self.names.numel_of(layer))
            for layer in packed:
                pack_kept(layer)
        except BaseException as error:
            leave_layerwise_reload(model)
            if self._loaded:
                self.update.fail_load(error, written=None)
            raise
        if loaded is not None or whole:
            names = self.names.local_names() if whole else set(loaded)
            self.update.finish_load(self.names.without_stacked(names))
        return loaded

    def _get_module(self) -> nn.Module:
        module = self._module()
        assert module is not None, "the module of these weights is gone"
        return module


class _Load:
    """One load: what came, what does not fit, and what was written."""

    def __init__(self, weights: ModuleWeights, complete: bool, source: str) -> None:
        self._names = weights.names
        self._elsewhere = weights._elsewhere
        self._first = not weights._loaded
        self._complete = complete
        self._source = source
        self._context = weights._context
        self._kind = type(weights._get_module()).__name__
        self._update = weights.update
        # By id of its entry: the name that was used, and the tensor if it is kept.
        self._given: dict[int, tuple[str, torch.Tensor | None]] = {}
        self._hooked: dict[str, dict[str, Any]] = {}  # by path
        self._hooked_done: set[str] = set()
        self._states: dict[str, Any] = {}
        # Of packed layers with several tensors, until all have come.
        self._waiting: dict[nn.Module, dict[Place, torch.Tensor]] = {}
        self._packed: set[nn.Module] = set()
        self._surplus: list[str] = []
        self._misshaped: list[str] = []
        self._conflicts: list[str] = []
        self.filled: set[str] = set()
        self.written: set[str] = set()  # perhaps not all of a tensor

    # ---- Checks

    def check(self, name: str, whole: Any, keep: bool = False) -> Entry | None:
        """Note what `name` is; the entry that is to be written, if it is one.

        With `keep`, `whole` stays to be compared with others of the same entry.
        Otherwise what was written is.
        """
        names = self._names
        hooked = None if name in self._elsewhere else names.find_hooked(name)
        if hooked is not None:
            if hooked.path not in self._hooked_done:
                self._hooked.setdefault(hooked.path, {})[name] = whole
            return None
        if name.endswith(EXTRA_STATE):
            if name in names.extra_states:
                self._states[name] = whole
            elif not (
                names.skips_extra_states or name in self._elsewhere or is_empty(whole)
            ):
                self._surplus.append(name)
            return None
        if not isinstance(whole, torch.Tensor):
            self._surplus.append(f"{name} (a {type(whole).__name__}, not a tensor)")
            return None
        entry = names.find(name)
        if entry is None:
            self._check_elsewhere(name, whole)
            return None
        if name not in names.entries:
            logger.info_once(
                "%s has names with parts that a wrapper of the module put in, such as "
                "_orig_mod. They are read without.",
                self._source,
            )
        if entry.refusal is not None:
            raise ValueError(entry.refusal)
        if whole.shape != entry.layout.shape:
            self._misshaped.append(_misshaped(name, whole, entry.layout.shape))
            self._given.setdefault(id(entry), (name, None))
            return None
        if id(entry) in self._given:
            self._compare(entry, name, whole)
            return None
        self._given[id(entry)] = (name, whole if keep else None)
        for place in entry.places:
            if is_packed(place.owner) and not is_loaded_in_place(*place.at):
                self._packed.add(place.owner)
        return entry

    def _check_elsewhere(self, name: str, whole: torch.Tensor) -> None:
        """Check a tensor that only other ranks take, so that all raise one error."""
        plain = without_wrappers(name)
        known = next((n for n in (name, plain) if n in self._elsewhere), None)
        if known is None:
            self._surplus.append(name)
        elif (shape := self._elsewhere[known]) is not None and shape != whole.shape:
            self._misshaped.append(_misshaped(name, whole, shape))

    def _compare(self, entry: Entry, name: str, whole: torch.Tensor) -> None:
        """Note a conflict if two names of one tensor bring different values."""
        first, kept = self._given[id(entry)]
        if kept is not None:
            same = _same(kept, whole)
        else:
            layout = entry.layout
            same = all(
                layout.holds(local, whole)
                for place in entry.places
                if (local := place.local_tensor) is not None
                and local.shape == layout.local_shape
                and not local.is_meta
                and (place.part is None or self._first)  # packed since
            )
        if not same:
            self._conflicts.append(f"{first} and {name}")

    def finish_checks(self) -> None:
        """Raise ValueError that names all that does not fit."""
        names = self._names
        missing = []
        if self._complete:
            missing = [
                name
                for entry in names.unique()
                if id(entry) not in self._given and not entry.optional
                for name in entry.state_names
            ]
            missing += names.extra_states.keys() - self._states.keys()
            for hooked in names.hooked:
                if hooked.path not in self._hooked.keys() | self._hooked_done:
                    missing += hooked.state_names()
        problems = {
            "missing": sorted(missing),
            "surplus": self._surplus,
            "mis-shaped": self._misshaped,
            "different tensors for one parameter": self._conflicts,
        }
        found = "; ".join(
            f"{len(names)} {problem}: {listed(names)}"
            for problem, names in problems.items()
            if names
        )
        if found:
            raise ValueError(
                f"{self._source} does not fit {self._kind}: {found}. Save the full, "
                "unsharded state dict of the same module, or give the module a "
                "load_weights(weights) method that maps the names."
            )
        for hooked in names.hooked:
            if hooked.path in self._hooked and hooked.refusal is not None:
                raise ValueError(hooked.refusal)
        self._require_whole_layers()

    def _require_whole_layers(self) -> None:
        """Raise ValueError if only a part came of what a layer packed together."""
        for owner in [] if self._first else self._packed:
            names = self._names.packed_together(owner)
            refuse_patches(owner, [entry.name for entry in names.values()])
            if is_plain(owner):
                continue  # its experts may come in several calls
            came = [e.name for e in names.values() if id(e) in self._given]
            missing = [e.name for e in names.values() if id(e) not in self._given]
            if missing:
                raise ValueError(
                    f"{listed(came)} came without {listed(missing)}, but vLLM has "
                    f"packed them into one {type(owner).__name__}. Load them in one "
                    "call."
                )

    # ---- Writing

    def take(self, name: str, whole: Any) -> None:
        """Check and write."""
        entry = self.check(name, whole)
        if not self._first and (self._surplus or self._misshaped or self._conflicts):
            self._complete = False  # what is missing is not known yet
            self.finish_checks()
        if entry is not None:
            self._write(entry, whole)

    def take_hooked(self, checks: _Load) -> None:
        """Write first what only its own `load_state_dict` can check."""
        self._hooked = checks._hooked
        self._write_hooked()

    def finish(self) -> None:
        """Write what had to wait until all had come."""
        self.finish_checks()
        self._write_hooked()
        for name, value in self._states.items():
            part = self._names.extra_states[name]()
            assert part is not None
            self.written.add(name)
            part.set_extra_state(value)

    def _write_hooked(self) -> None:
        for hooked in self._names.hooked:
            state = self._hooked.pop(hooked.path, None)
            if state is not None:
                load_hooked(hooked, state, self._kind, self._source)
                self.written |= hooked.local_names
                self._hooked_done.add(hooked.path)
                self.filled |= hooked.local_names

    def _write(self, entry: Entry, whole: torch.Tensor) -> None:
        written: set[int] = set()
        for place in entry.places:
            owner, leaf = place.at
            packed = not self._first and is_packed(owner)
            if packed and not is_loaded_in_place(owner, leaf):
                if place.part is not None:
                    self._write_expert(place, entry, whole)
                    return
                self._write_packed(place, whole)
                continue
            tensor, local = place.tensor, place.local_tensor
            if tensor is None or local is None:
                raise ValueError(
                    f"{entry.name} cannot be loaded again: vLLM's "
                    f"{type(owner).__name__} keeps it in another form. Leave it out."
                )
            if id(tensor) in written:
                continue
            written.add(id(tensor))
            if place.part is None and local.shape != entry.layout.local_shape:
                # Divided since.
                entry.layout = layout_of(tensor, owner, self._context)
            self.written |= entry.local_names
            plain = place.part is None and not isinstance(tensor, DTensor)
            if hasattr(tensor, "weight_loader") and plain:
                tensor.weight_loader(tensor, whole)
            else:
                entry.layout.load(local, whole)
        self.filled |= entry.local_names

    def _write_packed(self, place: Place, whole: torch.Tensor) -> None:
        owner = place.owner
        entries = self._names.packed_together(owner)
        waiting = self._waiting.setdefault(owner, {})
        # A copy, because the next tensor may come in the same buffer.
        waiting[place] = whole.clone() if len(entries) > 1 else whole
        if waiting.keys() == entries.keys():
            self.written |= {name for e in entries.values() for name in e.local_names}
            tensors = self._waiting.pop(owner)
            repack(owner, {at.leaf: tensor for at, tensor in tensors.items()})

    def _write_expert(self, place: Place, entry: Entry, whole: torch.Tensor) -> None:
        """Keep an expert's tensor until all of its layer have come, in any call."""
        owner, layout = place.owner, entry.layout
        waiting = self._update.waiting(
            owner, lambda: self._names.packed_together(owner)
        )
        waiting.came[place] = whole.new_empty(layout.local_shape)
        layout.load(waiting.came[place], whole)
        if waiting.is_complete():
            self._update.end_waiting(owner)
            names = {n for e in waiting.entries.values() for n in e.local_names}
            self.written |= names
            pack_experts(owner, waiting.came)
            self.filled |= names


def _misshaped(name: str, whole: torch.Tensor, expected: torch.Size) -> str:
    return f"{name} {list(whole.shape)}, expected {list(expected)}"


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether both have the same bits."""
    if first.dtype != second.dtype:
        return False
    first, second = first.reshape(-1), second.to(first.device).reshape(-1)
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))
