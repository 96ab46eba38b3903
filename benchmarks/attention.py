# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Training attention: speed, errors and memory, beside every peer that imports.

    python benchmarks/attention.py --json results.json
    python benchmarks/attention.py --json results.json --plot speed.svg

Everything runs in one process, in turns. Figures are medians; TFLOP/s count causal
attention as half of the full matrix, and a backward as 2.5 forwards. Needs an NVIDIA
GPU.
"""

import argparse
import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import host
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from vllm.model_executor.layers import TrainableAttention
from vllm.model_executor.layers.trainable_attention import packed_sequences
from vllm.v1.attention.training.backward import BACKWARD_ENGINES, BACKWARD_VARIABLE

DTYPE = torch.bfloat16
DEVICE = torch.device("cuda")
CALLS = 10  # of one function in one round


@dataclass(frozen=True)
class Shape:
    """A batch of sequences for one causal attention."""

    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def name(self) -> str:
        rows = f"{len(self.lengths)} x {self.lengths[0]}"
        if len(set(self.lengths)) > 1:
            rows = f"{len(self.lengths)} of {min(self.lengths)}-{max(self.lengths)}"
        return f"{rows}, {self.heads}/{self.kv_heads}, {self.head_dim}"

    @property
    def ragged(self) -> bool:
        return len(set(self.lengths)) > 1

    @property
    def forward_flop(self) -> float:
        pairs = sum(length**2 / 2 for length in self.lengths)
        return 4 * pairs * self.heads * self.head_dim


SHAPES = [
    Shape((2048,) * 8, 32, 8, 64),
    Shape((4096,) * 4, 32, 8, 128),
    Shape((8192,) * 2, 32, 32, 128),
    Shape((16384,), 32, 8, 128),
]


def rl_batch() -> Shape:
    """256 sequences, lengths log-normal from 64 to 8,192."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(256).log_normal_(math.log(700), 1.0, generator=generator)
    return Shape(tuple(lengths.clamp(64, 8192).int().tolist()), 32, 8, 128)


@dataclass(eq=False)
class Batch:
    """Packed `[tokens, heads, head_dim]` inputs of a shape."""

    shape: Shape

    def __post_init__(self) -> None:
        tokens = sum(self.shape.lengths)
        generator = torch.Generator(DEVICE).manual_seed(0)

        def random(heads: int) -> torch.Tensor:
            size = (tokens, heads, self.shape.head_dim)
            return torch.randn(size, generator=generator, device=DEVICE, dtype=DTYPE)

        self.q = random(self.shape.heads).requires_grad_()
        self.k = random(self.shape.kv_heads).requires_grad_()
        self.v = random(self.shape.kv_heads).requires_grad_()
        self.grad = random(self.shape.heads)
        offsets = itertools.accumulate(self.shape.lengths, initial=0)
        self.cu_seqlens = torch.tensor(list(offsets), dtype=torch.int32, device=DEVICE)

    @property
    def qkv(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q, self.k, self.v

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """`[tokens, heads, d]` -> `[batch, heads, seq, d]`, of equal lengths."""
        size = (len(self.shape.lengths), self.shape.lengths[0])
        return x.detach().unflatten(0, size).transpose(1, 2)


# A peer makes, from a batch, inputs and the function to time on them.
Peer = Callable[[Batch], tuple[tuple[torch.Tensor, ...], torch.Tensor, Callable]]


def ours(batch: Batch, deterministic: bool = False) -> Any:
    shape = batch.shape
    layer = TrainableAttention(
        shape.heads, shape.head_dim, shape.kv_heads, deterministic=deterministic
    )
    if shape.ragged:
        return batch.qkv, batch.grad, layer
    size = (len(shape.lengths), shape.lengths[0])
    qkv = tuple(x.detach().unflatten(0, size).requires_grad_() for x in batch.qkv)
    return qkv, batch.grad.unflatten(0, size), layer


def kernels(batch: Batch) -> Any:
    """The bare kernels that ours calls, for the overhead of our layer."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    longest = max(batch.shape.lengths)

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flash_attn_varlen_func(
            q,
            k,
            v,
            longest,
            batch.cu_seqlens,
            longest,
            batch.cu_seqlens,
            causal=True,
            num_splits=1,
            return_softmax_lse=True,
            fa_version=3,
        )[0]

    return tuple(x.detach() for x in batch.qkv), batch.grad, forward


def sdpa(backend: SDPBackend) -> Peer:
    def peer(batch: Batch) -> Any:
        def forward(*qkv: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    *qkv, is_causal=True, enable_gqa=True
                )

        qkv = tuple(batch.rows(x).contiguous().requires_grad_() for x in batch.qkv)
        return qkv, batch.rows(batch.grad).contiguous(), forward

    return peer


def time_padded(peer: Peer, batch: Batch, calls: int) -> dict[str, float]:
    """Times of a ragged batch padded to its longest, some rows at a time.

    All rows at once would not fit into memory; each part is as large as fills the GPU.
    """
    lengths, rows = batch.shape.lengths, 16
    part = Batch(replace(batch.shape, lengths=(max(lengths),) * rows))
    times = time_peer(peer, part, calls)
    return {name: ms * len(lengths) / rows for name, ms in times.items()}


def sdpa_by_sequence(backend: SDPBackend) -> Peer:
    """For the errors only: as many calls as sequences."""

    def peer(batch: Batch) -> Any:
        def forward(*qkv: torch.Tensor) -> torch.Tensor:
            outs = []
            for rows in zip(*(x.split(batch.shape.lengths) for x in qkv), strict=True):
                # [1, heads, seq, head_dim]
                q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in rows)
                with sdpa_kernel(backend):
                    out = F.scaled_dot_product_attention(
                        q, k, v, is_causal=True, enable_gqa=True
                    )
                outs.append(out.squeeze(0).transpose(0, 1))
            return torch.cat(outs)

        return batch.qkv, batch.grad, forward

    return peer


@lru_cache(maxsize=1)  # compiles for each mask anew
def flex(batch: Batch) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.tensor(batch.shape.lengths, device=DEVICE)
    document = torch.arange(len(lengths), device=DEVICE).repeat_interleave(lengths)

    def mask(b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
        return (q >= k) & (document[q] == document[k])

    tokens = len(document)
    block_mask = create_block_mask(
        mask, None, None, tokens, tokens, device=DEVICE.type, _compile=True
    )
    compiled = torch.compile(flex_attention)
    # The timed backward keeps its graph.
    torch._functorch.config.donated_buffer = False
    qkv = tuple(
        x.detach().transpose(0, 1).unsqueeze(0).contiguous().requires_grad_()
        for x in batch.qkv
    )
    grad = batch.grad.transpose(0, 1).unsqueeze(0).contiguous()
    return qkv, grad, lambda *x: compiled(*x, block_mask=block_mask, enable_gqa=True)


def flash_attn(module: str) -> Peer:
    def peer(batch: Batch) -> Any:
        longest = max(batch.shape.lengths)

        def forward(*qkv: torch.Tensor) -> torch.Tensor:
            out = import_module(module).flash_attn_varlen_func(
                *qkv,
                cu_seqlens_q=batch.cu_seqlens,
                cu_seqlens_k=batch.cu_seqlens,
                max_seqlen_q=longest,
                max_seqlen_k=longest,
                causal=True,
            )
            return out[0] if isinstance(out, tuple) else out

        return batch.qkv, batch.grad, forward

    return peer


PEERS: dict[str, Peer] = {
    "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    "FlexAttention": flex,
}
# By the names of our backward engines, which are of the same packages.
for name, module in {
    "fa4": "flash_attn.cute",
    "fa3": "flash_attn_interface",
    "fa2": "flash_attn",
}.items():
    if BACKWARD_ENGINES[name].available():
        PEERS[name.upper()] = flash_attn(module)
PADDED = {"SDPA flash", "SDPA cuDNN"}  # the whole batch as rows of the longest
PEER_ERRORS = (
    AssertionError,
    ImportError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def median_ms(function: Callable[[], Any], calls: int) -> float:
    """Median GPU time of `function` in ms.

    The calls are queued without waiting between them, as in training.
    """
    function()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(
        start.elapsed_time(end) for start, end in itertools.pairwise(events)
    )


def time_peer(peer: Peer, batch: Batch, calls: int) -> dict[str, float]:
    """Median ms of forward, backward and both."""
    qkv, grad, forward = peer(batch)
    with packed(batch):
        with torch.no_grad():
            forward_ms = median_ms(lambda: forward(*qkv), calls)
        out = forward(*qkv)
        times = {"forward": forward_ms}
        if out.grad_fn is not None:
            times["backward"] = median_ms(
                lambda: torch.autograd.grad(out, qkv, grad, retain_graph=True), calls
            )
            times["both"] = median_ms(
                lambda: torch.autograd.grad(forward(*qkv), qkv, grad), calls
            )
    return times


@contextmanager
def packed(batch: Batch) -> Iterator[None]:
    """Tells our layer the sequences of a ragged batch."""
    if not batch.shape.ragged:
        yield
        return
    with packed_sequences(batch.cu_seqlens):
        yield


def matmul_tflops() -> float:
    """The rate of a large bf16 matrix product on this chip, now."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE) for _ in range(2))
    return 2 * 8192**3 / median_ms(lambda: a @ b, CALLS) / 1e9


def speed(rounds: int, console: Console) -> Iterator[dict[str, Any]]:
    """Times of every engine on every shape: medians over rounds; all take turns.

    Each round begins with another, as one that follows a hot kernel is slower. The
    first round, which compiles and warms up, does not count.
    """
    engines: dict[str, Peer] = {
        "ours": ours,
        "ours, deterministic": lambda batch: ours(batch, deterministic=True),
        "bare kernels": kernels,
        **PEERS,
    }
    for shape in [*SHAPES, rl_batch()]:
        batch = Batch(shape)
        rows = []
        timed: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
        refused: dict[str, str] = {}
        peaks = []
        names = list(engines)
        for _ in track(range(rounds + 1), description=shape.name, console=console):
            peaks.append(matmul_tflops())
            names.append(names.pop(0))
            for name in names:
                if name in refused:
                    continue
                peer = engines[name]
                time = time_padded if shape.ragged and name in PADDED else time_peer
                try:
                    timed[name].append(time(peer, batch, CALLS))
                except PEER_ERRORS as e:
                    refused[name] = f"{type(e).__name__}: {str(e)[:200]}"
                torch.cuda.empty_cache()
        for name, times in timed.items():
            row: dict[str, Any] = {"shape": shape.name, "engine": name}
            row["matmul_tflops"] = statistics.median(peaks[1:])
            if name in refused:
                row["error"] = refused[name]
            else:
                row["ms"] = {
                    direction: statistics.median(t[direction] for t in times[1:])
                    for direction in times[0]
                }
            rows.append(row)
        console.print(speed_table(shape, rows))
        yield from rows


def speed_table(shape: Shape, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=shape.name, title_justify="left")
    table.add_column("engine")
    flop = {"forward": 1.0, "backward": 2.5, "both": 3.5}
    for direction in flop:
        table.add_column(f"{direction}, TFLOP/s", justify="right")
        table.add_column("ours is", justify="right")
    table.add_column("both, of matmul", justify="right")
    own = rows[0].get("ms", {})
    for row in rows:
        cells = [row["engine"]]
        for direction, factor in flop.items():
            ms = row.get("ms", {}).get(direction)
            if ms is None:
                cells += [row.get("error", "-")[:24], ""]
                continue
            cells.append(f"{factor * shape.forward_flop / ms / 1e9:.0f}")
            cells.append(f"{ms / own[direction]:.2f} x" if own else "")
        both = row.get("ms", {}).get("both")
        share = ""
        if both:
            rate = 3.5 * shape.forward_flop / both / 1e9
            share = f"{rate / row['matmul_tflops']:.0%}"
        table.add_row(*cells, share)
    return table


def backward_engines(rounds: int, console: Console) -> Iterator[dict[str, Any]]:
    """Ms of the backward of every engine of ours; deterministic ones in brackets.

    In turns, each after our forward: what the choice of an engine rests on.
    """
    engines = [name for name, engine in BACKWARD_ENGINES.items() if engine.available()]
    sizes = [
        Shape((4096,) * 4, 16, 4, head_dim) for head_dim in (64, 96, 128, 192, 256)
    ]
    table = Table("shape", *engines, title="backward, ms", title_justify="left")
    for shape in [*SHAPES, rl_batch(), *sizes]:
        batch = Batch(shape)
        row: dict[str, Any] = {"shape": shape.name}
        for key, deterministic in (("ms", False), ("deterministic_ms", True)):
            qkv, grad, layer = ours(batch, deterministic)
            with packed(batch):
                out = layer(*qkv)
            timed: dict[str, list[float]] = {
                name: []
                for name in engines
                if not BACKWARD_ENGINES[name].refuses(
                    shape.head_dim, 0.0, deterministic
                )
            }
            names = list(timed)
            for _ in range(rounds + 1):
                names.append(names.pop(0))
                for name in names:
                    os.environ[BACKWARD_VARIABLE] = name
                    backward = partial(
                        torch.autograd.grad, out, qkv, grad, retain_graph=True
                    )
                    timed[name].append(median_ms(backward, CALLS))
            row[key] = {name: statistics.median(ms[1:]) for name, ms in timed.items()}
            del os.environ[BACKWARD_VARIABLE]
        cells = []
        for name in engines:
            cells.append(f"{row['ms'][name]:.2f}")
            if name in row["deterministic_ms"]:
                cells[-1] += f" ({row['deterministic_ms'][name]:.2f})"
        table.add_row(shape.name, *cells)
        yield row
    console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """TFLOP/s of the engines on every shape, forward and backward."""
    import matplotlib.pyplot as plt

    names = ("ours", "FA4", "FA2", "SDPA cuDNN", "SDPA flash")
    width = 0.8 / len(names)
    shapes = {shape.name: shape for shape in [*SHAPES, rl_batch()]}
    figure, panels = plt.subplots(
        2, 1, figsize=(8, 5), sharex=True, layout="constrained"
    )
    for axes, direction, factor in zip(
        panels, ("forward", "backward"), (1.0, 2.5), strict=True
    ):
        for index, name in enumerate(names):
            heights = []
            for shape in shapes.values():
                ms = next(
                    row["ms"][direction]
                    for row in rows
                    if (row["shape"], row["engine"]) == (shape.name, name)
                )
                heights.append(factor * shape.forward_flop / ms / 1e9)
            places = [place + width * index for place in range(len(shapes))]
            axes.bar(places, heights, width, label=name)
        axes.set_ylabel(f"{direction}, TFLOP/s")
    places = [place + 0.3 for place in range(len(shapes))]
    panels[1].set_xticks(places, [name.replace(", ", "\n", 1) for name in shapes])
    panels[0].legend(ncols=len(names), loc="upper center")
    panels[0].set_ylim(0, 850)
    figure.savefig(path)


def reference(batch: Batch) -> tuple[torch.Tensor, ...]:
    """Output and gradients by the definition, in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in batch.qkv)
    group = batch.shape.heads // batch.shape.kv_heads
    outs = []
    for rows in zip(*(x.split(batch.shape.lengths) for x in (q, k, v)), strict=True):
        # [heads, seq, head_dim]
        qs, ks, vs = (x.transpose(0, 1) for x in rows)
        ks, vs = (x.repeat_interleave(group, 0) for x in (ks, vs))
        scores = qs @ ks.mT * batch.shape.head_dim**-0.5
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
        outs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ vs).mT)
    out = torch.cat([x.permute(2, 0, 1) for x in outs])
    return out, *torch.autograd.grad(out, (q, k, v), batch.grad.double())


def errors(console: Console) -> Iterator[dict[str, Any]]:
    """Relative error against float64 of every engine and every backward of ours.

    In brackets: over the least error of a peer.
    """
    lengths = (1, 130, 512, 777)
    table = Table(title="relative error against float64", title_justify="left")
    for column in ("head_dim", "heads", "engine", "out", "dQ", "dK", "dV"):
        table.add_column(column)
    for head_dim, (heads, kv_heads) in itertools.product(
        (64, 96, 128, 192, 256), ((8, 8), (8, 2), (8, 1))
    ):
        batch = Batch(Shape(lengths, heads, kv_heads, head_dim))
        exact = reference(batch)
        candidates: dict[str, Peer] = {"ours": ours, **PEERS}
        for name in BACKWARD_ENGINES:
            candidates[f"ours, {name}"] = ours
        candidates["SDPA flash"] = sdpa_by_sequence(SDPBackend.FLASH_ATTENTION)
        candidates["SDPA cuDNN"] = sdpa_by_sequence(SDPBackend.CUDNN_ATTENTION)
        candidates.pop("FlexAttention", None)  # minutes of compilation
        rows = []
        for name, peer in candidates.items():
            engine = name.partition(", ")[2]
            row: dict[str, Any] = {"head_dim": head_dim, "heads": [heads, kv_heads]}
            row["engine"] = name
            os.environ[BACKWARD_VARIABLE] = engine
            try:
                qkv, grad, forward = peer(batch)
                with packed(batch):
                    out = forward(*qkv)
                    result = (out, *torch.autograd.grad(out, qkv, grad))
            except PEER_ERRORS as e:
                row["error"] = f"{type(e).__name__}: {str(e)[:120]}"
            else:
                row["relative"] = [
                    float((x.double() - y).norm() / y.norm())
                    for x, y in zip(result, exact, strict=True)
                ]
            rows.append(row)
        best = [
            min(column)
            for column in zip(
                *(
                    row["relative"]
                    for row in rows
                    if "relative" in row and not row["engine"].startswith("ours")
                ),
                strict=True,
            )
        ]
        for row in rows:
            if "relative" in row:
                cells = [
                    f"{value:.2e} ({value / least:.2f} x)"
                    for value, least in zip(row["relative"], best, strict=True)
                ]
                name = row["engine"]
                table.add_row(str(head_dim), f"{heads}/{kv_heads}", name, *cells)
        yield from rows
        os.environ.pop(BACKWARD_VARIABLE)
    console.print(table)


def memory(console: Console) -> Iterator[dict[str, Any]]:
    """Peak bytes a token of a forward and backward, inputs not counted."""
    rows = []
    for tokens in (1024, 4096, 16384, 65536, 262144):
        batch = Batch(Shape((1024,) * (tokens // 1024), 32, 8, 128))
        qkv, grad, forward = ours(batch)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(forward(*qkv), qkv, grad)
        used = torch.cuda.max_memory_allocated() - before
        rows.append({"tokens": tokens, "bytes_per_token": used / tokens})
    table = Table(title="peak memory", title_justify="left")
    table.add_column("tokens")
    table.add_column("bytes a token")
    for row in rows:
        table.add_row(f"{row['tokens']:,}", f"{row['bytes_per_token']:,.0f}")
    console.print(table)
    yield from rows


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--plot", type=Path, help="draw the picture of --json's there")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (7)")
    parser.add_argument("--without", nargs="+", choices=PEERS, default=[])
    args = parser.parse_args()
    if args.plot:
        plot(json.loads(args.json.read_text())["speed"], args.plot)
        return
    for name in args.without:
        del PEERS[name]
    console = Console(width=140)
    results = host()
    results["versions"] |= {
        name: version(name) for name in ("flash-attn", "flash-attn-3", "flash-attn-4")
    }
    if "SDPA cuDNN" in PEERS:
        results["versions"]["cudnn"] = torch.backends.cudnn.version()
    parts = {
        "speed": speed(args.rounds, console),
        "backward": backward_engines(args.rounds, console),
        "errors": errors(console),
        "memory": memory(console),
    }
    for name, rows in parts.items():
        results[name] = []
        for row in rows:
            results[name].append(row)
            if args.json:  # after each, as they take minutes
                args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
