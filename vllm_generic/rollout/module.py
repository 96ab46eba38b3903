# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`VLLMModule`: the policy that answers prompts, in the form that ChatLearn gave it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch import nn

from vllm import LLM, RequestOutput
from vllm.config import VllmConfig
from vllm.model_executor.parallel_context import ParallelContext
from vllm_generic.rollout.batch import Sample, collate, samples_of
from vllm_generic.rollout.config import RolloutConfig
from vllm_generic.rollout.engine_args import Factory
from vllm_generic.rollout.engines import Engine, LocalEngine, Request
from vllm_generic.rollout.episodes import Episode, Play, play_all
from vllm_generic.rollout.pool import EnginePool
from vllm_generic.rollout.prompts import PromptDataset, Prompts
from vllm_generic.rollout.ranks import is_first_rank, on_first_rank
from vllm_generic.rollout.requests import (
    AnswerLengths,
    make_requests,
    one_answer_each,
    set_seeds,
)
from vllm_generic.rollout.start import start_engine
from vllm_generic.rollout.updates import Updates

GIVEN_UP = {
    "seq_group_metadata_list": "vLLM schedules by itself",
    "blocks_to_swap_in": "vLLM computes preempted requests anew",
    "blocks_to_swap_out": "vLLM computes preempted requests anew",
    "blocks_to_copy": "vLLM's prefix cache shares blocks",
}


class VLLMModule:
    """A policy whose answers vLLM samples, and whose weights a trainer updates.

        module = VLLMModule("policy.yaml", model_provider=factory)
        module.setup()
        dataset = module.build_dataset(["2+2=", "3+5="])
        batch = module.forward_step(dataset.collate(dataset.items))
        ...  # a step of the trainer
        module.parameter_sync(trainer_module)

    A subclass may override any of the methods that ChatLearn's users know:
    `model_provider`, `build_dataset`, `_add_request`, `decode_internal` and the steps.
    A trainer of several ranks makes one on each, and all call the same methods. The
    first rank has the engine.

    Args:
        config: How to make and sample the engine: a `RolloutConfig`, its keys, or the
            path of a YAML file.
        model_provider: Builds the module, once for each worker, as
            `model_provider(vllm_config, parallel_context)`, or `"module:name"` of it.
            None if a subclass has the method, or vLLM knows the architecture.
        engine: An `LLM` to use in place of one that `setup` makes.
        name: The section of an rlhf.yaml.
        weight_version: The number of the weights that the engine has loaded; that of
            the last update, if a trainer goes on from a checkpoint.

    """

    def __init__(
        self,
        config: RolloutConfig | Mapping[str, Any] | str | Path,
        model_provider: Factory | str | None = None,
        *,
        engine: LLM | None = None,
        name: str = "policy",
        weight_version: int = 0,
    ) -> None:
        if isinstance(config, (str, Path)):
            config = RolloutConfig.from_yaml(config, name)
        elif not isinstance(config, RolloutConfig):
            config = RolloutConfig(**config)
        self.name = name
        self.config = config
        self.model_args = config.model_args
        self._updates = Updates(weight_version, config.timeout)
        self._factory = model_provider
        self._given_engine = engine
        self._engine: Engine | None = None
        self._seq_length: int | None = None
        self._tokenizer: Any | None = None
        self._asleep: set[str] = set()  # the first rank's
        self._batches = 0
        self._lengths = AnswerLengths()

    def __getstate__(self) -> dict[str, Any]:
        """What `model_provider` needs in a worker: not the engine."""
        left_out = ("_given_engine", "_engine", "_updates", "_tokenizer")
        return {k: None if k in left_out else v for k, v in vars(self).items()}

    # ---- What a subclass may override

    def setup(self) -> None:
        """Make the engine."""

        def start() -> tuple[int, Any | None]:
            if self._engine is None and self._given_engine is not None:
                self._engine = LocalEngine(self._given_engine)
            elif self._engine is None:
                self._engine = start_engine(self.config, self._find_factory())
            return self._engine.seq_length(), self._engine.tokenizer()

        self._seq_length, self._tokenizer = on_first_rank(start)

    def model_provider(
        self, vllm_config: VllmConfig, parallel_context: ParallelContext
    ) -> nn.Module:
        """Build the module that trains and serves; also `model_provider(self)`."""
        raise NotImplementedError

    def build_dataset(
        self, train_prompts: Prompts, is_eval: bool = False
    ) -> PromptDataset:
        """Prompts with their tokens.

        Args:
            train_prompts: Texts, lists of token ids, or rows; or the path of a JSONL
                file; or a `datasets.Dataset`.
            is_eval: Whether they are for an evaluation.

        Raises:
            ValueError: a prompt is empty or leaves no room for an answer.

        """
        answer = self.config.max_new_tokens if self.config.new_token_limit else 1
        return PromptDataset(
            train_prompts,
            max(self.seq_length - answer, 1),
            self.tokenizer,
            prompt_key=self.config.vllm_prompt_key,
            input_ids_key=self.config.vllm_input_ids_key,
            drop_overlong=self.config.overlong_prompts == "drop",
        )

    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        """Answer a batch of prompts, for training.

        Args:
            data: Columns: `input_ids` (lists of tokens) and `prompt` (texts); see
                `PromptDataset.collate`. One of both is enough.
            iteration: With the seed, it decides what is sampled.

        Returns:
            See `collate`. The first `n` rows answer the first prompt, and so on.

        Raises:
            ValueError: a prompt is empty or too long; its index is named.
            RuntimeError: a request fails, or no engine is left.

        """
        return self._forward_step(data, iteration, is_eval=False)

    def eval_forward(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        """Answer a batch of prompts, as the `eval_` keys say."""
        return self._forward_step(data, iteration, is_eval=True)

    def _add_request(
        self, data: dict[str, Any], is_eval: bool = False
    ) -> list[Request]:
        """The requests for a batch of prompts."""
        return self._add_request_internal(
            data.get("prompt"), data.get("input_ids"), is_eval=is_eval
        )

    def decode_internal(
        self, batched_outputs: Sequence[RequestOutput | Sample]
    ) -> dict[str, Any]:
        """The tensors of a batch's outputs, or of samples; see `collate`."""
        samples: list[Sample] = []
        for index, output in enumerate(batched_outputs):
            if isinstance(output, Sample):
                samples.append(output)
            else:
                samples += samples_of(output, index, self.weight_version)
        length = self.seq_length if self.config.pad_to_seq_length else None
        return collate(samples, self.pad_token_id, length)

    # ---- Later names

    def generate(
        self, data: dict[str, Any], iteration: int = 0, is_eval: bool = False
    ) -> list[RequestOutput]:
        """vLLM's own outputs for a batch of prompts, in their order.

        Only the first rank of a trainer can call it.
        """
        requests = self._requests(data, iteration, is_eval)
        return self._note(data, self.engine.generate(requests))

    def begin_step(
        self, data: dict[str, Any], iteration: int = 0
    ) -> Future[dict[str, Any]]:
        """Begin `forward_step`, and return at once; see `answered_ahead`."""
        pool = self._pool("Answering ahead of the trainer")
        requests = self._requests(data, iteration)

        async def step() -> dict[str, Any]:
            outputs = await pool.answer_all(requests)
            return self.decode_internal(self._note(data, outputs))

        return pool.submit(step())

    def run_episodes(
        self,
        play: Play,
        data: dict[str, Any],
        iteration: int = 0,
        is_eval: bool = False,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Rollouts of many turns: `n` for each prompt, all at a time.

        Args:
            play: A coroutine that calls the engine by `episode.sample`.
            data: As for `forward_step`.
            iteration: With the seed, it decides what is sampled.
            is_eval: Whether the `eval_` keys count.
            timeout: Seconds for all of them; None for any time.

        Returns:
            See `collate`; and under `results` what each `play` has returned.

        Raises:
            RuntimeError: a `play` raises; its prompt is named, the others are ended.
            TimeoutError: some have not ended in time; their prompts are named.

        """

        def run() -> dict[str, Any]:
            pool = self._pool("An episode")

            async def ask(request: Request) -> RequestOutput:
                return self._updates.number(await pool.answer(request))

            episodes = [
                Episode(
                    {key: data[key][request.prompt_index] for key in data},
                    request,
                    self.seq_length,
                    ask,
                    self.tokenizer,
                    lambda: self.weight_version,
                )
                for request in one_answer_each(self._requests(data, iteration, is_eval))
            ]
            results = pool.call(play_all(play, episodes, timeout))
            batch = self.decode_internal([each.sample_so_far for each in episodes])
            return batch | {"results": results}

        return on_first_rank(run)

    def offload(self) -> None:
        """Give the engine's memory to the trainer, until `onload` or the next use.

        On a CPU there is none to give.
        """
        on_first_rank(self._sleep)

    def onload(self, tags: Sequence[str] | None = None) -> None:
        """Take memory for `tags` ("weights", "kv_cache") again, or for all."""
        on_first_rank(lambda: self._wake(tags))

    def parameter_sync(
        self, model: nn.Module, parallel_context: ParallelContext | None = None
    ) -> int:
        """Bring a trainer's weights into the engines; every rank of it calls this.

        Args:
            model: What trains.
            parallel_context: Which part of it this rank has; see `WeightSync`.

        Returns:
            The number of the update, which `weight_versions` has from now on.

        Raises:
            RuntimeError: it failed; the old weights serve on.

        """
        self.onload(["weights"])
        return self._updates.update(model, parallel_context, self._engine)

    def close(self) -> None:
        """End the engine that `setup` has made, and what is shared with the trainer."""
        self._updates.close()
        if self._engine is not None and self._given_engine is None:
            self._engine.close()
        self._engine = None

    # ---- What is known of the engine

    @property
    def weight_version(self) -> int:
        """The number of the last update; 0 before it, unless the caller has said."""
        return self._updates.version

    @property
    def engine(self) -> Engine:
        """The engine behind this module.

        Raises:
            RuntimeError: `setup` was not called, or this is not the first rank.

        """
        if self._engine is None:
            why = "Call setup() first." if is_first_rank() else "The first rank has it."
            raise RuntimeError(f"There is no engine here. {why}")
        return self._engine

    @property
    def seq_length(self) -> int:
        """The most tokens of a prompt and its answer."""
        if self._seq_length is None:
            raise RuntimeError("There is no engine yet. Call setup() first.")
        return self._seq_length

    @property
    def tokenizer(self) -> Any | None:
        """The tokenizer, or None if prompts are token ids."""
        return self._tokenizer

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's padding, else its end of sequence, else 0."""
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(self.tokenizer, name, None)
            if value is not None:
                return int(value)
        return 0

    # ---- Inside

    def _forward_step(
        self, data: dict[str, Any], iteration: int, is_eval: bool
    ) -> dict[str, Any]:
        return on_first_rank(
            lambda: self.decode_internal(self.generate(data, iteration, is_eval))
        )

    def _sleep(self) -> None:
        if self.config.offload_level and not self._asleep:
            self.engine.sleep(self.config.offload_level)
            self._asleep = {"weights", "kv_cache"}

    def _wake(self, tags: Sequence[str] | None = None) -> None:
        asked = sorted(self._asleep) if tags is None else tags
        asleep = [tag for tag in asked if tag in self._asleep]
        if asleep:
            self.engine.wake_up(asleep)
            self._asleep -= set(asleep)

    def _add_request_internal(
        self,
        prompts: Sequence[str] | None,
        input_ids: Sequence[Sequence[int]] | None,
        is_eval: bool = False,
    ) -> list[Request]:
        return make_requests(
            self.config, prompts, input_ids, self.seq_length, self.tokenizer, is_eval
        )

    def _requests(
        self, data: dict[str, Any], iteration: int, is_eval: bool = False
    ) -> list[Request]:
        """What `_add_request` makes, with seeds and an order."""
        for key in data.keys() & GIVEN_UP.keys():
            raise ValueError(f"There is no {key} in a batch: {GIVEN_UP[key]}.")
        self._wake()
        requests = self._add_request(data, is_eval=is_eval)
        self._batches += 1
        for request in requests:
            request.batch = self._batches
        if self.config.seed is not None:
            set_seeds(requests, self.config.seed, iteration, is_eval)
        self._lengths.expect(requests, data)
        return requests

    def _note(
        self, data: dict[str, Any], outputs: list[RequestOutput]
    ) -> list[RequestOutput]:
        self._lengths.note(outputs, data)
        return [self._updates.number(output) for output in outputs]

    def _pool(self, who: str) -> EnginePool:
        if not isinstance(self.engine, EnginePool):
            raise RuntimeError(
                f"{who} needs an engine that takes requests at any time. Set "
                "asynchronous: true, engine_urls or ray_engines."
            )
        return self.engine

    def _find_factory(self) -> Factory | str | None:
        """What builds the model: the argument or the method `model_provider`."""
        own = type(self).model_provider
        if self._factory is not None or own is VLLMModule.model_provider:
            return self._factory
        takes_arguments = len(inspect.signature(own).parameters) > 1
        return self.model_provider if takes_arguments else _WithoutArguments(self)


class _WithoutArguments:
    """The factory of a module whose `model_provider` takes none."""

    def __init__(self, module: VLLMModule) -> None:
        self._module = module

    def __call__(
        self, vllm_config: VllmConfig, parallel_context: ParallelContext
    ) -> nn.Module:
        provider: Callable[[], nn.Module] = self._module.model_provider  # type: ignore[assignment]
        return provider()
