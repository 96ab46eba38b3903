# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Matrix products of the batch-invariant mode on a GPU: their time, and their bits.

    python benchmarks/tree_product.py --json results.json

For each shape: the time of cuBLASLt as vLLM's mode sets it, of vLLM's Triton kernel and
of the tree product by its number of leaves; and which of them have the same bits, also
where the outputs are divided over two ranks.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["VLLM_BATCH_INVARIANT"] = "1"

import torch
import torch.nn.functional as F
from harness import host

from vllm.model_executor.layers.tree_linear import whole_linear
from vllm.model_executor.layers.tree_linear.product import tree_product
from vllm.training import batch_invariance

# Rows of a decode step, of a prefill and of a training step.
ROWS = (1, 16, 256, 2048, 16384)
# Outputs and features of a 1B Llama: qkv, o, gate and up, down.
MATRICES = ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192))
LEAVES = (1, 2, 4, 8)


def milliseconds(call: Callable[[], Any]) -> float:
    """The mean of many calls in a CUDA graph, which hides what the host takes."""
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(5):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 50


def measure(rows: int, outputs: int, features: int) -> dict[str, Any]:
    """One row of the results."""
    from vllm.model_executor.determinism.batch_invariant import linear_batch_invariant

    x = torch.randn(rows, features, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(outputs, features, device="cuda", dtype=torch.bfloat16)
    linears: dict[str, Callable[..., torch.Tensor]] = {
        "cublaslt": F.linear,
        "vllm": linear_batch_invariant,
    }
    for leaves in LEAVES:
        linears[f"tree_{leaves}"] = lambda x, w, leaves=leaves: tree_product(
            x, w, None, leaves, False
        )
    expected = whole_linear(x, weight)
    half = outputs // 2
    return {
        "rows": rows,
        "outputs": outputs,
        "features": features,
        "ms": {
            name: milliseconds(lambda linear=linear: linear(x, weight))
            for name, linear in linears.items()
        },
        # with one leaf
        "equal_to_tree": {
            name: float((linears[name](x, weight) == expected).float().mean())
            for name in ("cublaslt", "vllm")
        },
        # and the rows of one rank of two, in a batch of their own
        "equal_if_divided": {
            name: torch.equal(
                linear(x[: rows // 2 + 1], weight[half:]),
                linear(x, weight)[: rows // 2 + 1, half:],
            )
            for name, linear in linears.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    results: dict[str, Any] = {**host(), "rows": []}
    with batch_invariance.batch_invariant(), torch.no_grad():
        for outputs, features in MATRICES:
            for rows in ROWS:
                row = measure(rows, outputs, features)
                results["rows"].append(row)
                times = ", ".join(f"{n} {t:.4f}" for n, t in row["ms"].items())
                print(f"[{rows}, {features}] x [{outputs}, {features}], ms: {times}")
                print(f"  equal to the tree: {row['equal_to_tree']}")
                print(f"  equal if divided: {row['equal_if_divided']}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
