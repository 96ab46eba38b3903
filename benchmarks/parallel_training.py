# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A tensor-parallel training step: vLLM's layers beside megatron-core's.

    python benchmarks/parallel_training.py --sizes 2 4 --json results.json

Layers of the Llama-3.1-8B shape, packed sequences, random tokens. All models are on the
same ranks, have the same weights, and take turns; figures are medians over rounds. A
step is forward, loss and backward; AdamW, PyTorch's for all, is timed by itself. Before
it times them, it checks that all have one loss and one norm of gradients.

It needs megatron-core and runs on GPUs, or at a small shape on a CPU:

    python benchmarks/parallel_training.py --layers 2 --hidden 128 --intermediate 256 \
        --heads 4 --kv-heads 2 --vocab 512 --length 64 --dtype float32 --sizes 2
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch
import torch.distributed as dist
from harness import host, last_json
from llama import LLAMA_8B, Llama, LlamaShape
from torch import nn

from vllm.model_executor.layers.trainable_attention import packed_sequences
from vllm.model_executor.parallel_context import ParallelContext
from vllm.training.groups import tensor_parallel_group
from vllm.training.initial_values import initialize_parameters
from vllm.training.loss import (
    vocab_parallel_cross_entropy,
    vocab_parallel_logits,
)

STEPS = 4  # of one model in one round
# Relative, of loss and gradient norm between models of the same weights. Megatron's
# fused loss has its gradient in bfloat16, in whatever dtype the model is.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


class Batch:
    """Packed sequences of equal length, the same on all ranks."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        tokens = args.sequences * args.length
        generator = torch.Generator("cpu").manual_seed(0)
        ids = torch.randint(
            args.vocab, (tokens + 1,), generator=generator, device="cpu"
        ).to(device)
        self.ids, self.labels = ids[:-1], ids[1:]  # [tokens]
        self.rows = (args.sequences, args.length)
        self.positions = torch.arange(args.length, device=device).repeat(args.sequences)
        self.cu_seqlens = torch.arange(
            0, tokens + 1, args.length, dtype=torch.int32, device=device
        )


# ---- The models. Each builder gives a module and the loss of a batch ----------------

Model = tuple[nn.Module, Callable[[Batch], torch.Tensor]]


def vllm_layers(shape: LlamaShape, context: ParallelContext) -> Model:
    model = Llama(shape, context)
    torch.manual_seed(0)  # the same on all ranks

    def initialize(name: str, whole: torch.Tensor) -> None:
        if "norm" in name:
            nn.init.ones_(whole)
        else:
            nn.init.normal_(whole, std=0.02)

    initialize_parameters(model, initialize)

    def loss(batch: Batch) -> torch.Tensor:
        with packed_sequences(batch.cu_seqlens):
            hidden_states = model(batch.ids, batch.positions)
        logits = vocab_parallel_logits(model.lm_head, hidden_states)
        return vocab_parallel_cross_entropy(logits, batch.labels, model.lm_head)

    return model, loss


def compiled_vllm_layers(shape: LlamaShape, context: ParallelContext) -> Model:
    model, loss = vllm_layers(shape, context)
    for block in model.model.layers.values():
        block.compile()
    return model, loss


def megatron(shape: LlamaShape, context: ParallelContext) -> Model:
    from megatron_llama import MegatronLlama

    from vllm.model_executor.layers.trainable_attention.megatron import CoreAttention

    model = build_megatron(MegatronLlama, CoreAttention, shape, context)

    def loss(batch: Batch) -> torch.Tensor:
        with packed_sequences(batch.cu_seqlens):
            hidden_states = model(batch.ids, batch.positions)
        logits, _ = model.output_layer(hidden_states.unsqueeze(1))
        labels = batch.labels.unsqueeze(0)
        return model.compute_language_model_loss(labels, logits).mean()

    return model, loss


def megatron_own_attention(shape: LlamaShape, context: ParallelContext) -> Model:
    """With Megatron's attention in PyTorch, for which sequences are rows."""
    from megatron.core.models.gpt import GPTModel

    model = build_megatron(GPTModel, None, shape, context)

    def loss(batch: Batch) -> torch.Tensor:
        ids, positions, labels = (
            x.view(batch.rows) for x in (batch.ids, batch.positions, batch.labels)
        )
        return model(ids, positions, attention_mask=None, labels=labels).mean()

    return model, loss


def build_megatron(
    model_cls: type[nn.Module],
    core_attention: type[nn.Module] | None,
    shape: LlamaShape,
    context: ParallelContext,
) -> Any:
    from megatron.core import parallel_state
    from megatron_llama import build

    if not parallel_state.model_parallel_is_initialized():
        # Its own attention takes scratch memory from there.
        parallel_state.initialize_model_parallel(context.tensor_parallel_size)
    # What Megatron-LM turns on by default, and its own fused loss.
    fusions = {
        "bias_activation_fusion": True,
        "bias_dropout_fusion": True,
        "cross_entropy_loss_fusion": True,
        "cross_entropy_fusion_impl": "native",
    }
    groups = context.megatron_groups()
    model = build(shape, groups, model_cls, core_attention, **fusions)
    copy_weights(vllm_layers(shape, context)[0], model)
    return model


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """This rank's weights of a `Llama` into a Megatron GPTModel of the same shape."""
    names = {
        "model.embed_tokens.weight": "embedding.word_embeddings.weight",
        "model.norm.weight": "decoder.final_layernorm.weight",
        "lm_head.weight": "output_layer.weight",
    }
    parts = {
        "input_layernorm": "input_layernorm",
        "self_attn.qkv_proj": "self_attention.linear_qkv",
        "self_attn.o_proj": "self_attention.linear_proj",
        "post_attention_layernorm": "pre_mlp_layernorm",
        "mlp.gate_up_proj": "mlp.linear_fc1",
        "mlp.down_proj": "mlp.linear_fc2",
    }
    for index in source.model.layers:
        for name, other in parts.items():
            name = f"model.layers.{index}.{name}.weight"
            names[name] = f"decoder.layers.{index}.{other}.weight"
    parameters = dict(target.named_parameters())
    for name, weight in source.named_parameters():
        if "qkv_proj" in name:
            attention = source.get_submodule(name.removesuffix(".qkv_proj.weight"))
            # [heads, head_dim, hidden]; Megatron has each KV head behind its queries
            rows = weight.unflatten(0, (-1, attention.attn.head_dim))
            q, k, v = rows.split(
                [attention.heads, attention.kv_heads, attention.kv_heads]
            )
            q = q.unflatten(0, (attention.kv_heads, -1))
            grouped = torch.cat([q, k.unsqueeze(1), v.unsqueeze(1)], dim=1)
            weight = grouped.flatten(0, 2)
        parameters.pop(names[name]).copy_(weight)
    assert not parameters, f"not copied: {list(parameters)}"


MODELS = {
    "vLLM's layers": vllm_layers,
    "vLLM's layers, compiled": compiled_vllm_layers,
    "megatron-core": megatron,
    "megatron-core, its own attention": megatron_own_attention,
}


# ---- What is measured, on every rank ------------------------------------------------


class Contender:
    def __init__(
        self, name: str, shape: LlamaShape, context: ParallelContext, batch: Batch
    ) -> None:
        module, self.loss = MODELS[name](shape, context)
        self.parameters = list(module.requires_grad_(True).train().parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-5, fused=batch.ids.is_cuda
        )
        self.batch = batch
        self.step_ms: list[float] = []
        self.adamw_ms: list[float] = []
        self.peak_gib: list[float] = []

    def check(self) -> dict[str, float]:
        """Loss, and the norm of this rank's gradients."""
        loss = self.loss(self.batch)
        loss.backward()
        squares = [p.grad.float().square().sum() for p in self.parameters]
        norm = torch.stack(squares).sum().sqrt()
        self.optimizer.zero_grad()
        return {"loss": loss.item(), "gradient_norm": norm.item()}

    def round(self) -> None:
        on_gpu = self.batch.ids.is_cuda
        for _ in range(STEPS):
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            begin = now(on_gpu)
            self.loss(self.batch).backward()
            after = now(on_gpu)
            self.step_ms.append(1e3 * (after - begin))
            if on_gpu:
                peak = torch.cuda.max_memory_allocated() - before
                self.peak_gib.append(peak / 2**30)
            begin = now(on_gpu)
            self.optimizer.step()
            self.adamw_ms.append(1e3 * (now(on_gpu) - begin))
            self.optimizer.zero_grad()

    def forget(self) -> None:
        """What the first round measured, which compiles and warms up."""
        for times in (self.step_ms, self.adamw_ms, self.peak_gib):
            times.clear()

    def figures(self) -> dict[str, float]:
        figures = {
            "step_ms": statistics.median(self.step_ms),
            "adamw_ms": statistics.median(self.adamw_ms),
        }
        figures["tokens_per_s"] = 1e3 * len(self.batch.ids) / figures["step_ms"]
        if self.peak_gib:
            figures["peak_gib"] = max(self.peak_gib)
        return figures


def now(on_gpu: bool) -> float:
    """The time when every rank has done what it was given."""
    if on_gpu:
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


def run(args: argparse.Namespace, context: ParallelContext) -> list[dict[str, Any]]:
    """A row for each model; the same on every rank, but for times."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = getattr(torch, args.dtype)
    torch.set_default_dtype(dtype)
    shape = replace(
        LLAMA_8B,
        num_hidden_layers=args.layers,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.hidden // args.heads,
        vocab_size=args.vocab,
    )
    with device:
        batch = Batch(args, device)
        contenders = {
            name: Contender(name, shape, context, batch) for name in args.models
        }
    checks = {name: contender.check() for name, contender in contenders.items()}
    expected = checks[args.models[0]]
    for name, check in checks.items():
        for key, value in check.items():
            difference = abs(value - expected[key]) / abs(expected[key])
            if not difference <= TOLERANCES[dtype]:  # NaN is not
                raise ValueError(
                    f"{name} has {key} {value} where {args.models[0]} has "
                    f"{expected[key]}: they do not compute the same."
                )
    for index in range(args.rounds + 1):
        for contender in contenders.values():
            if index == 1:
                contender.forget()
            contender.round()
    return [
        {
            "model": name,
            "tensor_parallel_size": context.tensor_parallel_size,
            **checks[name],
            **contender.figures(),
        }
        for name, contender in contenders.items()
    ]


# ---- One program for each number of ranks ------------------------------------------


def start(size: int) -> list[dict[str, Any]] | None:
    """The rows of `size` ranks; None if they failed."""
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*ranks, f"--nproc-per-node={size}", *sys.argv]
    # So that a gradient's exchange starts before the product it overlaps with.
    environment = os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    if child.returncode:
        print(f"TP={size}:\n{child.stdout[-2000:]}{child.stderr[-8000:]}")
        return None
    return last_json(child.stdout)["rows"]


def print_table(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{args.layers} layers of hidden size {args.hidden}, {args.dtype}, "
        f"{args.sequences} sequences of {args.length} tokens"
    )
    table.add_column("TP")
    table.add_column("model")
    for title in ("step, ms", "tok/s", "of megatron-core", "AdamW, ms", "peak, GiB"):
        table.add_column(title, justify="right")
    beside = {
        row["tensor_parallel_size"]: row["step_ms"]
        for row in rows
        if row["model"] == "megatron-core"
    }
    for row in rows:
        size, step = row["tensor_parallel_size"], row["step_ms"]
        table.add_row(
            str(size),
            row["model"],
            f"{step:,.1f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{beside[size] / step:.3f}" if size in beside else "",
            f"{row['adamw_ms']:.1f}",
            f"{row['peak_gib']:.2f}" if "peak_gib" in row else "",
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=LLAMA_8B.hidden_size)
    parser.add_argument("--intermediate", type=int, default=LLAMA_8B.intermediate_size)
    parser.add_argument("--heads", type=int, default=LLAMA_8B.num_attention_heads)
    parser.add_argument("--kv-heads", type=int, default=LLAMA_8B.num_key_value_heads)
    parser.add_argument("--vocab", type=int, default=LLAMA_8B.vocab_size)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    if "RANK" in os.environ:  # torchrun started this process
        with tensor_parallel_group() as context:
            rows = run(args, context)
            if context.tensor_parallel_rank == 0:
                print("\n" + json.dumps({"rows": rows}), flush=True)
        return

    options = {name: value for name, value in vars(args).items() if name != "json"}
    rows = []
    for size in args.sizes:
        rows += start(size) or []
        if args.json:
            results = {**host(), "options": options, "rows": rows}
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    print_table(rows, args)


if __name__ == "__main__":
    main()
