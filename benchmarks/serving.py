# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Serving speed of one Llama-3.2-1B shape, random weights, as three models.

    python benchmarks/serving.py --json results.json

vLLM's native class, vLLM's Transformers backend, and a plain PyTorch module around
`TrainableAttention` registered by a lambda, all as vLLM runs them by default: compiled,
with CUDA graphs. One process an engine, alternating; the figures are medians, but for
the first start, which compiles. Needs an NVIDIA GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import generation_rates, host, last_json
from llama import LLAMA_1B, Llama

ENGINES = ("native", "Transformers backend", "plain module")
PROMPT_TOKENS, NEW_TOKENS, AT_ONCE = 512, 256, 256


def run(engine: str) -> dict[str, float]:
    """Start one engine and time it, in a process of its own."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    from vllm import LLM, ModelRegistry

    architecture = "LlamaForCausalLM"
    options: dict[str, Any] = {}
    if engine == "Transformers backend":
        options["model_impl"] = "transformers"
    if engine == "plain module":
        architecture = "PlainLlama"
        ModelRegistry.register_model(architecture, lambda c, p: Llama(LLAMA_1B))
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "config.json"
        config.write_text(json.dumps(LLAMA_1B.config(architecture)))
        start = time.perf_counter()
        llm = LLM(
            model=directory,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=2048,
            enable_prefix_caching=False,
            **options,
        )
        startup = time.perf_counter() - start
    rates = generation_rates(
        llm, LLAMA_1B.vocab_size, PROMPT_TOKENS, NEW_TOKENS, AT_ONCE, repeats_alone=5
    )
    return {"startup_s": startup, **rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--rounds", type=int, default=2, help="starts an engine (2)")
    parser.add_argument("--run", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print("\n" + json.dumps(run(args.run)))
        return

    from rich.console import Console

    runs: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    results: dict[str, Any] = {
        **host(),
        "runs": runs,
    }
    with tempfile.TemporaryDirectory() as cache:
        os.environ["VLLM_CACHE_ROOT"] = cache  # so that the first starts compile
        for _ in range(args.rounds):
            for engine in ENGINES:
                command = [sys.executable, __file__, "--run", engine]
                child = subprocess.run(command, stdout=subprocess.PIPE, check=True)
                runs[engine].append(last_json(child.stdout))
                print(engine, runs[engine][-1], flush=True)
                if args.json:  # after each, as they take minutes
                    args.json.write_text(json.dumps(results, indent=1) + "\n")
    Console(width=140).print(table(runs))


def table(runs: dict[str, list[dict[str, float]]]) -> Any:
    from rich.table import Table

    figures = {
        engine: [
            statistics.median(run["at_once"] for run in results),
            statistics.median(run["alone"] for run in results),
            results[0]["startup_s"],
            statistics.median(run["startup_s"] for run in results[1:] or results),
        ]
        for engine, results in runs.items()
    }
    table = Table(title="Llama-3.2-1B shape, 512 tokens in, 256 out")
    table.add_column("engine")
    columns = (
        f"{AT_ONCE} at once, tok/s",
        "alone, tok/s",
        "first start, s",
        "start, s",
    )
    for title in columns:
        table.add_column(title, justify="right")
        table.add_column("of native", justify="right")
    for engine, row in figures.items():
        cells = [engine]
        for value, native in zip(row, figures["native"], strict=True):
            cells += [f"{value:,.1f}", f"{value / native:.2f}"]
        table.add_row(*cells)
    return table


if __name__ == "__main__":
    main()
