# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Training of all runs at once, by the module that vLLM serves."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm.lora.adapter import Adapter
from vllm.lora.adapter_config import AdapterConfig
from vllm.lora.adapter_trainer import (
    OPTIMIZER,
    AdamWParams,
    AdapterTrainer,
    TrainingSequence,
)
from vllm.lora.sites import experts_without_adapters
from vllm_generic.tink.backends import hf_model
from vllm_generic.tink.backends.base import Batch, BatchOutput, Datum, LoraSpec
from vllm_generic.tink.errors import UserError
from vllm_generic.tink.losses import find_loss, loss_inputs

logger = logging.getLogger(__name__)

TOKENS_IN_A_PASS = 8192


@dataclass(frozen=True)
class _Item:
    """One datum of a run's batch."""

    run: str
    batch: Batch
    datum: Datum

    def sequence(self) -> TrainingSequence:
        targets = self.datum.loss_inputs["target_tokens"].astype(np.int64)
        tokens = torch.tensor(self.datum.tokens, dtype=torch.int64)
        return TrainingSequence(self.run, tokens, torch.from_numpy(targets))

    def loss(self, log_probs: torch.Tensor) -> torch.Tensor:
        inputs = {
            name: value.to(log_probs.device)
            for name, value in loss_inputs(self.datum).items()
        }
        return find_loss(self.batch.loss_fn)(log_probs, inputs, self.batch.loss_config)


class ModuleTrainer:
    """Adapters of one frozen module.

    Args:
        module: a PackedModel, or another module with its interface; a WholeModel takes
            one sequence only.
        packed: one pass has the sequences of many runs, sorted by run. Otherwise each
            sequence has a pass of its own, so that a run has the same bits however
            its data come in batches, on any device.

    """

    def __init__(self, module: Any, packed: bool) -> None:
        self.max_length = hf_model.max_length(module)
        self.vocab_size = int(module.config.vocab_size)
        self.architecture = str(module.config.architectures[0])
        self.max_runs_in_a_pass = 256 if packed else 1
        self._packed = packed
        self._trainer = AdapterTrainer(module, vocab_size=self.vocab_size, packed=True)
        sites = self._trainer.sites
        on_cpu = next(module.parameters()).device.type == "cpu"
        self._kinds = hf_model.kinds_of_layers(
            sites,
            module.get_output_embeddings(),
            stacks=on_cpu,  # an engine on a GPU adapts no experts
        )
        adapted = {n for n, s in sites.items() if on_cpu or not s.experts}
        experts = experts_without_adapters(module, adapted)
        if experts:
            logger.warning(
                "adapters leave out the experts of this model (%s and %d more): an "
                "engine on a GPU adapts none, and vLLM's and Megatron's take none",
                experts[0],
                len(experts) - 1,
            )

    def create(self, run: str, spec: LoraSpec) -> None:
        targets = hf_model.target_modules(self._kinds, spec)
        stacks = tuple(n for n in targets if self._trainer.sites[n].experts)
        layers = tuple(n for n in targets if n not in stacks)
        config = AdapterConfig(spec.rank, spec.alpha, layers, stacks)
        self._trainer.add(run, config, seed=spec.seed)

    def remove(self, run: str) -> None:
        self._trainer.remove(run)

    def forward_backward(self, jobs: Mapping[str, Batch]) -> dict[str, BatchOutput]:
        log_probs: dict[str, list[np.ndarray]] = {run: [] for run in jobs}
        losses = dict.fromkeys(jobs, 0.0)
        for items in self._passes(jobs):
            for item, (values, loss) in zip(items, self._run(items), strict=True):
                log_probs[item.run].append(values.cpu().numpy())
                losses[item.run] += loss
        return {
            run: BatchOutput(log_probs[run], {"loss:sum": losses[run]}) for run in jobs
        }

    def _run(self, items: list[_Item]) -> list[tuple[torch.Tensor, float]]:
        """One pass; log-probabilities and loss of each item."""
        sequences = [item.sequence() for item in items]
        losses: list[torch.Tensor] = []

        def total(indices: list[int], log_probs: list[torch.Tensor]) -> torch.Tensor:
            losses.extend(
                items[index].loss(values)
                for index, values in zip(indices, log_probs, strict=True)
            )
            return torch.stack(losses).sum()

        if items[0].batch.forward_only:
            values = self._trainer.forward(sequences)
            total(list(range(len(items))), values)
        else:
            values = self._trainer.forward_backward(sequences, total)
        return list(zip(values, torch.stack(losses).tolist(), strict=True))

    def _passes(self, jobs: Mapping[str, Batch]) -> Iterator[list[_Item]]:
        """Items that go through the module together; those of a run are in order.

        Which items of a run are together does not depend on other runs, because their
        gradients are added up in that order.
        """
        for forward_only in (False, True):
            parts = [
                part
                for run, batch in jobs.items()
                if batch.forward_only == forward_only
                for part in self._parts(run, batch)
            ]
            most = TOKENS_IN_A_PASS if self._packed else 0
            for together in _filled(parts, most):
                yield [item for part in together for item in part]

    def _parts(self, run: str, batch: Batch) -> list[list[_Item]]:
        items = [[_Item(run, batch, datum)] for datum in batch.data]
        if not self._packed:
            return items
        return [
            [item for one in part for item in one]
            for part in _filled(items, TOKENS_IN_A_PASS)
        ]

    def optim_step(self, run: str, params: AdamWParams) -> dict[str, float]:
        metrics = self._trainer.step(run, params)
        return {f"{name}:mean": value for name, value in metrics.items()}

    def export(self, run: str) -> Adapter:
        return self._trainer.adapters[run].copy()

    def read(self, folder: Path) -> Adapter:
        """The adapter in ``folder``, as one of this trainer's module.

        Raises ValueError if it is not.
        """
        return Adapter.load(folder)

    def save_optimizer(self, run: str, folder: Path) -> None:
        self._trainer.save_optimizer(run, folder)

    def load(self, run: str, folder: Path, optimizer: bool) -> None:
        if optimizer and not (folder / OPTIMIZER).exists():
            raise UserError("the checkpoint has no optimizer state; load without it")
        try:
            self._trainer.set_factors(run, self.read(folder))
        except ValueError as error:
            raise UserError(
                f"the checkpoint is of an adapter of other layers: {error}"
            ) from error
        self._trainer.reset_optimizer(run)
        if optimizer:
            self._trainer.load_optimizer(run, folder)


def _filled(parts: list[list[_Item]], most: int) -> list[list[list[_Item]]]:
    """Neighbours together up to ``most`` tokens; one alone may have more."""
    ends = 0
    group = 0
    numbers = []
    for part in parts:
        size = sum(len(item.datum.tokens) for item in part)
        if ends and ends + size > most:
            group, ends = group + 1, 0
        ends += size
        numbers.append(group)
    pairs = zip(numbers, parts, strict=True)
    return [[part for _, part in pair] for _, pair in groupby(pairs, lambda p: p[0])]
