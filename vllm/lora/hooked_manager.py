# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A worker's adapters of a model whose layers stay as they are.

It answers the model runner as vLLM's `WorkerLoRAManager` does, which replaces layers of
vLLM's own classes by others. This one adds forward hooks to layers of any class.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm.config import VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.distributed import get_pp_group
from vllm.distributed.text_collectives import all_gather_text
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.model_executor.parallel_context import ParallelContext

from .adapter import Adapter
from .adapter_config import ends_with
from .mixtures import mixtures_of
from .site_hooks import BatchRows, SiteHook, Slots
from .sites import unknown_module

if TYPE_CHECKING:
    from vllm.model_executor.models.callable_model.wrapper import CallableModelWrapper


class HookedLoRAManager:
    """The adapters of one worker: `max_cpu_loras` in memory, `max_loras` in slots.

    Args:
        vllm_config: of the engine.
        device: of the model.
        embedding_modules: not used, as layers need not be declared.

    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        embedding_modules: dict[str, str],
    ) -> None:
        assert vllm_config.lora_config is not None
        self.config: LoRAConfig = vllm_config.lora_config
        self.device = device
        self._context = ParallelContext.from_config(vllm_config.parallel_config)
        self._adapters: OrderedDict[int, Adapter] = OrderedDict()  # oldest use first
        self._dummies: set[int] = set()
        self._pinned: set[int] = set()
        self._requests: dict[int, LoRARequest] = {}
        self._slots: list[int | None] = [None] * self.config.max_loras
        self._rows = BatchRows()
        most_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        # Room for what CUDA graphs pad a batch with.
        self._token_slots = self._no_adapter(2 * most_tokens)
        self._sample_slots = self._no_adapter(2 * most_tokens)
        self._samples = 0

    def _no_adapter(self, rows: int) -> torch.Tensor:
        return torch.full((rows,), -1, dtype=torch.int32, device=self.device)

    def create_lora_manager(
        self, model: CallableModelWrapper, vllm_config: VllmConfig
    ) -> CallableModelWrapper:
        """Hook the layers that adapters may change; returns the same model.

        Raises:
            ValueError: there are none.

        """
        sites = model.adapter_sites or {}
        ends = self.config.target_modules
        if ends is not None:
            sites = {
                name: site
                for name, site in sites.items()
                if any(ends_with(name, end) for end in ends)
            }
        if self.device.type != "cpu":  # its CUDA graphs do not know the rows
            sites = {name: s for name, s in sites.items() if s.mixture is None}
        self._sites = sites
        self._all_names = dict.fromkeys(sites)  # in the model's order
        if self._context.pipeline_parallel_size > 1:
            texts = all_gather_text("\n".join(sites), get_pp_group().cpu_group)
            names = (name for text in texts for name in text.split("\n"))
            self._all_names = dict.fromkeys(filter(None, names))
        if not self._all_names:
            raise ValueError(
                f"enable_lora is set, but {type(model.module).__name__} has no linear "
                f"layer or embedding{f' named {ends}' if ends else ''} to change."
            )
        self._hooks = {name: SiteHook(site, self._rows) for name, site in sites.items()}
        for hook in self._hooks.values():
            hook.slots = self._empty_slots(hook)
            hook.attach()
        self._mixtures = mixtures_of(model.module, self._hooks, self._rows)
        for mixture in self._mixtures.values():
            mixture.attach()
        self._rows.slots = self._token_slots
        self._read_adapter = getattr(model.module, "read_adapter", _as_it_is)
        model.lora_manager = self
        return model

    def _empty_slots(self, hook: SiteHook) -> Slots:
        number, dtype, site = self.config.max_loras, self.config.lora_dtype, hook.site
        # Room for all of a stack's experts comes with an adapter that changes them.
        most = 0 if site.experts else self.config.max_lora_rank
        room = {"dtype": dtype, "device": self.device}
        a = torch.zeros(number, most, site.local_inputs, **room)  # type: ignore
        b = torch.zeros(number, most, site.local_outputs, **room)  # type: ignore
        return Slots(
            a,
            b,
            torch.zeros(number, dtype=torch.int32, device=self.device),
            torch.zeros(number, dtype=torch.float32, device=self.device),
        )

    # ---- Which adapters there are ----------------------------------------------------

    def add_adapter(self, request: LoRARequest) -> bool:
        """Load an adapter if it is not there, or in the place of one.

        Raises:
            LoRAAdapterNotFoundError: its files are not there.
            ValueError: it has something that is not taken, or does not fit the model.

        """
        number = request.lora_int_id
        replaces = request.load_inplace and self._requests.get(number) is not request
        if number not in self._adapters or replaces:
            adapter = self._load(request)
            slot = self._slots.index(number) if number in self._slots else None
            self._keep(number, adapter)
            if slot is not None:
                self._fill(slot, adapter)
        self._requests[number] = request
        self._adapters.move_to_end(number)
        self._activate(number, needed={number})
        return True

    def _load(self, request: LoRARequest) -> Adapter:
        path = get_adapter_absolute_path(request.lora_path)
        try:
            adapter = self._read_adapter(Adapter.load(path)).named_as(self._all_names)
        except FileNotFoundError as error:
            raise LoRAAdapterNotFoundError(request.lora_name, path) from error
        try:
            for name in adapter.factors:
                if name not in self._all_names:
                    raise unknown_module(name, self._all_names)
                rank = adapter.config.rank_of(name)
                if rank > self.config.max_lora_rank:
                    raise ValueError(
                        f"The adapter has rank {rank} for {name}; expected at most "
                        f"max_lora_rank {self.config.max_lora_rank}."
                    )
            if not all(bool(f.isfinite().all()) for f in adapter.parameters()):
                # they would reach the rows of other adapters through the slots' stack
                raise ValueError(
                    "The adapter has values that are not finite; expected none. Its "
                    "training has diverged."
                )
            adapter = adapter.restricted_to(self._sites)
            adapter.check_fits(self._sites)
        except ValueError as error:
            error.add_note(f"in the adapter {request.lora_name!r} of {path}")
            raise
        return adapter

    def _keep(self, number: int, adapter: Adapter) -> None:
        self._adapters[number] = adapter
        limit = self.config.max_cpu_loras or self.config.max_loras
        while len(self._adapters) > limit:
            oldest = next(
                (n for n in self._adapters if n != number and n not in self._pinned),
                None,
            )
            if oldest is None:
                del self._adapters[number]
                raise RuntimeError(
                    f"All {limit} adapters in memory are pinned; raise max_cpu_loras "
                    "or remove one."
                )
            self.remove_adapter(oldest)

    def remove_adapter(self, adapter_id: int) -> bool:
        if adapter_id in self._slots:
            self._slots[self._slots.index(adapter_id)] = None
        self._pinned.discard(adapter_id)
        self._dummies.discard(adapter_id)
        self._requests.pop(adapter_id, None)
        return self._adapters.pop(adapter_id, None) is not None

    def remove_all_adapters(self) -> None:
        """Remove those of a warm-up.

        vLLM calls this also when new weights are loaded. Adapters stay then: nothing of
        them was computed from the weights.
        """
        for number in list(self._dummies):
            self.remove_adapter(number)

    def pin_adapter(self, adapter_id: int) -> bool:
        """Keep an adapter in its slot.

        Raises:
            ValueError: there is no such adapter.

        """
        if adapter_id not in self._adapters:
            raise ValueError(f"Pinning failed. LoRA {adapter_id} is not registered.")
        self._activate(adapter_id, needed={adapter_id})
        self._pinned.add(adapter_id)
        return True

    def list_adapters(self) -> set[int]:
        return set(self._adapters)

    # ---- Slots -----------------------------------------------------------------------

    def _activate(self, number: int, needed: set[int]) -> None:
        """Give an adapter a slot: a free one, or of the one used longest ago."""
        if number in self._slots:
            return
        if None in self._slots:
            slot = self._slots.index(None)
        else:
            kept = needed | self._pinned
            victims = (n for n in self._adapters if n in self._slots and n not in kept)
            victim = next(victims, None)
            if victim is None:
                raise RuntimeError(
                    f"All {len(self._slots)} slots are taken by adapters that are "
                    "pinned or in this batch; raise max_loras."
                )
            slot = self._slots.index(victim)
        self._slots[slot] = number
        self._fill(slot, self._adapters[number])

    @torch.no_grad()
    def _fill(self, slot: int, adapter: Adapter) -> None:
        for name, hook in self._hooks.items():
            slots, pair = hook.slots, adapter.factors.get(name)
            rows = 0 if pair is None else pair[0].shape[0]
            slots.ranks[slot] = rows
            if hook.site.experts:
                slots.a, slots.b = list(slots.a), list(slots.b)
                slots.a[slot] = slots.a[slot].new_zeros(rows, hook.site.local_inputs)
                slots.b[slot] = slots.b[slot].new_zeros(rows, hook.site.local_outputs)
            slots.a[slot].zero_()
            slots.b[slot].zero_()
            if pair is None:
                continue
            slots.a[slot][:rows] = hook.site.local_a(pair[0])
            slots.b[slot][:rows] = hook.site.local_b(pair[1])
            slots.scales[slot] = adapter.config.scale_of(name)
        in_slots = [self._adapters[n] for n in self._slots if n is not None]
        for mixture in self._mixtures.values():
            mixture.look_at(in_slots)

    # ---- Each step -------------------------------------------------------------------

    def set_active_adapters(
        self, requests: set[LoRARequest], mapping: LoRAMapping | None
    ) -> None:
        """Give the batch's adapters their slots, and its rows their adapters."""
        needed = {request.lora_int_id for request in requests if request}
        if len(needed) > len(self._slots):
            raise RuntimeError(
                f"A batch has {len(needed)} adapters; expected at most max_loras "
                f"{len(self._slots)}."
            )
        for number in needed & self._adapters.keys():
            self._adapters.move_to_end(number)  # none of them makes room for another
        for request in requests:
            self.add_adapter(request)
        for number in needed:
            self._activate(number, needed)
        if mapping is None:
            return
        slot_of = {n: slot for slot, n in enumerate(self._slots) if n is not None}
        tokens = self._write(self._token_slots, mapping.index_mapping, slot_of)
        self._samples = self._write(self._sample_slots, mapping.prompt_mapping, slot_of)
        self._rows.tokens = tokens
        self._rows.any_adapter.fill_(bool(needed))

    def _write(
        self, rows: torch.Tensor, numbers: tuple[int, ...], slot_of: dict[int, int]
    ) -> int:
        """The slots of adapters `numbers`, of which 0 is none, into `rows`."""
        ids = np.asarray(numbers, dtype=np.int64)
        slots = np.full(ids.shape, -1, dtype=np.int32)
        for number, slot in slot_of.items():
            slots[ids == number] = slot
        rows.fill_(-1)
        rows[: len(slots)].copy_(torch.from_numpy(slots))
        return len(slots)

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Calls of the model that are of no batch: no row has an adapter.

        They may have any number of rows. Afterwards the batch has its adapters again.
        """
        rows = self._rows
        rest = rows.tokens, bool(rows.any_adapter), self._token_slots.clone()
        rows.tokens = 0
        rows.any_adapter.fill_(False)
        self._token_slots.fill_(-1)  # compiled code looks only at these
        try:
            yield
        finally:
            rows.tokens = rest[0]
            rows.any_adapter.fill_(rest[1])
            self._token_slots.copy_(rest[2])

    @contextmanager
    def rows_of_logits(self, hidden_states: torch.Tensor) -> Iterator[None]:
        """The adapters of rows `[tokens, hidden]` that go to the output head.

        They are those that a batch samples from, in a tensor of their own, or, for
        log-probabilities of a prompt, a slice of what the step's forward returned.
        """
        size = hidden_states.numel() * hidden_states.element_size()
        rows = self._sample_slots
        if hidden_states.untyped_storage().nbytes() > size:
            start = hidden_states.storage_offset() // max(hidden_states.stride(0), 1)
            rows = self._token_slots[start:]
        elif hidden_states.shape[0] > self._samples:
            rows = self._token_slots
        rest = self._rows.slots, self._rows.tokens
        self._rows.slots, self._rows.tokens = rows, hidden_states.shape[0]
        try:
            yield
        finally:
            self._rows.slots, self._rows.tokens = rest

    # ---- Warm-up ---------------------------------------------------------------------

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        yield

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank

    def add_dummy_lora(self, request: LoRARequest, rank: int) -> bool:
        """An adapter that changes nothing, for a warm-up."""
        if request.lora_int_id in self._adapters:
            return False
        layers = {name: site for name, site in self._sites.items() if not site.experts}
        self._keep(request.lora_int_id, Adapter.zeros(layers, rank))
        self._dummies.add(request.lora_int_id)
        return True

    def supports_tower_connector_lora(self) -> bool:
        return False


def _as_it_is(adapter: Adapter) -> Adapter:
    return adapter
