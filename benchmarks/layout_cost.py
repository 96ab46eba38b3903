# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What equal bits in every layout cost on a CPU: serving, and a training step.

    python benchmarks/layout_cost.py --json results.json

Transformers' Llama, unchanged, serves at TP 1 and 2, and trains in one process. At each
size three modes are compared: the default; `VLLM_BATCH_INVARIANT=1` with one leaf,
which is the mode as it was before sums were added in a tree; and with eight leaves. All
processes of one size are alive at once and take turns, and what counts is the time of
the CPU, so that other programs on the machine hardly change it. Two ranks wait for each
other by spinning: there the time of the clock counts, and it is noisy.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
from harness import Child, generation_rate, host, random_prompts

CONFIG = {
    "architectures": ["TreeLlama"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
INVARIANT = {"VLLM_BATCH_INVARIANT": "1"}
MODES = {
    "default": {},
    "one leaf": INVARIANT | {"VLLM_BATCH_INVARIANT_LEAVES": "1"},
    "tree": INVARIANT | {"VLLM_BATCH_INVARIANT_LEAVES": "8"},
}
WORKS = ("training", "serving TP=1", "serving TP=2")
PROMPT_TOKENS, NEW_TOKENS, PROMPTS = 96, 16, 4
STEP = (2, 256)  # sequences and tokens of each, in a training step


def model() -> Any:
    """The trainer's module, which is told what engines divide."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from vllm.model_executor.models.plans.whole import sum_as_divided

    torch.manual_seed(0)
    module = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.bfloat16)
    return sum_as_divided(module)  # by the plan that Transformers has for it


def build(vllm_config: Any, parallel_context: Any) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(vllm_config.model_config.hf_config)


def server(tp_size: int, directory: str) -> Callable[[], float]:
    """Starts an engine; a call returns its tokens a second, those of prompts too."""
    from vllm import LLM, ModelRegistry

    ModelRegistry.register_model("TreeLlama", build)
    llm = LLM(
        model=directory,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=1 << 26,
        tensor_parallel_size=tp_size,
        enable_prefix_caching=False,
    )
    prompts = random_prompts(CONFIG["vocab_size"], PROMPT_TOKENS, PROMPTS)
    tokens = PROMPTS * (PROMPT_TOKENS + NEW_TOKENS)

    def serve() -> float:
        begin = seconds(tp_size == 1)
        generation_rate(llm, prompts, NEW_TOKENS)
        return tokens / (seconds(tp_size == 1) - begin)

    return serve


def seconds(of_cpu: bool) -> float:
    """Of the CPU, of this process and its children; or of the clock."""
    if not of_cpu:
        return time.perf_counter()
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def trainer() -> Callable[[], float]:
    """A call returns the tokens a second of a forward and backward on one thread."""
    import torch

    from vllm.training.batch_invariance import batch_invariant, token_log_probs

    invariant = os.environ.get("VLLM_BATCH_INVARIANT") == "1"
    torch.set_num_threads(1)
    module = model()
    ids = torch.randint(CONFIG["vocab_size"], STEP)

    def step() -> float:
        begin = seconds(of_cpu=True)
        with batch_invariant() if invariant else nullcontext():
            logits = module(ids).logits[:, :-1].flatten(0, 1)
            token_log_probs(logits, ids[:, 1:].flatten()).mean().backward()
        return ids.numel() / (seconds(of_cpu=True) - begin)

    return step


def answer(call: Callable[[], float]) -> None:
    """As a `Child`: once to warm up, and then for each line."""
    call()
    print("= 0", flush=True)
    for _ in sys.stdin:
        print("=", call(), flush=True)


def compare(work: str, rounds: int, directory: str) -> dict[str, Any]:
    """Rates of all modes, which take turns, and their ratios within each round."""
    children = {
        mode: Child(__file__, "--work", work, "--directory", directory, env=variables)
        for mode, variables in MODES.items()
    }
    for child in children.values():
        child.answer()
    order = list(children)
    rates: dict[str, list[float]] = {mode: [] for mode in order}
    for number in range(rounds):
        for mode in order if number % 2 else reversed(order):
            rates[mode].append(children[mode].ask("go"))
    for child in children.values():
        child.close()
    ratios = [a / b for a, b in zip(rates["one leaf"], rates["tree"], strict=True)]
    return {
        "work": work,
        "tokens_per_s": {mode: statistics.median(x) for mode, x in rates.items()},
        "best_tokens_per_s": {mode: max(x) for mode, x in rates.items()},
        "tree_over_one_leaf": statistics.median(ratios),  # of the time
        "ratios": sorted(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--works", nargs="+", default=WORKS, choices=WORKS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        name, _, size = args.work.partition(" TP=")
        call = server(int(size), args.directory) if name == "serving" else trainer()
        answer(call)
        return
    results: dict[str, Any] = {**host(), "cpus": os.cpu_count(), "rows": []}
    with tempfile.TemporaryDirectory() as directory:
        from safetensors.torch import save_file

        (Path(directory) / "config.json").write_text(json.dumps(CONFIG))
        weights = {name: x.clone() for name, x in model().state_dict().items()}
        save_file(weights, Path(directory) / "model.safetensors")
        for work in args.works:
            row = compare(work, args.rounds, directory)
            results["rows"].append(row)
            print(json.dumps(row), flush=True)
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
