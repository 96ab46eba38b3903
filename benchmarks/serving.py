# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Serving speed of one Llama-3.2-1B shape, random weights, as four models.

    python benchmarks/serving.py --json results.json
    python benchmarks/serving.py --shape gpt2-medium    # of a GPT, as three models

vLLM's native class, vLLM's Transformers backend, a plain PyTorch module around
`TrainableAttention` registered by a lambda, and Transformers' own class, unchanged and
registered by a lambda, all as vLLM runs them by default: compiled, with CUDA graphs,
the engine in a process of its own. For the GPT-2 shape, the unchanged module is the GPT
of examples/chain_parts, whose code has the form of nanoGPT's.
In each round every engine is started, one after another, in an order that rotates; then
all of them are timed in turns, and only one works at a time, so that a host that
becomes slower slows them all. Single requests take turns one by one.
The first round starts without any cache of compiled code, the later ones with the
engine's own. Figures are medians. Needs an NVIDIA GPU.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from harness import Child, generation_rate, host, random_prompts
from llama import LLAMA_1B, Llama

ENGINES = ("native", "Transformers backend", "plain module", "unchanged module")
LLAMA, GPT = SHAPES = ("llama-1b", "gpt2-medium")
GPT_SIZES = {"vocab_size": 50257, "n_layer": 24, "n_head": 16, "n_embd": 1024}
LENGTH, PROMPT_TOKENS, NEW_TOKENS, AT_ONCE = 1024, 512, 256, 256
ALONE_PER_TURN = 6
# All engines of a round share the memory of one GPU.
MEMORY = 0.9 / len(ENGINES)


class Engine(Child):
    """An engine in its own process, which generates when it is told to."""

    def __init__(self, name: str, shape: str, cache: Path) -> None:
        caches = ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        env = {variable: f"{cache}/{variable}" for variable in caches}
        super().__init__(__file__, "--shape", shape, "--serve", name, env=env)
        self.startup_s = self.answer()

    def rate(self, requests: int) -> float:
        """New tokens a second, of `requests` at once."""
        return self.ask(requests)


def register(name: str, shape: str) -> dict[str, Any]:
    """The `config.json` of an engine, for which its factory is registered."""
    from vllm import ModelRegistry

    if shape == GPT:
        sys.path.append(str(Path(__file__).parents[1] / "examples" / "chain_parts"))
        import chain_models

        sizes = chain_models.GPTConfig(block_size=LENGTH, **GPT_SIZES)
        ModelRegistry.register_model(
            "UnchangedGPT", lambda c, p: chain_models.GPT(sizes)
        )
        config = GPT_SIZES | {"model_type": "gpt2", "n_positions": LENGTH}
        unchanged = name == "unchanged module"
        return config | {
            "architectures": ["UnchangedGPT" if unchanged else "GPT2LMHeadModel"]
        }
    architecture = "LlamaForCausalLM"
    if name == "plain module":
        architecture = "PlainLlama"
        ModelRegistry.register_model(architecture, lambda c, p: Llama(LLAMA_1B))
    if name == "unchanged module":
        from transformers import LlamaForCausalLM

        architecture = "UnchangedLlama"
        ModelRegistry.register_model(
            architecture, lambda c, p: LlamaForCausalLM(c.model_config.hf_config)
        )
    return LLAMA_1B.config(architecture)


def serve(name: str, shape: str) -> None:
    """Start one engine; then a number on standard input is a round of requests."""
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    from vllm import LLM

    options: dict[str, Any] = {}
    if name == "Transformers backend":
        options["model_impl"] = "transformers"
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "config.json"
        contents = register(name, shape)
        config.write_text(json.dumps(contents))
        start = time.perf_counter()
        llm = LLM(
            model=directory,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=LENGTH,
            enable_prefix_caching=False,
            gpu_memory_utilization=MEMORY,
            **options,
        )
        print(f"= {time.perf_counter() - start}", flush=True)
    prompts = random_prompts(contents["vocab_size"], PROMPT_TOKENS, AT_ONCE)
    for line in sys.stdin:
        rate = generation_rate(llm, prompts[: int(line)], NEW_TOKENS)
        print(f"= {rate}", flush=True)


def rotated(names: Sequence[str], by: int) -> list[str]:
    by %= len(names)
    return [*names[by:], *names[:by]]


def measure_round(
    number: int, shape: str, names: Sequence[str], turns: int, caches: Path
) -> Iterator[dict[str, dict[str, Any]]]:
    """Start every engine once, time all of them in turns, and yield after each turn."""
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for name in rotated(names, number):
            engines[name] = stack.enter_context(
                closing(Engine(name, shape, caches / name))
            )
            print(f"round {number}: {name} started", flush=True)
        results: dict[str, dict[str, Any]] = {
            name: {"startup_s": engine.startup_s, "at_once": [], "alone": []}
            for name, engine in engines.items()
        }
        for turn in range(-1, turns):  # the first is a warm-up
            for requests, key, times in (
                (AT_ONCE, "at_once", 1),
                (1, "alone", ALONE_PER_TURN),
            ):
                for _ in range(times):
                    for name in rotated(names, turn):
                        rate = engines[name].rate(requests)
                        if turn >= 0:
                            results[name][key].append(rate)
            if turn >= 0:
                yield results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--rounds", type=int, default=2, help="starts an engine (2)")
    parser.add_argument("--turns", type=int, default=5, help="timings a start (5)")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=ENGINES, help="only these"
    )
    parser.add_argument("--shape", choices=SHAPES, default=LLAMA)
    parser.add_argument("--serve", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.shape)
        return

    from rich.console import Console

    names = [
        name for name in args.engines if (args.shape, name) != (GPT, "plain module")
    ]
    rounds: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as caches:
        for number in range(args.rounds):
            before = rounds
            turns = measure_round(number, args.shape, names, args.turns, Path(caches))
            for results in turns:
                rounds = [*before, results]
                if args.json:  # after each turn, as a round takes minutes
                    known = {**host(), "shape": args.shape, "rounds": rounds}
                    args.json.write_text(json.dumps(known, indent=1) + "\n")
    Console(width=140).print(table(args.shape, rounds))


def table(shape: str, rounds: list[dict[str, dict[str, Any]]]) -> Any:
    from rich.table import Table

    def figures(engine: str) -> list[float]:
        runs = [results[engine] for results in rounds]
        starts = [run["startup_s"] for run in runs]
        return [
            *(
                statistics.median(rate for run in runs for rate in run[key])
                for key in ("at_once", "alone")
            ),
            starts[0],
            statistics.median(starts[1:] or starts),
        ]

    names = list(rounds[0])
    base = "native" if "native" in names else names[0]
    table = Table(title=f"{shape}, {PROMPT_TOKENS} tokens in, {NEW_TOKENS} out")
    table.add_column("engine")
    for title in (
        f"{AT_ONCE} at once, tok/s",
        "alone, tok/s",
        "first start, s",
        "next start, s",
    ):
        table.add_column(title, justify="right")
        table.add_column(f"of {base}", justify="right")
    for name in names:
        cells = [name]
        for value, reference in zip(figures(name), figures(base), strict=True):
            cells += [f"{value:,.1f}", f"{value / reference:.2f}"]
        table.add_row(*cells)
    return table


if __name__ == "__main__":
    main()
