# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Training of many adapters at once on one frozen module.

    trainer = AdapterTrainer(module)
    trainer.add("a", AdapterConfig(rank=8), seed=0)
    trainer.add("b", AdapterConfig(rank=32), seed=1)
    batch = [TrainingSequence("a", tokens, targets), TrainingSequence("b", ...)]
    log_probs = trainer.forward_backward(batch, loss)  # gradients add up
    trainer.step("a", AdamWParams(learning_rate=1e-4))  # and are cleared

`loss(indices, log_probs)` gets the places in `batch` of the sequences of one pass, and
for each of them the log-probabilities of its targets, in the targets' shape. It returns
the sum of the losses. `forward(batch)` gives the log-probabilities alone.

`trainer.adapters["a"].save(folder)` writes PEFT's files, `save_optimizer` and
`load_optimizer` the rest of a checkpoint; `trainer.set_factors` replaces an adapter's
values. With `step` they continue a run with the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vllm.model_executor.parallel_context import ParallelContext
from vllm.training.batch_invariance import token_log_probs

from .adapted_module import AdaptedModule
from .adapter import Adapter
from .adapter_config import AdapterConfig
from .sites import Site

OPTIMIZER = "optimizer.safetensors"

# (places in the batch, log-probabilities of their targets) -> sum of the losses
Loss = Callable[[list[int], list[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class TrainingSequence:
    """One sequence and what it should predict.

    Args:
        adapter: its adapter's name; None is the base.
        tokens: int64 `[tokens]`.
        targets: int64 `[tokens]` or `[tokens, K]`; position i predicts `targets[i]`.

    """

    adapter: str | None
    tokens: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class AdamWParams:
    """How to make a step, with Tinker's defaults; `grad_clip_norm` 0 does not clip."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class AdapterTrainer:
    """Adapters of a module, each with gradients and optimizer states of its own.

    The module's parameters are frozen, and nothing else about it changes: it is called
    as `module(input_ids, positions)` with packed sequences, whose bounds
    `TrainableAttention` knows.

    Args:
        module: a module that a factory has built, with its weights.
        context: this process's place among tensor-parallel ranks.
        vocab_size: the number of logits; by default, of the outputs of its head.
        packed: whether the sequences of all adapters go through the base together. By
            default on a GPU, where `batch_invariant()` gives each adapter the bits
            that it has alone. On a CPU, whose matrix products have no such mode, each
            adapter has a pass of its own, for the same reason.

    """

    def __init__(
        self,
        module: nn.Module,
        context: ParallelContext | None = None,
        vocab_size: int | None = None,
        packed: bool | None = None,
    ) -> None:
        self._adapted = AdaptedModule(module, context, vocab_size)
        self.sites: dict[str, Site] = self._adapted.sites
        self.device = self._adapted.device
        self.vocab_size = self._adapted.vocab_size
        self.packed = self.device.type != "cpu" if packed is None else packed
        self.adapters: dict[str, Adapter] = {}
        self._optimizers: dict[str, torch.optim.AdamW] = {}

    # ---- Adapters --------------------------------------------------------------------

    def add(
        self, name: str, adapter: AdapterConfig | Adapter, seed: int | None = None
    ) -> Adapter:
        """Train a new adapter, or continue with the values of one.

        Raises:
            ValueError: the name is taken, or the adapter does not fit the module.

        """
        if name in self.adapters:
            raise ValueError(f"There is an adapter {name!r} already; remove it first.")
        if isinstance(adapter, AdapterConfig):
            adapter = Adapter.start(adapter, self.sites, seed)
        adapter = adapter.named_as(self.sites)
        adapter.check_fits(self.sites)
        self.adapters[name] = adapter = adapter.for_training(self.device)
        self._optimizers[name] = torch.optim.AdamW(adapter.parameters())
        return adapter

    def remove(self, name: str) -> None:
        del self.adapters[name], self._optimizers[name]

    @torch.no_grad()
    def set_factors(self, name: str, other: Adapter) -> None:
        """Give the adapter `name` the values of `other`, of the same ranks and modules.

        Raises:
            ValueError: they are of other modules or shapes.

        """
        own = self.adapters[name]
        other = other.named_as(self.sites)
        if own.factors.keys() != other.factors.keys():
            raise ValueError(
                f"{name}: the other adapter changes {sorted(other.factors)}; expected "
                f"{sorted(own.factors)}."
            )
        other.check_fits(self.sites)
        pairs = list(zip(own.parameters(), _in_order(own, other), strict=True))
        for mine, theirs in pairs:
            if mine.shape != theirs.shape:
                raise ValueError(
                    f"{name}: the other adapter has a factor {list(theirs.shape)}; "
                    f"expected {list(mine.shape)}."
                )
        for mine, theirs in pairs:
            mine.copy_(theirs)

    # ---- Passes ----------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, batch: Sequence[TrainingSequence]) -> list[torch.Tensor]:
        """Log-probabilities of the targets of each sequence, float32."""
        return self._run(batch, None)

    def forward_backward(
        self, batch: Sequence[TrainingSequence], loss: Loss
    ) -> list[torch.Tensor]:
        """The same, and the gradients of `loss` are added to those of the adapters."""
        return self._run(batch, loss)

    def _run(
        self, batch: Sequence[TrainingSequence], loss: Loss | None
    ) -> list[torch.Tensor]:
        by_adapter: dict[str | None, list[int]] = {}
        for index, sequence in enumerate(batch):
            if sequence.adapter is not None and sequence.adapter not in self.adapters:
                raise KeyError(
                    f"There is no adapter {sequence.adapter!r}; there are "
                    f"{sorted(self.adapters)}."
                )
            by_adapter.setdefault(sequence.adapter, []).append(index)
        passes = [list(by_adapter.items())]
        if not self.packed:
            passes = [[item] for item in by_adapter.items()]
        results: list[torch.Tensor] = [torch.empty(0)] * len(batch)
        for groups in passes:
            if not groups:
                continue
            indices = [index for _, group in groups for index in group]
            log_probs = self._pass(batch, groups)
            if loss is not None:
                total = loss(indices, log_probs)
                if total.requires_grad:
                    total.backward()
            for index, values in zip(indices, log_probs, strict=True):
                results[index] = values.detach()
        return results

    def _pass(
        self,
        batch: Sequence[TrainingSequence],
        groups: list[tuple[str | None, list[int]]],
    ) -> list[torch.Tensor]:
        """One forward over the sequences of `groups`, which are sorted by adapter."""
        sequences = [batch[index] for _, group in groups for index in group]
        logits = self._adapted.logits(
            [
                (None if s.adapter is None else self.adapters[s.adapter], s.tokens)
                for s in sequences
            ]
        )
        return [
            _log_probs(part, sequence.targets.to(part.device))
            for part, sequence in zip(logits, sequences, strict=True)
        ]

    # ---- Steps -----------------------------------------------------------------------

    def step(self, name: str, params: AdamWParams) -> dict[str, float]:
        """One step of AdamW with the gradients that have added up, which it clears.

        Returns:
            `grad_norm`, before clipping.

        """
        factors = self.adapters[name].parameters()
        optimizer = self._optimizers[name]
        optimizer.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        limit = params.grad_clip_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(factors, limit)
        optimizer.step()
        self.clear_gradients(name)
        return {"grad_norm": float(norm)}

    def reset_optimizer(self, name: str) -> None:
        """Forget the gradients and the optimizer's state."""
        self.clear_gradients(name)
        factors = self.adapters[name].parameters()
        self._optimizers[name] = torch.optim.AdamW(factors)

    def clear_gradients(self, name: str) -> None:
        for factor in self.adapters[name].parameters():
            factor.grad = None

    def save_optimizer(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Write the state of the adapter's optimizer into `folder`."""
        state = self._optimizers[name].state
        tensors = {
            f"{factor_name}.{key}": value.contiguous().cpu()
            for factor_name, factor in self._named_factors(name).items()
            for key, value in state.get(factor, {}).items()
        }
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / f".{OPTIMIZER}")
        (path / f".{OPTIMIZER}").replace(path / OPTIMIZER)

    def load_optimizer(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Continue with the state that `save_optimizer` wrote.

        Raises:
            FileNotFoundError: the checkpoint has no state of an optimizer.

        """
        places = {key: index for index, key in enumerate(self._named_factors(name))}
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in load_file(Path(folder) / OPTIMIZER).items():
            factor_name, _, part = key.rpartition(".")
            state.setdefault(places[factor_name], {})[part] = value
        optimizer = self._optimizers[name]
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _named_factors(self, name: str) -> dict[str, torch.Tensor]:
        return {
            f"{module_name}.{letter}": factor
            for module_name, pair in self.adapters[name].factors.items()
            for letter, factor in zip("AB", pair, strict=True)
        }


def _in_order(own: Adapter, other: Adapter) -> list[torch.Tensor]:
    """The factors of `other` in the order of those of `own`."""
    return [factor for name in own.factors for factor in other.factors[name]]


def _log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of `targets`, `[tokens]` or `[tokens, K]`, by logits `[tokens, vocab]`."""
    if logits.is_cuda:  # by the kernel of vLLM's sampler
        columns = targets.view(len(targets), -1).unbind(1)
        values = [token_log_probs(logits, column) for column in columns]
        return torch.stack(values, 1).view(targets.shape)
    log_probs = torch.log_softmax(logits, -1, dtype=torch.float32)
    return log_probs.gather(1, targets.view(len(targets), -1)).view(targets.shape)
