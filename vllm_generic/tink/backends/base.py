# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a backend that trains and one that samples have to offer.

A trainer is called from one thread, never the event loop's. A sampler is called from
the event loop. Arrays are numpy's, so that a backend may use any framework.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vllm.lora.adapter import Adapter
from vllm.lora.adapter_trainer import AdamWParams
from vllm_generic.tink.errors import UserError

NO_LOGPROB = -99999.0  # the client's mark of a position that was not scored


@dataclass(frozen=True)
class LoraSpec:
    """The adapter that a run trains. The scale of its product is alpha / rank."""

    rank: int
    seed: int
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    alpha: int = 32


@dataclass(frozen=True)
class Datum:
    """One sequence. ``tokens``: [N]; each loss input: [N] or [N, K]."""

    tokens: np.ndarray
    loss_inputs: dict[str, np.ndarray]


@dataclass(frozen=True)
class Batch:
    data: Sequence[Datum]
    loss_fn: str
    loss_config: Mapping[str, float] = field(default_factory=dict)
    forward_only: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(len(datum.tokens) for datum in self.data)


@dataclass(frozen=True)
class BatchOutput:
    """``logprobs``: for each datum float32, in the shape of its target_tokens."""

    logprobs: list[np.ndarray]
    metrics: dict[str, float]


class Trainer(Protocol):
    """Trains adapters of one frozen model. A run is named by its model id."""

    max_length: int
    vocab_size: int
    architecture: str
    max_runs_in_a_pass: int

    def create(self, run: str, spec: LoraSpec) -> None:
        """A new adapter; equal specs give equal bits."""

    def remove(self, run: str) -> None:
        """Free what ``create`` allocated."""

    def forward_backward(self, jobs: Mapping[str, Batch]) -> dict[str, BatchOutput]:
        """Add the gradient of each run's batch to the run's gradients."""

    def optim_step(self, run: str, params: AdamWParams) -> dict[str, float]:
        """Update the adapter and clear its gradients. The answer is metrics."""

    def export(self, run: str) -> Adapter:
        """A copy of the adapter as it is now."""

    def save_optimizer(self, run: str, folder: Path) -> None:
        """Write the optimizer's state into ``folder``."""

    def load(self, run: str, folder: Path, optimizer: bool) -> None:
        """Take the adapter in ``folder``, and the optimizer's state if asked.

        Gradients are cleared. Without a loaded state the optimizer starts from zero.
        """


@dataclass(frozen=True)
class SamplingParams:
    max_tokens: int | None = None
    seed: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop_strings: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class SampleJob:
    prompt: list[int]
    params: SamplingParams
    num_samples: int = 1
    prompt_logprobs: bool = False
    topk_prompt: int = 0
    topk_sample: int = 0
    # token ids whose log-probabilities to return, [len(prompt) - 1, K], -1 for none
    target_tokens: np.ndarray | None = None
    alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None

    @property
    def scores_prompt(self) -> bool:
        wanted = self.prompt_logprobs or self.topk_prompt or self.alt_tokens_k
        return bool(wanted) or self.target_tokens is not None


@dataclass(frozen=True)
class TopK:
    """The k likeliest tokens of each position, both [positions, k]."""

    token_ids: np.ndarray  # int32
    logprobs: np.ndarray  # float32


@dataclass(frozen=True)
class SampledSequence:
    tokens: list[int]
    logprobs: list[float]
    stopped: bool  # by a stop token or string; otherwise by its length
    topk: TopK | None = None


@dataclass(frozen=True)
class SampleOutput:
    sequences: list[SampledSequence]
    prompt_logprobs: np.ndarray | None = None  # [len(prompt)], NaN where not computed
    topk_prompt: TopK | None = None
    target_logprobs: np.ndarray | None = None  # [len(prompt) - 1, K]
    alt_tokens: TopK | None = None


@dataclass(frozen=True)
class Version:
    """Values of an adapter that never change under one key.

    They are a PEFT adapter in ``folder``, and in memory too if they were saved lately.
    """

    key: str
    folder: Path
    in_memory: Adapter | None = field(default=None, compare=False)

    def read(self) -> Adapter:
        """Raises UserError if it has something that is not taken."""
        if self.in_memory is not None:
            return self.in_memory
        try:
            return Adapter.load(self.folder)
        except json.JSONDecodeError:
            raise  # a broken file, not one that is refused
        except ValueError as error:
            raise UserError(f"the adapter in {self.folder.name}: {error}") from error


class Sampler(Protocol):
    """Samples from the base model and from adapters."""

    tokenizer: Any
    max_length: int
    vocab_size: int
    engine: Any  # vLLM's engine in this process, or None

    def failure(self) -> str | None:
        """Why nothing can be sampled any more, or None."""

    def close(self) -> None:
        """Free processes, threads and memory."""

    async def sample(self, version: Version | None, job: SampleJob) -> SampleOutput:
        """Sample from a version of an adapter, or from the base model if it is None.

        Log-probabilities are those of the model's own distribution: temperature, top-k
        and top-p decide which token is drawn, not what is reported.
        """
