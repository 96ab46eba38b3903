# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`VLLMModule`: the policy that answers prompts, in the form that ChatLearn gave it."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vllm import LLM, ModelRegistry, RequestOutput
from vllm.config import VllmConfig
from vllm.distributed.weight_sync import WeightSync
from vllm.model_executor.parallel_context import ParallelContext
from vllm.platforms import current_platform
from vllm_generic.rollout.batch import INITIAL_VERSION, Sample, collate, samples_of
from vllm_generic.rollout.config import RolloutConfig
from vllm_generic.rollout.engines import Engine, LocalEngine, Request
from vllm_generic.rollout.prompts import PromptDataset, Prompts

Factory = Callable[[VllmConfig, ParallelContext], nn.Module]
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

    Args:
        config: How to make and sample the engine: a `RolloutConfig`, its keys, or the
            path of a YAML file.
        model_provider: Builds the module, once for each worker, as
            `model_provider(vllm_config, parallel_context)`, or `"module:name"` of it.
            None if a subclass has the method, or vLLM knows the architecture.
        engine: An engine to use in place of one that `setup` makes.
        name: The section of an rlhf.yaml.

    """

    def __init__(
        self,
        config: RolloutConfig | Mapping[str, Any] | str | Path,
        model_provider: Factory | str | None = None,
        *,
        engine: LLM | None = None,
        name: str = "policy",
    ) -> None:
        if isinstance(config, (str, Path)):
            config = RolloutConfig.from_yaml(config, name)
        elif not isinstance(config, RolloutConfig):
            config = RolloutConfig(**config)
        self.name = name
        self.config = config
        self.model_args = config.model_args
        self.weight_version = INITIAL_VERSION
        self._factory = model_provider
        self._given_engine = engine
        self._engine: Engine | None = None
        self._sync: WeightSync | None = None
        self._synced: nn.Module | None = None
        self._asleep: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """What `model_provider` needs in a worker: not the engine."""
        left_out = ("_given_engine", "_engine", "_sync", "_synced")
        return {k: None if k in left_out else v for k, v in vars(self).items()}

    # ---- What a subclass may override

    def setup(self) -> None:
        """Make the engine."""
        if self._engine is not None:
            return
        llm = self._given_engine
        if llm is None:
            self._register()
            llm = LLM(**self.engine_args())
        self._engine = LocalEngine(llm)

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
            self.seq_length - min(answer, self.seq_length - 1),
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
        """vLLM's own outputs for a batch of prompts, in their order."""
        for key in data.keys() & GIVEN_UP.keys():
            raise ValueError(f"There is no {key} in a batch: {GIVEN_UP[key]}.")
        requests = self._add_request(data, is_eval=is_eval)
        for request in requests:
            if self.config.seed is not None:
                request.params.seed = self._seed(iteration, request, is_eval)
        self.onload()
        return self.engine.generate(requests)

    def offload(self) -> None:
        """Give the engine's memory to the trainer, until `onload` or the next use."""
        if not self._asleep and self.config.offload_level:
            self.engine.sleep(self.config.offload_level)
            self._asleep = {"weights", "kv_cache"}

    def onload(self, tags: Sequence[str] | None = None) -> None:
        """Take memory for `tags` ("weights", "kv_cache") again, or for all."""
        tags = [tag for tag in tags or sorted(self._asleep) if tag in self._asleep]
        if tags:
            self.engine.wake_up(tags)
            self._asleep -= set(tags)

    def parameter_sync(
        self, model: nn.Module, parallel_context: ParallelContext | None = None
    ) -> int:
        """Bring a trainer's weights into the engine; every rank of the trainer calls it.

        Args:
            model: What trains.
            parallel_context: Which part of it this rank has; see `WeightSync`.

        Returns:
            The number of the update, which `weight_versions` has from now on.

        """
        if self._sync is None or self._synced is not model:
            if self._sync is not None:
                self._sync.close()
            self._sync = WeightSync(
                model, self.engine.handles, parallel_context=parallel_context
            )
            self._synced = model
        self.onload(["weights"])
        self.weight_version = self._sync.update()
        return self.weight_version

    def close(self) -> None:
        """End the engine that `setup` has made, and what is shared with the trainer."""
        if self._sync is not None:
            self._sync.close()
            self._sync = self._synced = None
        if self._engine is not None and self._given_engine is None:
            self._engine.close()
        self._engine = None

    # ---- What is known of the engine

    @property
    def engine(self) -> Engine:
        """The engine behind this module.

        Raises:
            RuntimeError: `setup` was not called.

        """
        if self._engine is None:
            raise RuntimeError("There is no engine yet. Call setup() first.")
        return self._engine

    @property
    def seq_length(self) -> int:
        """The most tokens of a prompt and its answer."""
        return self.engine.seq_length()

    @property
    def tokenizer(self) -> Any | None:
        """The tokenizer, or None if prompts are token ids."""
        llm = self.engine.handles
        return None if llm.model_config.skip_tokenizer_init else llm.get_tokenizer()

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
        return self.decode_internal(self.generate(data, iteration, is_eval))

    def _add_request_internal(
        self,
        prompts: Sequence[str] | None,
        input_ids: Sequence[Sequence[int]] | None,
        is_eval: bool = False,
    ) -> list[Request]:
        if input_ids is None:
            if prompts is None or self.tokenizer is None:
                raise ValueError(
                    "A batch needs input_ids, or prompt and a tokenizer; see "
                    "build_dataset."
                )
            input_ids = [self.tokenizer.encode(text) for text in prompts]
        texts = prompts or [""] * len(input_ids)
        requests = []
        for index, (text, given) in enumerate(zip(texts, input_ids, strict=True)):
            ids = [int(token) for token in given]
            if not 0 < len(ids) < self.seq_length:
                raise ValueError(
                    f"Prompt {index} of the batch has {len(ids)} tokens; expected 1 to "
                    f"{self.seq_length - 1}, so that there is room for an answer."
                )
            params = self.config.sampling_params(
                len(ids), self.seq_length, is_eval=is_eval
            )
            requests.append(Request(text, ids, params, index))
        return requests

    def _seed(self, iteration: int, request: Request, is_eval: bool) -> int:
        """Of one request: the same whenever a batch is repeated."""
        what = [self.config.seed, iteration, request.prompt_index, is_eval]
        digest = hashlib.blake2b(json.dumps(what).encode(), digest_size=7).digest()
        return int.from_bytes(digest)

    def engine_args(self) -> dict[str, Any]:
        """The arguments of vLLM's engine that the config asks for."""
        config = self.config
        if config.model is None:
            raise ValueError("There is no key model; name the model's directory.")
        args: dict[str, Any] = {
            "model": config.model,
            "tokenizer": config.tokenizer,
            "load_format": config.load_format,
            "dtype": config.dtype,
            "seed": config.seed or 0,
            "max_model_len": config.seq_length,
            "logprobs_mode": config.logprobs_mode,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "max_num_seqs": config.max_num_seqs,
            "block_size": config.block_size,
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "kv_cache_memory_bytes": config.kv_cache_memory_bytes,
            "tensor_parallel_size": config.tensor_model_parallel_size,
            "pipeline_parallel_size": config.pipeline_model_parallel_size,
            "data_parallel_size": config.data_parallel_size,
            "enforce_eager": config.enforce_eager,
            "enable_sleep_mode": current_platform.is_sleep_mode_available(),
        }
        args = {key: value for key, value in args.items() if value is not None}
        folder = Path(config.tokenizer or config.model)
        args["skip_tokenizer_init"] = not any(folder.glob("tokenizer*"))
        return args | config.engine_args

    def _register(self) -> None:
        """Let vLLM build the model by `model_provider`, if there is one."""
        factory = self._factory
        own = type(self).model_provider
        if factory is None:
            if own is VLLMModule.model_provider:
                return
            takes_args = len(inspect.signature(own).parameters) > 1
            factory = self.model_provider if takes_args else _WithoutArguments(self)
        config = json.loads((Path(self.config.model or "") / "config.json").read_text())
        for architecture in config["architectures"]:
            ModelRegistry.register_model(architecture, factory)


class _WithoutArguments:
    """The factory of a module whose `model_provider` takes none."""

    def __init__(self, module: VLLMModule) -> None:
        self._module = module

    def __call__(
        self, vllm_config: VllmConfig, parallel_context: ParallelContext
    ) -> nn.Module:
        provider: Callable[[], nn.Module] = self._module.model_provider  # type: ignore[assignment]
        return provider()
