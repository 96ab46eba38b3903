# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Train a model of vLLM's parallel layers with tensor parallelism, and serve it.

Each process holds a part of every large weight, on a CPU or on its own GPU:

    torchrun --nproc-per-node 2 examples/train_tensor_parallel.py

When it is run again, it continues from its checkpoint, with any number of processes
that divides the heads. The weights of the last run serve at the same number of ranks:

    python examples/train_tensor_parallel.py --serve --tensor-parallel-size 2
"""
# ruff: noqa: E402

import argparse
import json
import os
import sys
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # for TP on one socket
warnings.filterwarnings("ignore", module=r"(vllm|torch\.distributed)\.")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from english_corpus import read_paragraphs, train_tokenizer
from torch import nn
from transformers import AutoTokenizer

from vllm import LLM, ModelRegistry, SamplingParams
from vllm.model_executor.layers import TrainableAttention
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
from vllm.model_executor.parallel_context import ParallelContext
from vllm.platforms import current_platform
from vllm.training.checkpoints import TrainingState
from vllm.training.clipping import clip_grad_norm_
from vllm.training.groups import tensor_parallel_group
from vllm.training.initial_values import initialize_parameters
from vllm.training.loss import (
    vocab_parallel_cross_entropy,
    vocab_parallel_logits,
)

CONFIG = {
    "architectures": ["ParallelGPT"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1024,
    "max_position_embeddings": 128,
}
BATCH, LR, MAX_GRAD_NORM = 8, 3e-3, 1.0


# ---- The model ----------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, config, tensor_parallel_size: int) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.heads = heads // tensor_parallel_size  # of this rank
        self.kv_heads = max(1, kv_heads // tensor_parallel_size)
        self.attn_norm = nn.RMSNorm(hidden)
        self.qkv_proj = QKVParallelLinear(
            hidden, self.head_dim, heads, kv_heads, bias=False, return_bias=False
        )
        self.attn = TrainableAttention(self.heads, self.head_dim, self.kv_heads)
        self.o_proj = RowParallelLinear(
            heads * self.head_dim, hidden, bias=False, return_bias=False
        )
        self.mlp_norm = nn.RMSNorm(hidden)
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [config.intermediate_size] * 2, bias=False, return_bias=False
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size, hidden, bias=False, return_bias=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # [..., heads, head_dim]; heads of queries, then of keys, then of values
        heads = self.qkv_proj(self.attn_norm(x)).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
        x = x + self.o_proj(self.attn(q, k, v).flatten(-2))
        gate, up = self.gate_up_proj(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down_proj(F.silu(gate) * up)


class ParallelGPT(nn.Module):
    """Tokens `[batch, seq]` in training, `[tokens]` in vLLM -> hidden states."""

    def __init__(self, config, parallel_context: ParallelContext) -> None:
        super().__init__()
        size = parallel_context.get_tensor_parallel_world_size()
        hidden = config.hidden_size
        self.embedding = VocabParallelEmbedding(config.vocab_size, hidden)
        self.positions = nn.Embedding(config.max_position_embeddings, hidden)
        self.blocks = nn.ModuleList(
            Block(config, size) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(hidden)
        self.lm_head = ParallelLMHead(config.vocab_size, hidden)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def initialize(name: str, tensor: torch.Tensor) -> None:
    if "norm" in name:
        nn.init.ones_(tensor)
    else:
        nn.init.normal_(tensor, std=0.02)


# ---- Training, in every process that torchrun started ------------------------------


def batch_of(tokens: torch.Tensor, step: int, device: torch.device) -> torch.Tensor:
    """Chunks `[batch, seq + 1]`, the same on all ranks and in every run."""
    seq = CONFIG["max_position_embeddings"]
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(tokens) - seq, (BATCH,), generator=generator)
    return torch.stack([tokens[s : s + seq + 1] for s in starts]).to(device)


def train(args: argparse.Namespace, parallel_context: ParallelContext) -> None:
    directory: Path = args.output_dir
    rank = parallel_context.get_tensor_parallel_rank()
    paragraphs = read_paragraphs()
    if rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        train_tokenizer(paragraphs, CONFIG["vocab_size"], directory)
        (directory / "config.json").write_text(json.dumps(CONFIG, indent=2))
    dist.barrier()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = tokenizer.eos_token.join(paragraphs)
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])

    device = torch.device("cpu")
    if current_platform.is_cuda_alike():
        device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)  # the same on all ranks
    with device:
        model = ParallelGPT(SimpleNamespace(**CONFIG), parallel_context)
    initialize_parameters(model, initialize)
    model.requires_grad_(True)  # vLLM builds parameters without gradients
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)

    # ---- Continue from a checkpoint of any number of ranks ----
    checkpoint = directory / "checkpoint"
    done = 0
    if (checkpoint / ".metadata").exists():
        state = {"training": TrainingState(model, optimizer), "steps": 0}
        dcp.load(state, checkpoint_id=checkpoint)
        done = state["steps"]

    # ---- Train ----
    seq = CONFIG["max_position_embeddings"]
    positions = torch.arange(seq, device=device)
    for step in range(done, done + args.steps):
        chunks = batch_of(tokens, step, device)
        hidden_states = model(chunks[:, :-1], positions)
        logits = vocab_parallel_logits(model.lm_head, hidden_states)
        loss = vocab_parallel_cross_entropy(logits, chunks[:, 1:], model.lm_head)
        loss.backward()
        norm = clip_grad_norm_(model, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step % 10 == 0 or step == done + args.steps - 1):
            print(f"step {step:4}  loss {loss:.4f}  gradient norm {norm:.4f}")

    # ---- Save: a checkpoint of whole weights, and each rank's part for serving ----
    state = {
        "training": TrainingState(model, optimizer),
        "steps": done + args.steps,
    }
    dcp.save(state, checkpoint_id=checkpoint)
    if rank == 0:
        for stale in directory.glob("model-rank-*"):
            stale.unlink()
    dist.barrier()
    ShardedStateLoader.save_model(model, str(directory))


# ---- Serving, in one process that starts the others --------------------------------


def serve(args: argparse.Namespace) -> None:
    ModelRegistry.register_model(
        "ParallelGPT",
        lambda vllm_config, parallel_context: ParallelGPT(
            vllm_config.model_config.hf_config, parallel_context
        ),
    )
    llm = LLM(
        model=str(args.output_dir),
        load_format="sharded_state",  # rank i loads model-rank-i-*.safetensors
        tensor_parallel_size=args.tensor_parallel_size,
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
    )
    prompts = ["The import statement", "An exception", "A class definition"]
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    for output in llm.generate(prompts, params, use_tqdm=False):
        text = f"[{output.prompt}]{output.outputs[0].text}"
        print(textwrap.fill(text, 88, initial_indent="- ", subsequent_indent="  "))


def main(args: argparse.Namespace) -> int:
    if args.serve:
        serve(args)
    else:
        with tensor_parallel_group() as parallel_context:
            train(args, parallel_context)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output-dir", type=Path, default=Path("build/parallel"))
    parser.add_argument("--serve", action="store_true", help="serve what was trained")
    parser.add_argument("--tensor-parallel-size", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=32)
    sys.exit(main(parser.parse_args()))
