# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One model, parallelized in several ways and layouts, compared with a plain model.

`GPT` is written once, and built from PyTorch's, vLLM's or Megatron's layers. The plain
model saves one checkpoint, which serves all of them. Each row of the table is an engine
of which every token was compared with the plain model.

    python examples/generic_model_parallelism.py
    python examples/generic_model_parallelism.py --ways megatron --layouts 2x2

A layout is TP x PP: `2x1` is tensor parallelism on two ranks, `1x2` two stages.
"""
# ruff: noqa: E402

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # so that it starts sooner
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # for TP on one socket
warnings.filterwarnings("ignore", module=r"(megatron|vllm)\.")

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import nn

from vllm import LLM, ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.layers import TrainableAttention
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_validation import ValidationReport, validate

CONFIG = {
    "architectures": ["GPT"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}


# ---- The model ----------------------------------------------------------------


@dataclass
class Layers:
    """The layers that the model is built from, each called as `layer(inputs, outputs)`.

    `column` divides its outputs among the tensor-parallel ranks, `row` its inputs.
    """

    column: Callable[[int, int], nn.Module] = nn.Linear
    row: Callable[[int, int], nn.Module] = nn.Linear
    embedding: Callable[[int, int], nn.Module] = nn.Embedding
    head: Callable[[int, int], nn.Module] = partial(nn.Linear, bias=False)


class Block(nn.Module):
    def __init__(self, config: Any, context: ParallelContext, layers: Layers) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.attention_norm = nn.LayerNorm(hidden)
        self.q_proj = layers.column(hidden, hidden)
        self.k_proj = layers.column(hidden, hidden)
        self.v_proj = layers.column(hidden, hidden)
        self.attention = TrainableAttention(
            heads // context.get_tensor_parallel_world_size(), hidden // heads
        )
        self.o_proj = layers.row(hidden, hidden)
        self.mlp_norm = nn.LayerNorm(hidden)
        self.up_proj = layers.column(hidden, config.intermediate_size)
        self.down_proj = layers.row(config.intermediate_size, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.attention_norm(x)
        # q, k and v are [tokens, hidden / TP]
        h = self.attention(self.q_proj(h), self.k_proj(h), self.v_proj(h))
        x = x + self.o_proj(h)
        return x + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(x))))


class GPT(nn.Module):
    """A pipeline stage of the model, or the whole model if there is one stage."""

    def __init__(self, config: Any, context: ParallelContext, layers: Layers) -> None:
        super().__init__()
        hidden = config.hidden_size
        if context.is_first_stage:
            self.embedding = layers.embedding(config.vocab_size, hidden)
            self.positions = nn.Embedding(config.max_position_embeddings, hidden)
        self.blocks = nn.ModuleDict(
            {
                str(index): Block(config, context, layers)
                for index in context.layer_range(config.num_hidden_layers)
            }
        )
        if context.is_last_stage:
            self.norm = nn.LayerNorm(hidden)
            self.lm_head = layers.head(hidden, config.vocab_size)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `[tokens, hidden]`; `inputs_embeds` is for later stages."""
        x = inputs_embeds
        if x is None:
            x = self.embedding(input_ids) + self.positions(positions)
        for block in self.blocks.values():
            x = block(x)
        return self.norm(x) if hasattr(self, "norm") else x


# ---- The ways to parallelize it -------------------------------------------------


def with_vllm_layers(vllm_config: VllmConfig, parallel_context: ParallelContext) -> GPT:
    layers = Layers(
        column=partial(ColumnParallelLinear, return_bias=False),
        row=partial(RowParallelLinear, return_bias=False),
        embedding=VocabParallelEmbedding,
        head=lambda hidden, vocab: ParallelLMHead(vocab, hidden),
    )
    return GPT(vllm_config.model_config.hf_config, parallel_context, layers)


def with_megatron_layers(
    vllm_config: VllmConfig, parallel_context: ParallelContext
) -> GPT:
    from megatron.core import tensor_parallel
    from megatron.core.transformer import TransformerConfig

    config = vllm_config.model_config.hf_config
    groups = parallel_context.megatron_groups()
    options = {
        "config": TransformerConfig(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            tensor_model_parallel_size=groups.tp.size(),
            use_cpu_initialization=True,
        ),
        "init_method": nn.init.zeros_,  # the checkpoint has the values
        "tp_group": groups.tp,
    }

    class Column(tensor_parallel.ColumnParallelLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)[0]  # the other is a bias to add later, or None

    class Row(tensor_parallel.RowParallelLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)[0]

    linear = {"bias": True, "skip_bias_add": False, **options}
    layers = Layers(
        column=partial(Column, gather_output=False, **linear),
        row=partial(Row, input_is_parallel=True, **linear),
        embedding=partial(tensor_parallel.VocabParallelEmbedding, **options),
        head=partial(Column, **{**linear, "bias": False}),
    )
    return GPT(config, parallel_context, layers)


class PlannedGPT(GPT):
    """The plain model with plans: it is built whole, and vLLM divides it."""

    tp_plan = {
        "embedding": "rowwise",
        "blocks.*.[qkv]_proj": "colwise",
        "blocks.*.o_proj": "rowwise",
        "blocks.*.up_proj": "colwise",
        "blocks.*.down_proj": "rowwise",
        "lm_head": "colwise_rep",
    }
    pp_plan = {
        "embedding": (["input_ids"], ["hidden_states"]),
        "positions": (["positions"], ["hidden_states"]),
        "blocks": (["hidden_states"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
        "lm_head": (["hidden_states"], ["logits"]),
    }


def with_plan(vllm_config: VllmConfig, parallel_context: ParallelContext) -> GPT:
    config = vllm_config.model_config.hf_config
    return PlannedGPT(config, ParallelContext(), Layers())


WAYS = {"vllm": with_vllm_layers, "megatron": with_megatron_layers, "plan": with_plan}


# ---- Ground truth ---------------------------------------------------------------


def plain_model() -> GPT:
    """The model that is saved and compared with: PyTorch's layers on one device."""
    return GPT(SimpleNamespace(**CONFIG), ParallelContext(), Layers())


def save_checkpoint(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2))
    generator = torch.Generator().manual_seed(0)
    model = plain_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    save_file(model.state_dict(), directory / "model.safetensors")


def serve(
    args: argparse.Namespace, way: str, tp_size: int, pp_size: int
) -> tuple[ValidationReport, float]:
    """Compare one engine with the plain model; returns also its seconds of start-up."""
    ModelRegistry.register_model("GPT", WAYS[way], supports_pp=True)
    begin = time.monotonic()
    llm = LLM(
        model=str(args.output_dir),
        tensor_parallel_size=tp_size,
        pipeline_parallel_size=pp_size,
        dtype="float32",
        max_logprobs=-1,  # for the KL over the whole vocabulary
        skip_tokenizer_init=True,
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        use_tqdm_on_load=False,
    )
    seconds = time.monotonic() - begin
    model = plain_model()
    model.load_state_dict(load_file(args.output_dir / "model.safetensors"))
    report = validate(
        llm,
        lambda ids: model.lm_head(model(ids, torch.arange(len(ids)))),
        prompts=[list(range(1 + 19 * i % 60)) for i in range(args.num_prompts)],
        max_tokens=args.max_tokens,
    )
    return report, seconds


def main(args: argparse.Namespace) -> int:
    save_checkpoint(args.output_dir)
    table = Table("way", "TP", "PP", "greedy", "max |Δ log p|", "max KL", "start", "")
    spawn = multiprocessing.get_context("spawn")
    passed = True
    for way in args.ways:
        for layout in args.layouts:
            sizes = [int(size) for size in layout.split("x")]
            print(f"Serving with {way}, TP x PP = {layout} ...", flush=True)
            # each engine in its own process, so that nothing is left for the next
            with ProcessPoolExecutor(1, spawn) as process:
                report, seconds = process.submit(serve, args, way, *sizes).result()
            checks = {check.name: check.value for check in report.checks}
            table.add_row(
                way,
                *map(str, sizes),
                f"{report.greedy_agreement:.0%} of {len(report.generated)}",
                f"{checks['max |Δ log p|']:.1e}",
                f"{checks['max KL']:.1e}",
                f"{seconds:.0f} s",
                "ok" if report.passed else "FAILED",
            )
            passed &= report.passed
    Console().print(table)
    return 0 if passed else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument(
        "--layouts", nargs="+", metavar="TPxPP", default=["1x1", "2x1", "1x2", "2x2"]
    )
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--output-dir", type=Path, default=Path("build/parallelism"))
    sys.exit(main(parser.parse_args()))
