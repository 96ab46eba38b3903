# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The rows of the matrix: features, and the engines that they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from feature_models import VOCAB
from safetensors.torch import load_file

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

SHORT, LONG = [1, 2, 3], [(7 * i * i + 3) % VOCAB for i in range(70)]
PROMPTS = [SHORT, LONG, [9] * 11]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "detokenize": False}
FOLDER = "{folder}"  # in an engine's options: where the model and other files are
Result = Any  # lists, dicts, numbers and texts


@dataclass(frozen=True)
class Engine:
    """Options of an engine that some features share.

    Args:
        options: what makes it differ from the others.
        family: which model it serves.

    """

    options: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"


@dataclass(frozen=True)
class Subject:
    """What a feature is tried on.

    Args:
        llm: the engine.
        folder: with the model, and beside it `other` with a model of other weights,
            and `adapters/0`, `adapters/1`.

    """

    llm: LLM
    folder: Path


@dataclass(frozen=True)
class Feature:
    """A row: how a feature is used, and what has to be equal.

    Args:
        name: of the row.
        run: what uses it, and returns what is compared.
        engine: one of `ENGINES`.
        refused: words with which vLLM itself refuses it on a CPU.

    """

    name: str
    run: Callable[[Subject], Result]
    engine: str = "default"
    refused: str | None = None


def ids(*prompts: list[int], **more: Any) -> list[Any]:
    return [{"prompt_token_ids": prompt, **more} for prompt in prompts or PROMPTS]


def sampled(
    llm: LLM, prompts: list[Any], params: SamplingParams, **more: Any
) -> Result:
    """Tokens and stop reasons of each sample of each prompt."""
    # A request's own seed fails on a CPU if its prompt is read in chunks.
    torch.manual_seed(1)
    outputs = llm.generate(prompts, params, use_tqdm=False, **more)
    return [
        [(list(sample.token_ids), str(sample.stop_reason)) for sample in out.outputs]
        for out in outputs
    ]


def tokens(*prompts: list[int], **sampling: Any) -> Callable[[Subject], Result]:
    """What is sampled; greedily, unless `sampling` says something else."""
    params = GREEDY | sampling

    def run(subject: Subject) -> Result:
        return sampled(subject.llm, ids(*prompts), SamplingParams(**params))

    return run


def logprobs(**sampling: Any) -> Callable[[Subject], Result]:
    """Of each sampled token, or of each of the prompt."""

    def run(subject: Subject) -> Result:
        params = SamplingParams(temperature=0.0, max_tokens=6, **sampling)
        outputs = subject.llm.generate(ids(), params, use_tqdm=False)
        values = [out.prompt_logprobs or out.outputs[0].logprobs for out in outputs]
        return [
            {token: entry.logprob for token, entry in step.items()}
            for steps in values
            for step in steps
            if step is not None
        ]

    return run


def beams(subject: Subject) -> Result:
    params = BeamSearchParams(beam_width=3, max_tokens=6)
    outputs = subject.llm.beam_search(ids(), params)
    return [
        [(beam.tokens, beam.cum_logprob) for beam in out.sequences] for out in outputs
    ]


def cached_prefix(*salts: str | None) -> Callable[[Subject], Result]:
    """One prompt after another; how much of each is in the cache."""
    # Longer than a block of the cache, and another one for each row.
    prompt = [len(salts), *LONG, *LONG, *LONG[:40]]

    def run(subject: Subject) -> Result:
        found = []
        for salt in salts:
            more = {} if salt is None else {"cache_salt": salt}
            params = SamplingParams(**GREEDY)
            (out,) = subject.llm.generate(ids(prompt, **more), params, use_tqdm=False)
            cached = out.num_cached_tokens
            found.append((list(out.outputs[0].token_ids), cached))
        hits = [bool(cached) for _, cached in found]
        wanted = [salt in salts[:i] for i, salt in enumerate(salts)]
        assert hits == wanted, f"in the cache were {hits}, not {wanted}"
        return found

    return run


def embeddings(subject: Subject) -> Result:
    return [out.outputs.embedding for out in subject.llm.embed(ids(), use_tqdm=False)]


def many(subject: Subject) -> Result:
    """More than the KV cache holds at once."""
    prompts = [[i + 1, *LONG[: 40 + i]] for i in range(6)]
    return tokens(*prompts, max_tokens=40)(subject)


def drafted(subject: Subject) -> Result:
    return tokens([7, 8, 9] * 6, SHORT, max_tokens=24)(subject)


def updated(subject: Subject) -> Result:
    """Before, with other weights, and with the first ones again."""
    found = []
    for folder in (None, subject.folder / "other", subject.folder):
        if folder is not None:
            kwargs = {"weights_path": str(folder)}
            subject.llm.collective_rpc("reload_weights", kwargs=kwargs)
            subject.llm.reset_prefix_cache()
        found.append(tokens()(subject))
    assert found[0] == found[2] != found[1], "the weights did not change and return"
    return found


def slept(level: int) -> Callable[[Subject], Result]:
    def run(subject: Subject) -> Result:
        llm = subject.llm
        before = tokens()(subject)
        llm.sleep(level)
        if level == 2:  # the weights are gone
            llm.wake_up(["weights"])
            llm.collective_rpc("reload_weights")
        llm.wake_up()
        after = tokens()(subject)
        assert before == after
        return after

    return run


def adapted(subject: Subject) -> Result:
    """Two adapters in one batch.

    Not beside requests without one: on a CPU, vLLM's own manager adds the last adapter
    to those.
    """
    adapters = [
        LoRARequest(f"adapter{i}", i + 1, str(subject.folder / "adapters" / str(i)))
        for i in range(2)
    ]
    params = SamplingParams(**GREEDY)
    found = sampled(subject.llm, ids(LONG, LONG), params, lora_request=adapters)
    assert found[0] != found[1], "both adapters do the same"
    return found


def prompt_embeddings(subject: Subject) -> Result:
    weights = load_file(subject.folder / "model.safetensors")
    table = weights["model.embed_tokens.weight"]  # [vocab, hidden]
    prompts = [{"prompt_embeds": table[torch.tensor(prompt)]} for prompt in PROMPTS]
    found = sampled(subject.llm, prompts, SamplingParams(**GREEDY))
    assert found == tokens()(subject), "ids and their embeddings differ"
    return found


def prioritized(subject: Subject) -> Result:
    """More requests than run at once, in the order in which they finish."""
    prompts = [[i + 1, *LONG[:40]] for i in range(10)]
    engine, params = subject.llm.llm_engine, SamplingParams(**GREEDY)
    for i, prompt in enumerate(ids(*prompts)):
        engine.add_request(str(i), prompt, params, priority=-i)
    finished = []
    while engine.has_unfinished_requests():
        for out in engine.step():
            if out.finished:
                finished.append((out.request_id, list(out.outputs[0].token_ids)))
    assert finished[0][0] != "0", "the first request was not overtaken"
    return sorted(finished), [name for name, _ in finished]


class Avoid(AdapterLogitsProcessor):
    """Never the token that a request names as `avoid`, which the argmax often is."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        avoid = (params.extra_args or {}).get("avoid")
        if avoid is None:
            return None

        def apply(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            logits[avoid] = -torch.inf  # [vocab]
            return logits

        return apply


def processed(subject: Subject) -> Result:
    plain = tokens()(subject)
    avoid = [plain[0][0][0][0]]
    found = tokens(extra_args={"avoid": avoid})(subject)
    assert avoid[0] not in found[0][0][0]
    return found


def speculation(method: str, **more: Any) -> Engine:
    options = {"method": method, "num_speculative_tokens": 3, **more}
    return Engine({"speculative_config": options})


def connector(name: str, **more: Any) -> Engine:
    options = {"kv_connector": name, "kv_role": "kv_both"}
    options["kv_connector_extra_config"] = more
    return Engine({"kv_transfer_config": options})


ENGINES = {
    "default": Engine({"enable_prefix_caching": True}),
    "async": Engine({"async_scheduling": True}),
    "little cache": Engine({"num_gpu_blocks_override": 3, "block_size": 128}),
    "fp8 cache": Engine({"kv_cache_dtype": "fp8"}),
    "int8 cache": Engine({"kv_cache_dtype": "int8_per_token_head"}),
    "n-gram": speculation("ngram", prompt_lookup_max=3),
    "suffix": speculation("suffix"),
    "draft": speculation("draft_model", model=FOLDER),
    "pooling": Engine({"runner": "pooling"}),
    "connector": connector("ExampleConnector", shared_storage_path=f"{FOLDER}/kv"),
    "offloading": Engine({"kv_offloading_size": 0.01}),
    "lora": Engine({"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}),
    "sleep": Engine({"enable_sleep_mode": True}),
    "inputs": Engine(
        {
            "enable_prompt_embeds": True,
            "scheduling_policy": "priority",
            "logits_processors": [Avoid],
        }
    ),
    "caps": Engine(family="gemma2"),
    "sinks": Engine(family="gpt_oss"),
    "mamba": Engine(family="falcon_h1"),
    "delta": Engine(family="qwen3_next"),
    "convolution": Engine(family="lfm2"),
    "decode context": Engine(
        {"tensor_parallel_size": 2, "decode_context_parallel_size": 2}
    ),
    "prefill context": Engine({"prefill_context_parallel_size": 2}),
}


def structured(**constraint: Any) -> Callable[[Subject], Result]:
    outputs = StructuredOutputsParams(**constraint)
    return tokens(SHORT, structured_outputs=outputs, detokenize=True)


FEATURES = [
    Feature("greedy decoding of a batch, chunked prefill", tokens()),
    Feature("temperature", tokens(temperature=0.7)),
    Feature("seeds of requests", tokens(SHORT, temperature=0.7, seed=3)),
    Feature("top-k, top-p", tokens(temperature=1.0, top_k=9, top_p=0.9)),
    Feature("min-p", tokens(temperature=1.0, min_p=0.1)),
    Feature("several samples", tokens(SHORT, temperature=0.9, n=3)),
    Feature("stop tokens", tokens(stop_token_ids=list(range(0, VOCAB, 5)))),
    Feature("stop texts", tokens(stop=["t1", "t5"], detokenize=True)),
    Feature("minimum of tokens", tokens(min_tokens=5, stop_token_ids=[*range(64)])),
    Feature("bad words", tokens(bad_words=["t57", "t2", "t56"])),
    Feature("logit bias", tokens(logit_bias={5: 9.0, 77: 9.0})),
    Feature("allowed tokens", tokens(allowed_token_ids=[4, 5, 6])),
    Feature("repetition penalty", tokens(repetition_penalty=1.3)),
    Feature("presence penalty", tokens(presence_penalty=1.0)),
    Feature("frequency penalty", tokens(frequency_penalty=1.0)),
    Feature("log-probabilities", logprobs(logprobs=5)),
    Feature("log-probabilities of the prompt", logprobs(prompt_logprobs=3)),
    Feature("beam search", beams),
    Feature("structured output: a choice", structured(choice=["t5t6", "t7"])),
    Feature("structured output: a regular expression", structured(regex="(t1|t2){6}")),
    Feature("structured output: a grammar", structured(grammar='root ::= "t1t2t3"')),
    Feature("prefix caching", cached_prefix(None, None)),
    Feature("prefix caching with salts", cached_prefix("a", "b", "a")),
    Feature("weight update: reload from a directory", updated),
    Feature("async scheduling", tokens(), "async"),
    Feature("preemption", many, "little cache"),
    Feature("fp8 KV cache", tokens(), "fp8 cache"),
    Feature("int8 KV cache", tokens(), "int8 cache"),
    Feature("speculation by n-grams", drafted, "n-gram"),
    Feature("speculation by suffixes", drafted, "suffix", "arctic-inference"),
    Feature("speculation by a draft model", drafted, "draft"),
    Feature("pooling", embeddings, "pooling"),
    Feature("KV connector", tokens(LONG, LONG), "connector"),
    Feature("KV offloading", tokens(LONG, LONG), "offloading", "Offloading"),
    Feature("LoRA", adapted, "lora"),
    Feature("sleep of level 1", slept(1), "sleep", "Sleep mode"),
    Feature("sleep of level 2", slept(2), "sleep", "Sleep mode"),
    Feature("prompt embeddings", prompt_embeddings, "inputs"),
    Feature("priority scheduling", prioritized, "inputs"),
    Feature("logits processors", processed, "inputs"),
    Feature("sliding windows, soft caps", logprobs(logprobs=5), "caps"),
    Feature("sliding windows, attention sinks", logprobs(logprobs=5), "sinks"),
    Feature("states: Mamba-2", logprobs(logprobs=5), "mamba"),
    Feature("states: a gated delta rule", logprobs(logprobs=5), "delta", "BF16"),
    Feature("states: short convolutions", logprobs(logprobs=5), "convolution"),
    Feature("decode context parallelism", tokens(), "decode context", "Decode context"),
    Feature("prefill context parallelism", tokens(), "prefill context", "context"),
]
