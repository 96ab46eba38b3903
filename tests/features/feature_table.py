# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Runs vLLM's features with one model in every form, beside vLLM's own class.

    python tests/features/feature_table.py [--engine NAME] [--columns WORD]

Prints the table of docs/models/features.md: «equal» where tokens are those of vLLM's
class and log-probabilities differ by at most 1e-4, else what differs or the refusal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOLERANCE = 1e-4
if __name__ == "__main__":  # before vllm is imported
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from feature_models import COLUMNS, LENGTH, NATIVE, VOCAB, Column, save  # noqa: E402

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.sampling_params import (  # noqa: E402
    BeamSearchParams,
    StructuredOutputsParams,
)

SHORT, LONG = [1, 2, 3], [(7 * i * i + 3) % VOCAB for i in range(70)]
PROMPTS = [SHORT, LONG, [9] * 11]
Result = Any  # lists, dicts, numbers and texts


def ids(*prompts: list[int]) -> list[Any]:
    return [{"prompt_token_ids": prompt} for prompt in prompts or PROMPTS]


def tokens(*prompts: list[int], **sampling: Any) -> Callable[[LLM], Result]:
    """What is sampled; greedily, unless `sampling` says something else."""
    params = {"temperature": 0.0, "max_tokens": 12, "detokenize": False} | sampling

    def run(llm: LLM) -> Result:
        # A request's own seed fails on a CPU if its prompt is read in chunks.
        torch.manual_seed(1)
        outputs = llm.generate(ids(*prompts), SamplingParams(**params), use_tqdm=False)
        return [
            [
                (list(sample.token_ids), str(sample.stop_reason))
                for sample in out.outputs
            ]
            for out in outputs
        ]

    return run


def logprobs(**sampling: Any) -> Callable[[LLM], Result]:
    """Of each sampled token, or of each of the prompt."""

    def run(llm: LLM) -> Result:
        params = SamplingParams(temperature=0.0, max_tokens=6, **sampling)
        outputs = llm.generate(ids(), params, use_tqdm=False)
        values = [out.prompt_logprobs or out.outputs[0].logprobs for out in outputs]
        return [
            {token: entry.logprob for token, entry in step.items()}
            for steps in values
            for step in steps
            if step is not None
        ]

    return run


def beams(llm: LLM) -> Result:
    outputs = llm.beam_search(ids(), BeamSearchParams(beam_width=3, max_tokens=6))
    return [
        [(beam.tokens, beam.cum_logprob) for beam in out.sequences] for out in outputs
    ]


def cached_prefix(llm: LLM) -> Result:
    """The second time, most of the prompt is in the cache."""
    prompt = [5, *LONG, *LONG, *LONG[:40]]  # longer than a block of the cache
    first = tokens(prompt)(llm)
    params = SamplingParams(temperature=0.0, max_tokens=12, detokenize=False)
    (again,) = llm.generate(ids(prompt), params, use_tqdm=False)
    assert again.num_cached_tokens, "nothing was in the cache"
    return [first, list(again.outputs[0].token_ids), again.num_cached_tokens]


def embeddings(llm: LLM) -> Result:
    return [out.outputs.embedding for out in llm.embed(ids(), use_tqdm=False)]


def many(llm: LLM) -> Result:
    """More than the KV cache holds at once."""
    prompts = [[i + 1, *LONG[: 40 + i]] for i in range(6)]
    return tokens(*prompts, max_tokens=40)(llm)


def drafted(llm: LLM) -> Result:
    return tokens([7, 8, 9] * 6, SHORT, max_tokens=24)(llm)


ENGINES: dict[str, dict[str, Any]] = {
    "default": {"enable_prefix_caching": True},
    "async": {"async_scheduling": True},
    "little cache": {"num_gpu_blocks_override": 3, "block_size": 128},
    "fp8 cache": {"kv_cache_dtype": "fp8"},
    "int8 cache": {"kv_cache_dtype": "int8_per_token_head"},
    "n-gram": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
        }
    },
    "draft": {
        "speculative_config": {"method": "draft_model", "num_speculative_tokens": 2}
    },
    "pooling": {"runner": "pooling"},
    "connector": {
        "kv_transfer_config": {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
        }
    },
}


@dataclass(frozen=True)
class Feature:
    """A row: how a feature is used, and what has to be equal."""

    name: str
    run: Callable[[LLM], Result]
    engine: str = "default"


COUNTRY = {"structured_outputs": StructuredOutputsParams(choice=["t5 t6", "t7"])}
FEATURES = [
    Feature("greedy decoding of a batch, chunked prefill", tokens()),
    Feature("temperature", tokens(temperature=0.7)),
    Feature("seeds of requests", tokens(SHORT, temperature=0.7, seed=3)),
    Feature("top-k, top-p", tokens(temperature=1.0, top_k=9, top_p=0.9)),
    Feature("several samples", tokens(SHORT, temperature=0.9, n=3)),
    Feature("stop tokens", tokens(stop_token_ids=list(range(0, VOCAB, 5)))),
    Feature("stop texts", tokens(stop=["t1", "t5"], detokenize=True)),
    Feature("minimum of tokens", tokens(min_tokens=5, stop_token_ids=[*range(64)])),
    Feature("bad words", tokens(bad_words=["t57", "t2", "t56"])),
    Feature("logit bias", tokens(logit_bias={5: 9.0, 77: 9.0})),
    Feature("allowed tokens", tokens(allowed_token_ids=[4, 5, 6])),
    Feature("repetition penalty", tokens(repetition_penalty=1.3)),
    Feature("presence and frequency penalties", tokens(presence_penalty=1.0)),
    Feature("log-probabilities", logprobs(logprobs=5)),
    Feature("log-probabilities of the prompt", logprobs(prompt_logprobs=3)),
    Feature("beam search", beams),
    Feature("structured output", tokens(SHORT, **COUNTRY, detokenize=True)),
    Feature("prefix caching", cached_prefix),
    Feature("async scheduling", tokens(), "async"),
    Feature("preemption", many, "little cache"),
    Feature("fp8 KV cache", tokens(), "fp8 cache"),
    Feature("int8 KV cache", tokens(), "int8 cache"),
    Feature("speculation by n-grams", drafted, "n-gram"),
    Feature("speculation by a draft model", drafted, "draft"),
    Feature("pooling", embeddings, "pooling"),
    Feature("KV connector", tokens(LONG, LONG), "connector"),
]


def run_engine(column: Column, engine: str) -> dict[str, Result]:
    """Each feature of `engine`, by name; `{"refused": ...}` where it is."""
    features = [feature for feature in FEATURES if feature.engine == engine]
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), column)
        options = {**ENGINES[engine], **column.options}
        if engine == "draft":
            options["speculative_config"] |= {"model": folder}
        if engine == "connector":
            storage = {"shared_storage_path": f"{folder}/kv"}
            options["kv_transfer_config"] |= {"kv_connector_extra_config": storage}
        llm = None
        try:
            llm = LLM(
                folder,
                dtype="float32",
                max_model_len=LENGTH,
                max_num_batched_tokens=48,  # so that a prompt is read in chunks
                max_num_seqs=4,
                enforce_eager=True,
                kv_cache_memory_bytes=1 << 24,
                disable_log_stats=True,
                **options,
            )
            return {feature.name: attempt(feature, llm) for feature in features}
        except Exception as error:  # noqa: BLE001 - the refusal is the result
            return {feature.name: refusal(error) for feature in features}
        finally:
            if llm is not None:
                llm.llm_engine.engine_core.shutdown(timeout=30)
            cleanup_dist_env_and_memory()


def run_apart(column: Column, engine: str) -> dict[str, Result]:
    """As `run_engine`, in a process of its own.

    vLLM's CPU platform cannot start a second engine in a process that has speculated.
    """
    command = [sys.executable, __file__, "--engine", engine, "--run", column.title]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"{column.title}, {engine}: {done.stderr[-2000:]}")
    return json.loads(lines[-1])


def attempt(feature: Feature, llm: LLM) -> Result:
    try:
        return feature.run(llm)
    except Exception as error:  # noqa: BLE001 - as above
        return refusal(error)


def refusal(error: Exception) -> dict[str, str]:
    return {"refused": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def difference(wanted: Result, got: Result, where: str = "") -> str | None:
    """The first place where they differ; numbers may by `TOLERANCE`."""
    if isinstance(wanted, float) and isinstance(got, float):
        near = abs(wanted - got) <= TOLERANCE or wanted == got  # both infinite
        return None if near else f"{where}: {wanted} is {got}"
    if isinstance(wanted, dict) and isinstance(got, dict):
        if wanted.keys() != got.keys():
            return (
                f"{where}: {list(wanted)} is {got if 'refused' in got else list(got)}"
            )
        pairs = [(wanted[key], got[key], f"{where}.{key}") for key in wanted]
    elif isinstance(wanted, list | tuple) and isinstance(got, list | tuple):
        if len(wanted) != len(got):
            return f"{where}: {wanted} is {got}"
        pairs = [
            (a, b, f"{where}[{i}]")
            for i, (a, b) in enumerate(zip(wanted, got, strict=True))
        ]
    else:
        return None if wanted == got else f"{where}: {wanted} is {got}"
    return next((d for a, b, place in pairs if (d := difference(a, b, place))), None)


def cell(wanted: Result, got: Result) -> str:
    if isinstance(got, dict) and "refused" in got:
        same = isinstance(wanted, dict) and wanted == got
        return "as vLLM's" if same else f"refused: {got['refused']}"
    return "equal" if difference(wanted, got) is None else "differs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", help="only the features of this engine")
    parser.add_argument("--columns", default="", help="those with this in their title")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        (column,) = (c for c in (NATIVE, *COLUMNS) if c.title == args.run)
        print(json.dumps(run_engine(column, args.engine)), flush=True)
        return
    columns = [c for c in COLUMNS if args.columns.lower() in c.title.lower()]
    print("| Feature |", " | ".join(c.title for c in columns), "|")
    print("| --- |" + " --- |" * len(columns))
    for engine in ENGINES if args.engine is None else [args.engine]:
        wanted = run_apart(NATIVE, engine)
        got = [run_apart(column, engine) for column in columns]
        for name, value in wanted.items():
            cells = [cell(value, results[name]) for results in got]
            if isinstance(value, dict) and "refused" in value:
                name = f"{name} (vLLM's class: {value['refused']})"
            print("|", " | ".join([name, *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
