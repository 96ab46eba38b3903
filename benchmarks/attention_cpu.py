# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Training attention of packed batches on a CPU, beside PyTorch's own ways.

    python benchmarks/attention_cpu.py --json results.json

Everything runs in one process. A round calls each engine once, so that other programs
on the machine slow all of them equally. They hardly change the CPU time of one thread.
"""

import argparse
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.utils.rnn import pad_sequence

from vllm.model_executor.layers import TrainableAttention

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """A packed batch of causal sequences."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def forward_flop(self) -> float:
        pairs = sum(length * (length + 1) / 2 for length in self.lengths)
        return 4 * pairs * self.heads * self.head_dim


def log_normal(count: int, median: float, low: int, high: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(count).log_normal_(math.log(median), 0.9, generator=generator)
    return tuple(lengths.clamp(low, high).int().tolist())


SHAPES = [
    Shape("RL batch", log_normal(12, 250, 32, 2048), 32, 8, 64),
    Shape("RL batch", log_normal(12, 250, 32, 2048), 32, 8, 128),
    Shape("small model", log_normal(64, 80, 16, 512), 8, 2, 64),
    Shape("one sequence", (4096,), 8, 2, 64),
]


class Batch:
    """Packed `[tokens, heads, head_dim]` inputs of a shape."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape = shape
        tokens = sum(shape.lengths)
        generator = torch.Generator().manual_seed(0)

        def random(heads: int) -> torch.Tensor:
            size = (tokens, heads, shape.head_dim)
            return torch.randn(size, generator=generator).to(dtype)

        self.q = random(shape.heads).requires_grad_()
        self.k = random(shape.kv_heads).requires_grad_()
        self.v = random(shape.kv_heads).requires_grad_()
        self.grad = random(shape.heads)
        offsets = itertools.accumulate(shape.lengths, initial=0)
        self.cu_seqlens = torch.tensor(list(offsets), dtype=torch.int32)


def ours(batch: Batch) -> Forward:
    shape = batch.shape
    layer = TrainableAttention(shape.heads, shape.head_dim, shape.kv_heads)
    return lambda q, k, v: layer(q, k, v, batch.cu_seqlens)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Of `[batch, seq, heads, head_dim]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def sdpa_per_sequence(batch: Batch) -> Forward:
    def forward(*qkv: torch.Tensor) -> torch.Tensor:
        pieces = (x.unsqueeze(0).split(batch.shape.lengths, dim=1) for x in qkv)
        return torch.cat(list(map(sdpa, *pieces)), dim=1).squeeze(0)

    return forward


def sdpa_padded(batch: Batch) -> Forward:
    lengths = torch.tensor(batch.shape.lengths).unsqueeze(1)
    present = (torch.arange(int(lengths.max())) < lengths).flatten().nonzero().flatten()

    def forward(*qkv: torch.Tensor) -> torch.Tensor:
        # [batch, longest, heads, head_dim]
        padded = (
            pad_sequence(list(x.split(batch.shape.lengths)), batch_first=True)
            for x in qkv
        )
        return sdpa(*padded).flatten(0, 1).index_select(0, present)

    return forward


def flex(batch: Batch) -> Forward:
    lengths = torch.tensor(batch.shape.lengths)
    document = torch.arange(len(lengths)).repeat_interleave(lengths)

    def mask(b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
        return (q >= k) & (document[q] == document[k])

    tokens = len(document)
    block_mask = create_block_mask(mask, None, None, tokens, tokens, device="cpu")
    compiled = torch.compile(flex_attention)

    def forward(*qkv: torch.Tensor) -> torch.Tensor:
        rows = (x.transpose(0, 1).unsqueeze(0) for x in qkv)
        out = compiled(*rows, block_mask=block_mask, enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)

    return forward


ENGINES: dict[str, Callable[[Batch], Forward]] = {
    "ours": ours,
    "SDPA per sequence": sdpa_per_sequence,
    "SDPA padded": sdpa_padded,
    "FlexAttention": flex,
}
DIRECTIONS = ("forward", "both")


def calls(batch: Batch, forward: Forward) -> dict[str, Callable[[], Any]]:
    def inference() -> None:
        with torch.no_grad():
            forward(*(x.detach() for x in (batch.q, batch.k, batch.v)))

    def both() -> None:
        qkv = batch.q, batch.k, batch.v
        torch.autograd.grad(forward(*qkv), qkv, batch.grad)

    return {"forward": inference, "both": both}


def time_shape(batch: Batch, rounds: int) -> list[dict[str, Any]]:
    """Each engine's forward, and forward with backward: ms and CPU ms, all threads'."""
    torch.compiler.reset()
    rows, timed = [], []
    for name, engine in ENGINES.items():
        row: dict[str, Any] = {"engine": name, "error": {}}
        row |= {key: {} for key in ("ms", "least_ms", "cpu_ms")}
        rows.append(row)
        for direction, call in calls(batch, engine(batch)).items():
            try:
                call()  # compiles, and warms up
            except (RuntimeError, NotImplementedError) as error:
                row["error"][direction] = f"{type(error).__name__}: {str(error)[:200]}"
            else:
                timed.append((row, direction, call, []))
    for _ in range(rounds):
        for _, _, call, times in timed:
            start, cpu_start = time.perf_counter(), time.process_time()
            call()
            cpu = time.process_time() - cpu_start
            times.append((time.perf_counter() - start, cpu))
    for row, direction, _, times in timed:
        seconds, cpu_seconds = zip(*times, strict=True)
        row["ms"][direction] = 1e3 * statistics.median(seconds)
        row["least_ms"][direction] = 1e3 * min(seconds)
        row["cpu_ms"][direction] = 1e3 * statistics.median(cpu_seconds)
    return rows


def table(batch: Batch, rows: list[dict[str, Any]]) -> Table:
    shape, dtype = batch.shape, str(batch.q.dtype).removeprefix("torch.")
    title = (
        f"{shape.name}, {dtype}: {len(shape.lengths)} sequences of "
        f"{min(shape.lengths)} to {max(shape.lengths)}, {shape.heads}/{shape.kv_heads} "
        f"heads of {shape.head_dim}"
    )
    result = Table(title=title, title_justify="left")
    result.add_column("engine")
    for direction in DIRECTIONS:
        for column in (f"{direction}, ms", "least", "CPU ms", "GFLOP/s", "ours is"):
            result.add_column(column, justify="right")
    flop = {"forward": shape.forward_flop, "both": 3.5 * shape.forward_flop}
    own = rows[0]["ms"]
    for row in rows:
        cells = [row["engine"]]
        for direction in DIRECTIONS:
            ms = row["ms"].get(direction)
            if ms is None:
                cells += [row["error"][direction].partition(":")[0], "", "", "", ""]
                continue
            cells += [
                f"{ms:.1f}",
                f"{row['least_ms'][direction]:.1f}",
                f"{row['cpu_ms'][direction]:.1f}",
                f"{flop[direction] / ms / 1e6:.0f}",
                f"{ms / own[direction]:.2f} x",
            ]
        result.add_row(*cells)
    return result


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls (7)")
    parser.add_argument("--threads", type=int, help="of PyTorch (its default)")
    parser.add_argument("--without", nargs="+", choices=ENGINES, default=[])
    args = parser.parse_args()
    for name in args.without:
        del ENGINES[name]
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console(width=140)
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "shapes": [],
    }
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        batch = Batch(shape, dtype)
        rows = time_shape(batch, args.rounds)
        console.print(table(batch, rows))
        results["shapes"].append(
            {
                "name": shape.name,
                "lengths": shape.lengths,
                "heads": [shape.heads, shape.kv_heads],
                "head_dim": shape.head_dim,
                "dtype": str(dtype).removeprefix("torch."),
                "engines": rows,
            }
        )
        if args.json:  # after each, as they take minutes
            args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
