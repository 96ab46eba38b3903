# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Serving speed of one Llama-3.1-8B shape, random weights, on several GPUs.

    python benchmarks/parallel.py --layouts TP=2 PP=2 --json results.json

vLLM's native class, a factory with vLLM's parallel layers, and a factory with
megatron-core's each run in their own process, and as vLLM runs them by default. The
first two load the same checkpoint. Megatron keeps the random weights that it makes.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import generation_rates, host, last_json
from llama import LLAMA_8B, Llama
from safetensors.torch import save_file

ENGINES = ("native", "vLLM's layers", "Megatron")
PROMPT_TOKENS, NEW_TOKENS, AT_ONCE = 512, 128, 256
LOADING = re.compile(r"Model loading took .* and ([\d.]+) seconds")


def save_checkpoint(path: Path) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Llama(LLAMA_8B)
    weights = {name: x.cpu().clone() for name, x in model.checkpoint().items()}
    save_file(weights, path, metadata={"format": "pt"})


def run(engine: str, layout: str, checkpoint: str) -> dict[str, float]:
    """Start one engine and time it, in a process of its own."""
    from vllm import LLM, ModelRegistry

    dimension, size = layout.split("=")
    name = {"TP": "tensor_parallel_size", "PP": "pipeline_parallel_size"}[dimension]
    architecture = "LlamaForCausalLM"
    options: dict[str, Any] = {name: int(size)}
    if engine == "vLLM's layers":
        architecture = "ParallelLlama"
        ModelRegistry.register_model(
            architecture, lambda c, p: Llama(LLAMA_8B, p), supports_pp=True
        )
    if engine == "Megatron":
        from megatron_llama import ServingRowParallelLinear, build

        architecture = "MegatronLlama"

        def megatron(c: Any, p: Any) -> Any:
            groups = p.megatron_groups()
            model = build(LLAMA_8B, groups, row_parallel=ServingRowParallelLinear)
            return model.requires_grad_(False)  # Megatron's shorter path

        ModelRegistry.register_model(architecture, megatron, supports_pp=True)
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "config.json"
        config.write_text(json.dumps(LLAMA_8B.config(architecture)))
        (Path(directory) / "model.safetensors").symlink_to(checkpoint)
        start = time.perf_counter()
        llm = LLM(
            model=directory,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=2048,
            enable_prefix_caching=False,
            **options,
        )
        startup = time.perf_counter() - start
    rates = generation_rates(
        llm, LLAMA_8B.vocab_size, PROMPT_TOKENS, NEW_TOKENS, AT_ONCE, repeats_alone=3
    )
    return {"startup_s": startup, **rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="+", default=["TP=2", "PP=2"])
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument(
        "--checkpoint", type=Path, help="keep the weights in this file, or take its"
    )
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print("\n" + json.dumps(run(*args.run)))
        return

    from rich.console import Console
    from rich.table import Table

    rows: list[dict[str, Any]] = []
    results = {
        **host(),
        "rows": rows,
    }
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "INFO"}  # says how long it loads
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = (
            args.checkpoint or Path(directory) / "llama.safetensors"
        ).absolute()
        if not checkpoint.exists():
            save_checkpoint(checkpoint)
            torch.cuda.empty_cache()
        for layout in args.layouts:
            for engine in args.engines:
                command = [sys.executable, __file__, "--run", engine, layout]
                child = subprocess.run(
                    [*command, str(checkpoint)],
                    capture_output=True,
                    text=True,
                    env=environment,
                )
                if child.returncode:
                    print(f"{engine}, {layout}:\n{child.stdout}{child.stderr}")
                    continue
                row = {"engine": engine, "layout": layout}
                row |= last_json(child.stdout)
                if "runs without torch.compile" in child.stdout + child.stderr:
                    print(f"{engine}, {layout}: not compiled")
                loading = LOADING.findall(child.stdout + child.stderr)
                row["loading_s"] = max(map(float, loading))
                rows.append(row)
                print(row, flush=True)
                if args.json:  # after each, as they take minutes
                    args.json.write_text(json.dumps(results, indent=1) + "\n")
    table = Table(title="Llama-3.1-8B shape, 512 tokens in, 128 out")
    table.add_column("layout")
    table.add_column("engine")
    columns = {
        "at_once": f"{AT_ONCE} at once, tok/s",
        "alone": "alone, tok/s",
        "loading_s": "building and loading, s",
        "startup_s": "start, s",
    }
    for title in columns.values():
        table.add_column(title, justify="right")
        table.add_column("of native", justify="right")
    native = {row["layout"]: row for row in rows if row["engine"] == "native"}
    for row in rows:
        cells = [row["layout"], row["engine"]]
        for key in columns:
            cells.append(f"{row[key]:,.1f}")
            beside = native.get(row["layout"])
            cells.append(f"{row[key] / beside[key]:.2f}" if beside else "")
        table.add_row(*cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
