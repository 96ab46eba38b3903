# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A frozen module that is called with other adapters each time, outside an engine.

    adapted = AdaptedModule(module)
    logits = adapted.logits([(adapter, tokens), (None, others)])

The adapters' outputs are added by the hooks and the operator that an engine has too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from vllm.distributed.communication_op import tensor_model_parallel_copy
from vllm.model_executor.models.callable_model.logits import logits_function
from vllm.model_executor.parallel_context import ParallelContext
from vllm.v1.attention.training.sequences import packed_sequences

from .adapter import Adapter
from .mixtures import Mixture, mixtures_of
from .ops.grouped_product import NO_ADAPTER
from .site_hooks import BatchRows, SiteHook, Slots
from .sites import Site, find_sites


class AdaptedModule:
    """Calls one module with adapters; one thread at a time.

    Args:
        module: a module that a factory has built, with its weights. Nothing about it
            changes but that its parameters are frozen.
        context: this process's place among tensor-parallel ranks.
        vocab_size: the number of logits; by default, of the outputs of its head.

    """

    def __init__(
        self,
        module: nn.Module,
        context: ParallelContext | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.module = module.requires_grad_(False)
        self.context = context or ParallelContext()
        self.sites: dict[str, Site] = find_sites(module, self.context)
        self.device = next(module.parameters()).device
        self._vocab_size = vocab_size
        self._rows = BatchRows()
        self._hooks = {name: SiteHook(s, self._rows) for name, s in self.sites.items()}
        self._mixtures = mixtures_of(module, self._hooks, self._rows)

    @functools.cached_property
    def vocab_size(self) -> int:
        """Raises: ValueError: it was not given, and the module has no head."""
        if self._vocab_size is not None:
            return self._vocab_size
        heads = [site.outputs for site in self.sites.values() if site.is_head]
        if not heads:
            raise ValueError(
                f"{type(self.module).__name__} has no output head by which the number "
                "of logits is known; pass vocab_size."
            )
        return heads[0]

    @functools.cached_property
    def _logits(self) -> Callable[[torch.Tensor], torch.Tensor | None]:
        return logits_function(
            type(self.module).__name__,
            self.module,
            self.vocab_size,
            self.context.tensor_parallel_size,
        )

    def logits(
        self, sequences: Sequence[tuple[Adapter | None, torch.Tensor]]
    ) -> list[torch.Tensor]:
        """One packed forward, as `module(input_ids, positions)`.

        Args:
            sequences: an adapter, or None for the base, and int64 tokens `[tokens]`;
                those of one adapter lie together.

        Returns:
            `[tokens, vocab]` of each sequence.

        """
        lengths = [len(tokens) for _, tokens in sequences]
        adapters: list[Adapter] = []
        slots = []
        for adapter, _ in sequences:
            if adapter is not None and (not adapters or adapters[-1] is not adapter):
                adapters.append(adapter)
            slots.append(NO_ADAPTER if adapter is None else len(adapters) - 1)
        rows = torch.tensor(slots).repeat_interleave(torch.tensor(lengths))
        tokens = torch.cat([tokens for _, tokens in sequences]).to(self.device)
        positions = torch.cat([torch.arange(n) for n in lengths]).to(self.device)
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(self.device, torch.int32)
        with self.active(adapters, rows), packed_sequences(bounds):
            logits = self._logits(self.module(tokens, positions))
        assert logits is not None
        return list(logits.split(lengths))

    @contextmanager
    def active(
        self,
        adapters: Sequence[Adapter],
        rows: torch.Tensor,
        tokens: int | None = None,
    ) -> Iterator[None]:
        """Within the context, calls of the module's layers use `adapters`.

        Args:
            adapters: of the batch.
            rows: int64 `[tokens]` on the CPU, the place in `adapters` of each row's
                adapter; -1 is a row without one.
            tokens: a layer that is called with fewer rows is an error. By default all
                of `rows`.

        """
        self._rows.host, self._rows.slots = rows, rows.to(self.device)
        self._rows.tokens = len(rows) if tokens is None else tokens
        hooks = self._fill_slots(adapters)
        blocks = {hook.site.mixture for hook in hooks} - {None}
        mixtures = [self._mixtures[name] for name in blocks if name is not None]
        changes: list[SiteHook | Mixture] = [*hooks, *mixtures]
        for change in changes:
            change.attach()
        try:
            yield
        finally:
            for change in changes:
                change.detach()

    def _fill_slots(self, adapters: Sequence[Adapter]) -> list[SiteHook]:
        """The hooks of the sites that one of the adapters changes."""
        used = []
        for name, hook in self._hooks.items():
            if not any(name in adapter.factors for adapter in adapters):
                continue
            site = hook.site
            all_a: list[torch.Tensor] = []
            all_b: list[torch.Tensor] = []
            for adapter in adapters:
                pair = adapter.factors.get(name)
                if pair is None:
                    empty = torch.empty(0, site.local_inputs, device=self.device)
                    all_a.append(empty)
                    all_b.append(empty.new_empty(0, site.local_outputs))
                else:
                    all_a.append(self._local(pair[0], site, site.local_a))
                    all_b.append(self._local(pair[1], site, site.local_b))
            ranks = [a.shape[0] for a in all_a]
            scales = [adapter.config.scale_of(name) for adapter in adapters]
            hook.slots = Slots(
                all_a,
                all_b,
                torch.tensor(ranks, dtype=torch.int32),
                torch.tensor(scales, device=self.device),
            )
            used.append(hook)
        return used

    def _local(
        self,
        factor: torch.Tensor,
        site: Site,
        local: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """This rank's columns, whose gradients all ranks put together.

        Of a divided stack of experts, each rank has a part of the product, so that also
        the factor that it has whole gets a part of its gradient.
        """
        whole = factor.to(self.device)
        part = local(whole)
        if part.shape == whole.shape and not (site.experts and site.is_divided):
            return part
        return local(tensor_model_parallel_copy(whole))
