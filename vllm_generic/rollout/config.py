# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a rollout is configured by. `python -m vllm_generic.rollout` prints it."""

from __future__ import annotations

import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from vllm.config.utils import config, get_attr_docs
from vllm.sampling_params import SamplingParams
from vllm_generic.rollout.yaml_files import read

REFUSED = {
    "use_beam_search": "vLLM has no beam search in its engine; use n and temperature",
    "max_paddings": "vLLM pads no prompts; max_num_batched_tokens bounds a step",
    "swap_space": "vLLM computes preempted requests anew; remove the key",
    "num_scheduler_steps": "vLLM schedules ahead by itself; remove the key",
    "vllm_micro_batch_size": "vLLM batches by itself; use max_num_seqs",
    "apply_replica_id_to_seed": "each request has a seed of its own; remove the key",
    "num_inference_per_prompt": "use n, whose answers share the prompt's keys",
    "init_shuffle_prompts": "let a torch DataLoader shuffle what build_dataset returns",
    "num_gpu": "use tensor_model_parallel_size and data_parallel_size",
    "num_device": "use tensor_model_parallel_size and data_parallel_size",
    "num_cpu": "vLLM takes what it needs; remove the key",
    "gpu_per_process": "vLLM has one process for each device; remove the key",
    "generation_batch_size": "give forward_step a batch of that size",
    "batch_generation": "vLLM batches by itself; use max_num_seqs",
    "trainable": "a rollout is not trained; pass the trainer's module to "
    "parameter_sync",
    "module_name": "the class that you make is the module; remove the key",
}


@config
class RolloutConfig:
    """How a `VLLMModule` makes and samples its engine.

    The names are those of ChatLearn's YAML; those that ChatLearn has not are vLLM's.
    """

    # ---- The model
    model: str | None = None
    """The directory with the model's config.json, and its checkpoint, if it has one."""
    tokenizer: str | None = None
    """The tokenizer's directory; the model's if None. Without any, prompts are token
    ids."""
    load_format: str = "auto"
    """As in vLLM; "dummy" starts without a checkpoint, and waits for an update."""
    dtype: str = "auto"
    """Of the engine's weights, as in vLLM."""
    seed: int | None = 0
    """Each request has a seed of its own, made of this one, the iteration, and the
    prompt's index. None leaves sampling to the engine's generator, which is faster."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """What included files say of the model's structure; for `model_provider`."""

    # ---- Sampling
    n: int = Field(default=1, ge=1)
    """Answers to each prompt. They share the keys and values of the prompt."""
    temperature: float = Field(default=1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """The most likely tokens with this probability together are considered."""
    top_k: int = Field(default=-1, ge=-1)
    """So many of the most likely tokens are considered; -1 for all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Least probability of a token, as a share of the most likely one's."""
    eval_n: int | None = Field(default=None, ge=1)
    """Like n, in an evaluation; 1 if None."""
    eval_temperature: float | None = Field(default=None, ge=0)
    """Like temperature, in an evaluation; the same if None."""
    eval_top_p: float | None = Field(default=None, gt=0, le=1)
    """Like top_p, in an evaluation; the same if None."""
    eval_top_k: int | None = Field(default=None, ge=-1)
    """Like top_k, in an evaluation; the same if None."""
    eval_min_p: float | None = Field(default=None, ge=0, le=1)
    """Like min_p, in an evaluation; the same if None."""
    ignore_eos: bool = False
    """Sample on after an end-of-sequence token."""
    stop_token_list: str = ""
    """Strings that end an answer, separated by semicolons."""
    stop_token_ids: list[int] = Field(default_factory=list)
    """Tokens that end an answer, beside the end of sequence."""
    seq_length: int | None = Field(default=None, ge=2)
    """Tokens of a prompt and its answer together; the model's own limit if None."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens of an answer."""
    new_token_limit: bool = True
    """Whether max_new_tokens bounds an answer, or seq_length alone does."""
    prompt_logprobs: int | None = Field(default=None, ge=0)
    """Whether to compute log-probabilities of the prompt's tokens: 1 or None."""
    logprobs_mode: Literal["processed_logprobs", "raw_logprobs"] = "processed_logprobs"
    """"processed_logprobs" are those that were sampled from, after temperature, top_p,
    top_k and min_p. "raw_logprobs" are the model's own."""
    vllm_prompt_key: str = "prompt"
    """The column of a prompt's row that holds its text."""
    vllm_input_ids_key: str = "input_ids"
    """The column that holds its tokens."""
    overlong_prompts: Literal["raise", "drop"] = "raise"
    """What build_dataset does with prompts that leave no room for an answer."""
    pad_to_seq_length: bool = False
    """Whether every batch is seq_length wide, or as its longest sequence."""

    # ---- The scheduler
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    """Most tokens in a step of the engine; vLLM decides if None."""
    max_num_seqs: int | None = Field(default=None, ge=1)
    """Most sequences in a step of the engine; vLLM decides if None."""

    # ---- The cache
    block_size: int | None = Field(default=None, ge=1)
    """Tokens in a block of the KV cache; vLLM decides if None."""
    gpu_memory_utilization: float = Field(default=0.5, gt=0, le=1)
    """Share of the GPU's memory for the engine: weights and KV cache."""
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1)
    """Size of the KV cache, in place of a share of the memory."""
    sliding_window: int | None = Field(default=None, ge=1)
    """Width of the attention's window, for a model whose config has one."""

    # ---- The engine
    tensor_model_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each layer."""
    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    """Stages that share the layers."""
    data_parallel_size: int = Field(default=1, ge=1)
    """Copies of the engine, among which vLLM divides the requests."""
    asynchronous: bool = False
    """Make an `AsyncLLM`: for episodes, and to answer while the trainer trains."""
    engine_urls: list[str] = Field(default_factory=list)
    """Servers to use in place of an engine in this program."""
    ray_engines: int = Field(default=0, ge=0)
    """So many engines on nodes that Ray chooses, in place of one in this program."""
    ray_options: dict[str, Any] = Field(default_factory=dict)
    """What Ray's `.options` takes for each of them, such as `num_gpus` or `resources`.
    """
    timeout: float = Field(default=600.0, gt=0)
    """Seconds for a request to a server, for a step of an update, and for Ray to find a
    node."""
    enforce_eager: bool = False
    """Neither compile nor capture CUDA graphs."""
    offload_level: Literal[0, 1, 2] = 1
    """What `offload` gives back: 1: the weights go to host memory; 2: they are dropped,
    and the next update has to bring them; 0: nothing."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Any other arguments of vLLM's engine, by their names there."""

    @classmethod
    def from_yaml(cls, path: str | Path, model: str = "policy") -> RolloutConfig:
        """Read a file of ChatLearn's form.

        Args:
            path: The model's own YAML, or an rlhf.yaml with a section for each model.
            model: The section of an rlhf.yaml.

        Raises:
            ValueError: a key is unknown, was given up, or has a value that is none of
                its type.

        """
        own, included = read(Path(path), model)
        names = {field.name for field in fields(cls)}
        for key in (*own, *included):
            if key in REFUSED:
                raise ValueError(f"{path}: there is no key {key}: {REFUSED[key]}.")
        for key in own:
            if key not in names:
                raise ValueError(
                    f"{path}: unknown key {key}. See the known ones by "
                    "`python -m vllm_generic.rollout`; what describes the "
                    "model's structure belongs into model_args or an included file, "
                    "and arguments of vLLM into engine_args."
                )
        structure = {k: v for k, v in included.items() if k not in names}
        values = {k: v for k, v in included.items() if k in names} | own
        values["model_args"] = structure | (values.get("model_args") or {})
        return cls(**values)

    def sampling_params(
        self,
        prompt_length: int,
        seq_length: int,
        *,
        is_eval: bool = False,
        tokenizer: Any | None = None,
    ) -> SamplingParams:
        """How to sample the answers of a prompt.

        Args:
            prompt_length: Its tokens.
            seq_length: The most tokens of a prompt and its answer.
            is_eval: Whether the `eval_` twins count.
            tokenizer: For `stop_token_list`.

        Raises:
            ValueError: there are strings to stop at, and no tokenizer.

        """
        left = seq_length - prompt_length
        stop, stop_token_ids = self._stops(tokenizer)
        return SamplingParams(
            n=(self.eval_n or 1) if is_eval else self.n,
            temperature=self._twin("temperature", is_eval),
            top_p=self._twin("top_p", is_eval),
            top_k=max(self._twin("top_k", is_eval), 0),
            min_p=self._twin("min_p", is_eval),
            ignore_eos=self.ignore_eos,
            stop=stop,
            stop_token_ids=stop_token_ids,
            detokenize=tokenizer is not None,
            max_tokens=min(left, self.max_new_tokens) if self.new_token_limit else left,
            logprobs=0,
            prompt_logprobs=None if self.prompt_logprobs is None else 0,
        )

    def _stops(self, tokenizer: Any | None) -> tuple[list[str], list[int]]:
        """Strings and tokens to stop at; a string that is a token, as that token."""
        strings, token_ids = [], list(self.stop_token_ids)
        for text in filter(None, self.stop_token_list.split(";")):
            if tokenizer is None:
                raise ValueError(
                    f"stop_token_list has {text!r}, and the engine has no tokenizer. "
                    "Use stop_token_ids."
                )
            token = tokenizer.get_vocab().get(text)
            if token is None:
                strings.append(text)
            else:
                token_ids.append(token)
        return strings, token_ids

    def _twin(self, name: str, is_eval: bool) -> Any:
        value = getattr(self, f"eval_{name}") if is_eval else None
        return getattr(self, name) if value is None else value


def defaults() -> str:
    """The keys with their defaults and meanings, as a YAML file."""
    documented = get_attr_docs(RolloutConfig)
    values = RolloutConfig()
    lines: list[str] = []
    for field in fields(RolloutConfig):
        text = " ".join(documented[field.name].split())
        lines += textwrap.wrap(text, 86, initial_indent="# ", subsequent_indent="# ")
        value = {field.name: getattr(values, field.name)}
        lines += [yaml.safe_dump(value, default_flow_style=False).strip(), ""]
    return "\n".join(lines)
